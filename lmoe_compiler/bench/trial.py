"""Tries plans one after another in one process: each is checked against float64, then timed. One JSON line a trial.

python -m lmoe_compiler.bench.trial <<< '{"op": .., "shape": .., "direction": .., "what": "check", "choices": [..]}'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.bench.decode import graphed_us
from lmoe_compiler.bench.measure import median_us, relative_rms
from lmoe_compiler.bench.workloads import WORKLOADS, Shape, Workload, make_inputs
from lmoe_compiler.codegen import run, tuned
from lmoe_compiler.codegen.plan import Choice
from lmoe_compiler.definition import Recurrence
from lmoe_compiler.models import RECURRENCES

STEPS = ("step", "step_")


def check_shape(shape: Shape, direction: str, choice: Choice) -> Shape:
    """A short call that still has two spans of two chunks at least, and a ragged end; of a step two sequences.

    With all heads, kernels are compiled for the timed call too; where spans are long, the reference takes memory.
    """
    _, _, heads, size = shape
    if direction in STEPS:
        return 2, 1, heads, size
    length = max(256, 2 * choice.span) + 7
    return 1, length, heads if length < 1024 else min(heads, 2), size


@dataclass
class Trial:
    """What is tried: the forward, the backward alone (its forward has run once), or a step from a given state."""

    recurrence: Recurrence
    direction: str
    inputs: dict[str, Tensor]
    states: list[Tensor]
    d_output: Tensor | None = None

    @classmethod
    def of(cls, workload: Workload, shape: Shape, direction: str, device: str = "cuda") -> Trial:
        recurrence = RECURRENCES[workload.name].with_options(implementation="triton")
        inputs = make_inputs(workload, shape, torch.bfloat16, device)
        batch, _, heads, size = shape
        states = [
            torch.randn(batch, heads, *(size for _ in var.axes), device=device)
            for var in recurrence.states
        ]
        return cls(recurrence, direction, inputs, states)

    def call(self) -> Callable[[], list[Tensor]]:
        recurrence, inputs = self.recurrence, self.inputs
        if self.direction == "forward":
            return lambda: [recurrence(**inputs).detach()]
        if self.direction == "backward":
            o = recurrence(**inputs)
            self.d_output = d_output = torch.randn_like(o)
            leaves = list(inputs.values())
            return lambda: list(torch.autograd.grad(o, leaves, d_output, retain_graph=True))
        kinds = {var.name: var.kind for var in recurrence.inputs}
        token = {
            n: (x[:, 0] if kinds[n] == "token" else x).detach().contiguous()
            for n, x in inputs.items()
        }
        state = self.states[0] if len(self.states) == 1 else tuple(self.states)
        inplace = self.direction == "step_"

        def step() -> list[Tensor]:
            o, following = recurrence.step(*token.values(), state=state, inplace=inplace)
            return [o, *([following] if isinstance(following, Tensor) else following)]

        return step

    def expected(self) -> list[Tensor]:
        """By the definition in float64, from the inputs and states as they are now."""
        exact = {n: x.detach().double().requires_grad_() for n, x in self.inputs.items()}
        reference = RECURRENCES[self.recurrence.name].reference
        if self.direction not in STEPS:
            o = reference(*exact.values())
            if self.d_output is None:
                return [o.detach()]
            d_output = self.d_output.double()
            return list(torch.autograd.grad(o, list(exact.values()), d_output))
        starts = [x.double() for x in self.states]
        start = starts[0] if len(starts) == 1 else tuple(starts)
        with torch.no_grad():
            o, ends = reference(*exact.values(), initial_state=start, return_state=True)
        return [o[:, 0], *([ends] if isinstance(ends, Tensor) else ends)]

    def worst_error(self) -> float:
        """The largest relative RMS error of an output, state or gradient."""
        call = self.call()
        expected = self.expected()
        return max(relative_rms(x, y) for x, y in zip(call(), expected, strict=True))


def attempt(workload: Workload, shape: Shape, direction: str, what: str, choice: Choice) -> float:
    run.forget()
    with tuned.forced(direction, choice):
        if what == "check":
            small = check_shape(shape, direction, choice)
            return Trial.of(workload, small, direction).worst_error()
        with torch.set_grad_enabled(direction == "backward"):
            call = Trial.of(workload, shape, direction).call()
            return graphed_us(call) if direction in STEPS else median_us(call, rep_ms=40)


def main() -> None:
    task: dict[str, Any] = json.load(sys.stdin)
    workload, shape = WORKLOADS[task["op"]], tuple(task["shape"])
    for number, row in task["choices"]:
        print(json.dumps([number, "begin"]), flush=True)
        value = attempt(workload, shape, task["direction"], task["what"], tuned.decode(row))
        print(json.dumps([number, value]), flush=True)


if __name__ == "__main__":
    main()
