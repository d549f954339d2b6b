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
from lmoe_compiler.ir.nodes import Program, Step, Var, const

# (program, inputs, initial states) -> final states, and the gradients of the inputs from those of the final states.
Finals = Callable[[Program, Sequence[Tensor], list[Tensor]], list[Tensor]]
Pullback = Callable[[Program, Sequence[Tensor], list[Tensor], list[Tensor]], list[Tensor]]


@cache
def ends_program(program: Program) -> Program:
    """The recurrence without reads or output. No coefficient of a program with a span map is read from a state."""
    steps = tuple(item for item in program.body if isinstance(item, Step))
    return replace(program, body=steps, output=const(0))


@cache
def map_program(program: Program, state: str, axes: tuple[str, ...]) -> Program:
    """One state's decays and feedbacks alone, on a state of the axes of M."""
    steps = tuple(
        replace(item, writes=())
        for item in program.body
        if isinstance(item, Step) and item.state == state
    )
    var = next(var for var in program.states if var.name == state)
    return replace(
        program, states=(Var(state, "state", axes, var.loc),), body=steps, output=const(0)
    )


def span_map(
    program: Program, tokens: Sequence[Tensor], whole: bool | Tensor, finals: Finals
) -> tuple[list[Tensor | None], list[Tensor]]:
    """M per state, None for the identity, and E per state, of the span's last document.

    `whole` says (as a bool, or on the device) whether that document fills the span: else nothing is carried through.
    """
    sizes = layout.measure(program, tokens, (), None)
    maps: list[Tensor | None] = []
    for var, axes in zip(program.states, layout.map_axes(program), strict=True):
        maps.append(None)
        if axes is not None:
            start = _identity(axes, sizes, tokens[0])
            if whole is not False:
                (start,) = finals(map_program(program, var.name, axes), tokens, [start])
            maps[-1] = _where(whole, start)
    return maps, finals(ends_program(program), tokens, _zeros(program, sizes, tokens[0]))


def span_map_backward(
    program: Program,
    tokens: Sequence[Tensor],
    whole: bool | Tensor,
    d_maps: Sequence[Tensor | None],
    d_ends: Sequence[Tensor | None],
    pullback: Pullback,
) -> list[Tensor]:
    """Gradients of the tokens and head parameters."""
    sizes = layout.measure(program, tokens, (), None)
    zeros = _zeros(program, sizes, tokens[0])
    ends = [torch.zeros_like(z) if d is None else d for z, d in zip(zeros, d_ends, strict=True)]
    grads = pullback(ends_program(program), tokens, zeros, ends)
    for var, axes, d in zip(program.states, layout.map_axes(program), d_maps, strict=True):
        if axes is not None and d is not None and whole is not False:
            start = _identity(axes, sizes, tokens[0])
            derived = map_program(program, var.name, axes)
            parts = pullback(derived, tokens, [start], [_where(whole, d)])
            grads = [grad + part for grad, part in zip(grads, parts, strict=True)]
    return grads


def last_document(
    program: Program, inputs: Sequence[Tensor], cu_seqlens: Tensor | None
) -> tuple[list[Tensor], bool]:
    """The inputs of the last document's tokens, and whether it fills the span; offsets are read on the host.

    Documents without tokens ahead of it are no boundary: a shard's offsets have them.
    """
    if cu_seqlens is None:
        return list(inputs), True
    start = int(cu_seqlens[-2])
    tokens = [
        x[:, start:] if var.kind == "token" else x
        for var, x in zip(program.inputs, inputs, strict=True)
    ]
    return tokens, start == 0


def with_earlier_documents(inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a last document's tokens as those of all inputs: zero before it."""
    return [
        grad
        if grad.shape == x.shape
        else torch.cat((grad.new_zeros(x[:, : -grad.shape[1] or None].shape), grad), 1)
        for x, grad in zip(inputs, grads, strict=True)
    ]


def _where(whole: bool | Tensor, x: Tensor) -> Tensor:
    if isinstance(whole, bool):
        return x if whole else torch.zeros_like(x)
    return torch.where(whole, x, 0.0)


def _identity(axes: tuple[str, ...], sizes: layout.Sizes, like: Tensor) -> Tensor:
    """[B, H, *axes]: the unit matrix where an axis is paired with its primed one, else ones."""
    shape = sizes.map(axes)
    if not any(axis.endswith("'") for axis in axes):
        return like.new_ones(shape, dtype=sizes.accumulate)
    return torch.eye(shape[-1], dtype=sizes.accumulate, device=like.device).expand(shape)


def _zeros(program: Program, sizes: layout.Sizes, like: Tensor) -> list[Tensor]:
    return [like.new_zeros(sizes.map(var.axes), dtype=sizes.accumulate) for var in program.states]
