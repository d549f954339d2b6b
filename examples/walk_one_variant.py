"""Print what a recurrence is at every stop from the user's words to the compiled model.

python examples/walk_one_variant.py gated_delta_rule
python examples/walk_one_variant.py gla --stop 4
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

import lmoe_compiler as lmoe
from lmoe_compiler import Recurrence
from lmoe_compiler.codegen import run as kernels
from lmoe_compiler.config import Options
from lmoe_compiler.ir.text import print_expression
from lmoe_compiler.lower.chunk import NoChunkForm
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.stages import of_call, of_program, render
from lmoe_compiler.trace import trace

BATCH, LENGTH, HEADS, SIZE = 1, 128, 4, 64


def definition(r: Recurrence) -> str:
    """What the user wrote: the step of one token of one head."""
    return inspect.getsource(r.definition)


def traced(r: Recurrence) -> str:
    """The step, run on stand-ins: next states and output as expressions over named axes."""
    seen = trace(r.name, r.definition, r.states, r.inputs, ())
    lines = [
        f"{state.name}' = {print_expression(value)}"
        for state, value in zip(seen.states, seen.next_states, strict=True)
    ]
    return "\n".join([*lines, f"o  = {print_expression(seen.output)}"])


def ir(r: Recurrence) -> str:
    """Proved micro-steps, each with the line it came from. The text parses back."""
    return str(r.ir)


def analysis(r: Recurrence) -> str:
    """What was proved of the transition, and the line that prevents a better form."""
    return str(r.transition)


def lowering(r: Recurrence) -> str:
    """The body of one chunk, and its adjoint."""
    return render([stage for stage in of_program(r.ir) if stage[0] in ("chunk program", "adjoint")])


def triton(r: Recurrence) -> str:
    """The generated kernels for bf16 inputs, forward and backward. No GPU is needed to read them."""
    try:
        return kernels.source(r.ir, example(r, torch.bfloat16), None, None, Options())
    except NoChunkForm as reason:
        return f"none: {reason}"


def passes(r: Recurrence) -> str:
    """A model's graph before and after each pass; the recurrence is one marked node in it."""
    return explained(r, lambda title: title == "model graph" or title.startswith("pass "))


def backend(r: Recurrence) -> str:
    """What torch.compile's backend hands to the inner compiler: forward and backward graphs."""
    return explained(r, lambda title: "AOTAutograd" in title)


def runtime(r: Recurrence) -> str:
    """Who computes a call with these arguments on this machine."""
    return render(of_call(r.ir, example(r, torch.float32), Options()))


def example(r: Recurrence, dtype: torch.dtype) -> list[Tensor]:
    """Some inputs of the right shapes."""
    lead = {"token": (BATCH, LENGTH, HEADS), "head": (HEADS,)}
    return [
        torch.randn(lead[var.kind] + (SIZE,) * len(var.axes), dtype=dtype, requires_grad=True)
        for var in r.inputs
    ]


def explained(r: Recurrence, wanted: Callable[[str], bool]) -> str:
    def model(*inputs: Tensor) -> Tensor:
        return torch.nn.functional.silu(r(*inputs))

    page = lmoe.explain(model, *example(r, torch.float32))
    return render([stage for stage in page.stages if wanted(stage[0])])


STOPS: tuple[tuple[str, Callable[[Recurrence], str]], ...] = (
    ("@recurrence", definition),
    ("trace", traced),
    ("recurrence IR", ir),
    ("analysis", analysis),
    ("lowering", lowering),
    ("Triton source", triton),
    ("FX passes", passes),
    ("backend", backend),
    ("runtime", runtime),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variant", choices=RECURRENCES, nargs="?", default="gated_delta_rule")
    parser.add_argument("--stop", type=int, choices=range(1, len(STOPS) + 1), help="only this one")
    chosen = parser.parse_args()
    for number, (name, show) in enumerate(STOPS, 1):
        if chosen.stop in (None, number):
            print(f"[{number}] {name}: {inspect.getdoc(show)}\n")
            print(show(RECURRENCES[chosen.variant]).rstrip() + "\n")


if __name__ == "__main__":
    main()
