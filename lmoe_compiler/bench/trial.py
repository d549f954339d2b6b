"""Tries plans one after another in one process: each is checked against float64, then timed. One JSON line a trial.

python -m lmoe_compiler.bench.trial '{"op": .., "shape": .., "direction": .., "what": "check", "choices": [..]}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.bench.measure import median_us, relative_rms
from lmoe_compiler.bench.workloads import WORKLOADS, Shape, Workload, make_inputs
from lmoe_compiler.codegen import run, tuned
from lmoe_compiler.codegen.plan import Choice
from lmoe_compiler.models import RECURRENCES


def check_shape(shape: Shape, choice: Choice) -> Shape:
    """A short call that still has two spans of two chunks at least, and a ragged end."""
    return 1, max(256, 2 * choice.span) + 7, 2, shape[3]


def calls(
    workload: Workload, shape: Shape, direction: str
) -> tuple[Callable[[], list[Tensor]], dict[str, Tensor], Tensor]:
    """What is tried: the forward, or the backward alone (its forward has run once)."""
    recurrence = RECURRENCES[workload.name].with_options(implementation="triton")
    inputs = make_inputs(workload, shape, torch.bfloat16, "cuda")
    if direction == "forward":
        return lambda: [recurrence(**inputs).detach()], inputs, torch.empty(0)
    o = recurrence(**inputs)
    d_output = torch.randn_like(o)
    leaves = list(inputs.values())

    def backward() -> list[Tensor]:
        return list(torch.autograd.grad(o, leaves, d_output, retain_graph=True))

    return backward, inputs, d_output


def worst_error(workload: Workload, shape: Shape, direction: str) -> float:
    """The largest relative RMS error of an output or gradient against the definition in float64."""
    call, inputs, d_output = calls(workload, shape, direction)
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    o = RECURRENCES[workload.name].reference(*exact.values())
    expected = [o.detach()]
    if direction == "backward":
        expected = list(torch.autograd.grad(o, list(exact.values()), d_output.double()))
    return max(relative_rms(x, y) for x, y in zip(call(), expected, strict=True))


def attempt(workload: Workload, shape: Shape, direction: str, what: str, choice: Choice) -> float:
    run.forget()
    with tuned.forced(direction, choice):
        if what == "check":
            return worst_error(workload, check_shape(shape, choice), direction)
        with torch.set_grad_enabled(direction == "backward"):
            call = calls(workload, shape, direction)[0]
            return median_us(call, rep_ms=40)


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    workload, shape = WORKLOADS[task["op"]], tuple(task["shape"])
    for number, row in task["choices"]:
        print(json.dumps([number, "begin"]), flush=True)
        value = attempt(workload, shape, task["direction"], task["what"], tuned.decode(row))
        print(json.dumps([number, value]), flush=True)


if __name__ == "__main__":
    main()
