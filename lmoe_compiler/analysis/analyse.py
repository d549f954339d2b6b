"""From a traced step to a Program."""

from __future__ import annotations

from collections.abc import Sequence

from lmoe_compiler.ir.nodes import Bound, Next, Program, Read, substitute
from lmoe_compiler.trace import Traced


def analyse(traced: Traced, bounds: Sequence[Bound]) -> Program:
    names = tuple(v.name for v in traced.states)
    body = Next(names, traced.next_states, "nonlinear")
    old = tuple(Read(f"{v.name}_old", v.name, None, v.axes) for v in traced.states)
    new = tuple(Read(f"{v.name}_new", v.name, None, v.axes) for v in traced.states)
    values = dict(zip(traced.next_states, (r.node for r in new), strict=True))
    values |= {
        v.node: r.node for v, r in zip(traced.states, old, strict=True) if v.node not in values
    }
    output = substitute(traced.output, values)
    return Program(
        traced.name, traced.states, traced.inputs, (*old, body, *new), output, tuple(bounds), traced.static,
    )  # fmt: skip
