"""The affine map of a span of tokens, S_out = M S_in + E, by scans of programs derived from the recurrence.

E is the final state from zeros. M is the final state of the recurrence without its writes, from the identity: ones
where M acts entry by entry (a scalar, a diagonal, the state's own shape), else the unit matrix, whose
columns take the place of the values. Both are scans, so their gradients are scan_backward's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.ir.nodes import Program, Step, Var, const, make

# (derived program, inputs, initial states) -> the last document's final states, and the gradients of the inputs from
# those of the final states. What a document that does not fill the span starts from is zero, or its result is not used.
Finals = Callable[[Program, Sequence[Tensor], list[Tensor]], list[Tensor]]
Pullback = Callable[[Program, Sequence[Tensor], list[Tensor], list[Tensor]], list[Tensor]]


@cache
def ends_program(program: Program) -> Program:
    """The recurrence without reads or output. No coefficient of a program with a span map is read from a state."""
    return replace(program, body=_steps(program), output=const(0))


@cache
def counted_program(program: Program) -> Program:
    """A derived program with one more input, a number a token, which every write is multiplied by.

    Where it is zero, a state that is zero stays zero, whatever decays and feedbacks do.
    """
    names = {var.name for var in (*program.inputs, *program.states)}
    name = "counts"
    while name in names:
        name += "_"
    counts = Var(name, "token", ())
    steps = tuple(
        replace(
            step,
            writes=tuple(replace(w, value=make("mul", counts.node, w.value)) for w in step.writes),
        )
        for step in _steps(program)
    )
    return replace(program, inputs=(*program.inputs, counts), body=steps)


@cache
def map_program(program: Program, state: str, axes: tuple[str, ...]) -> Program:
    """One state's decays and feedbacks alone, on a state of the axes of M."""
    steps = tuple(replace(step, writes=()) for step in _steps(program) if step.state == state)
    var = next(var for var in program.states if var.name == state)
    return replace(
        program, states=(Var(state, "state", axes, var.loc),), body=steps, output=const(0)
    )


def span_map(
    program: Program, inputs: Sequence[Tensor], cu_seqlens: Tensor | None, finals: Finals
) -> tuple[list[Tensor | None], list[Tensor]]:
    """M per state, None for the identity, and E per state, of the last document's part of the span.

    Where that document begins is never read: packed layouts cost no wait for the device.
    """
    sizes = layout.measure(program, inputs, (), None)
    maps: list[Tensor | None] = []
    for var, axes in zip(program.states, layout.map_axes(program), strict=True):
        maps.append(None)
        if axes is not None:
            start = _identity(axes, sizes, inputs[0])
            (m,) = finals(map_program(program, var.name, axes), inputs, [start])
            maps[-1] = _if_whole(m, cu_seqlens)
    return maps, finals(ends_program(program), inputs, _zeros(program, sizes, inputs[0]))


def span_map_backward(
    program: Program,
    inputs: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    d_maps: Sequence[Tensor | None],
    d_ends: Sequence[Tensor | None],
    pullback: Pullback,
) -> list[Tensor]:
    """Gradients of the inputs, zero before the last document."""
    sizes = layout.measure(program, inputs, (), None)
    zeros = _zeros(program, sizes, inputs[0])
    ends = [torch.zeros_like(z) if d is None else d for z, d in zip(zeros, d_ends, strict=True)]
    grads = pullback(ends_program(program), inputs, zeros, ends)
    for var, axes, d in zip(program.states, layout.map_axes(program), d_maps, strict=True):
        if axes is not None and d is not None:
            start = _identity(axes, sizes, inputs[0])
            derived = map_program(program, var.name, axes)
            parts = pullback(derived, inputs, [start], [_if_whole(d, cu_seqlens)])
            grads = [grad + part for grad, part in zip(grads, parts, strict=True)]
    return grads


def last_document(
    program: Program, inputs: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[Program, list[Tensor]]:
    """Program and inputs whose final states over the whole span are `Finals`: only the last document writes."""
    if cu_seqlens is None or not any(step.writes for step in _steps(program)):
        return program, list(inputs)
    like = inputs[layout.first_token(program)]
    position = torch.arange(like.shape[1], device=like.device)
    counts = (position >= cu_seqlens[-2]).to(like.dtype)
    counts = counts[None, :, None].expand(like.shape[0], -1, 1)
    return counted_program(program), [*inputs, counts]


def _if_whole(m: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """M, or zero where a document begins inside the span: it has seen nothing of what came before.

    Documents without tokens ahead of it are no boundary: a shard's offsets have them.
    """
    return m if cu_seqlens is None else torch.where(cu_seqlens[-2] == 0, m, 0.0)


def _steps(program: Program) -> tuple[Step, ...]:
    return tuple(item for item in program.body if isinstance(item, Step))


def _identity(axes: tuple[str, ...], sizes: layout.Sizes, like: Tensor) -> Tensor:
    """[B, H, *axes]: the unit matrix where an axis is paired with its primed one, else ones."""
    shape = sizes.map(axes)
    if not any(axis.endswith("'") for axis in axes):
        return like.new_ones(shape, dtype=sizes.accumulate)
    return torch.eye(shape[-1], dtype=sizes.accumulate, device=like.device).expand(shape)


def _zeros(program: Program, sizes: layout.Sizes, like: Tensor) -> list[Tensor]:
    return [like.new_zeros(sizes.map(var.axes), dtype=sizes.accumulate) for var in program.states]
