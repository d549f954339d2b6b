"""The proof's check: the program, interpreted, against the step itself on random float64 inputs.

The algebra decides; this guards every compilation against a mistake in the algebra, for a few milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmoe_compiler.ir.interpret import Value, run_token
from lmoe_compiler.ir.nodes import Bound, Program, Var
from lmoe_compiler.ir.spec import base
from lmoe_compiler.trace import Traced, default_float

# A step may round to float32 on its way (`.float()`); a mistake in the algebra is of order one.
TOLERANCE = 1e-6
SIZES = (3, 4, 5, 2, 6, 7)


def check(traced: Traced, program: Program) -> Program:
    """The program, if it does to random numbers what the step does."""
    variables = (*traced.states, *traced.inputs)
    dims = dict.fromkeys(base(a) for v in variables for a in v.axes)
    sizes = dict(zip((d for d in dims if d not in dict(traced.static)), SIZES, strict=False))
    lengths = sizes | dict(traced.static)
    random = torch.Generator().manual_seed(0)
    bounds = {b.name: b for b in program.bounds}
    with torch.no_grad(), default_float(torch.float64):
        values = [_draw(v, lengths, bounds.get(v.name), random) for v in variables]
        expected = [x.double() for x in traced.step(*(x.clone() for x in values))]
    count = len(traced.states)
    named = {v.name: Value(x, v.axes) for v, x in zip(variables, values, strict=True)}
    states = {v.name: named.pop(v.name) for v in traced.states}
    output, new = run_token(program, named, states)
    found = [new[v.name].tensor for v in traced.states] + [output.tensor]
    labels = [*(f"state {v.name}" for v in traced.states), "output"]
    assert len(expected) == count + 1
    for label, x, y in zip(labels, found, expected, strict=True):
        _agree(program, label, x.expand(y.shape), y)
    return program


def _draw(
    var: Var, lengths: Mapping[str, int], bound: Bound | None, random: torch.Generator
) -> Tensor:
    shape = [lengths[base(a)] for a in var.axes]
    x = torch.randn(shape, dtype=torch.float64, generator=random)
    if bound is None:
        return x
    low, high = max(bound.low, -1e3), min(bound.high, 1e3)
    return low + (high - low) * torch.rand(shape, dtype=torch.float64, generator=random)


def _agree(program: Program, label: str, found: Tensor, expected: Tensor) -> None:
    """Where the step itself is finite, the two are the same."""
    known = expected.isfinite()
    gap = (found - expected)[known].abs().max().item() if known.any() else 0.0
    scale = 1 + expected[known].abs().max().item() if known.any() else 1.0
    assert gap <= TOLERANCE * scale, (
        f"internal error: the program proved for {program.name} differs from its step in the {label} by "
        f"{gap:.1e}; please report the step function with this program:\n{program}"
    )
