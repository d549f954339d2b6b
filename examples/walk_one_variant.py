"""Print what a recurrence is at every stop from the user's words to the compiled model.

python examples/walk_one_variant.py gated_delta_rule
python examples/walk_one_variant.py gla --stop 4
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable

from lmoe_compiler.definition import Recurrence
from lmoe_compiler.ir.text import print_expression
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.trace import trace


def definition(r: Recurrence) -> str:
    """What the user wrote: the step of one token of one head."""
    return inspect.getsource(r.definition)


def traced(r: Recurrence) -> str:
    """The step, run once on symbols: the next states and the output in named axes."""
    seen = trace(r.name, r.definition, r.states, r.inputs, ())
    lines = [
        f"{state.name}' = {print_expression(value)}"
        for state, value in zip(seen.states, seen.next_states, strict=True)
    ]
    return "\n".join([*lines, f"o  = {print_expression(seen.output)}"])


def ir(r: Recurrence) -> str:
    """The recurrence IR: proved micro-steps, each with the line it came from. It parses back."""
    return str(r.ir)


def analysis(r: Recurrence) -> str:
    """What was proved of the transition."""
    return str(r.transition)


STOPS: tuple[tuple[str, Callable[[Recurrence], str]], ...] = (
    ("@recurrence", definition),
    ("trace", traced),
    ("recurrence IR", ir),
    ("analysis", analysis),
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
