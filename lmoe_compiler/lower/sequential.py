"""Every program, token by token: what runs a state that has no chunk form, and a single decode step.

The backward keeps the states of every 64th token, walks the spans between them in reverse, and lets torch
differentiate the interpreter over one span at a time: memory for T / 64 states and 64 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lmoe_compiler.interpreted import autograd_inside_an_op
from lmoe_compiler.ir.interpret import Value, run, run_token
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.layout import Sizes
from lmoe_compiler.lower.rows import widened

SPAN = 64


def scan(
    program: Program,
    sizes: Sizes,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, T, H, *axes] and final states; `states` in the dtype of accumulation."""
    output, finals = run(program, _wide(inputs, sizes), states, cu_seqlens)
    whole = output.expand(sizes.output(program)).to(sizes.dtype)
    return whole.contiguous(), [x.clone(memory_format=torch.contiguous_format) for x in finals]


def scan_backward(
    program: Program,
    sizes: Sizes,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    d_output: Tensor,
    d_states: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the inputs, in the dtype of accumulation, and of the initial states."""
    wide = _wide(inputs, sizes)
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in wide]
    if cu_seqlens is None:
        return grads, _document(program, wide, states, d_output, d_states, grads, 0)
    bounds: list[int] = cu_seqlens.tolist()
    starts = []
    for n, (start, stop) in enumerate(pairwise(bounds)):
        tokens = _cut(program, wide, slice(start, stop))
        own, ends = [x[n : n + 1] for x in states], [d[n : n + 1] for d in d_states]
        starts.append(_document(program, tokens, own, d_output[:, start:stop], ends, grads, start))
    return grads, [torch.cat(parts) for parts in zip(*starts, strict=True)]


def _document(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    d_output: Tensor,
    d_states: Sequence[Tensor],
    grads: Sequence[Tensor],
    offset: int,
) -> list[Tensor]:
    """Adds to `grads`, in which these rows start at `offset`, and returns the initial states' gradients."""
    length = d_output.shape[1]
    spans = [slice(a, min(a + SPAN, length)) for a in range(0, length, SPAN)]
    entries = [list(states)]
    for span in spans[:-1]:
        entries.append(run(program, _cut(program, inputs, span), entries[-1])[1])
    carried = list(d_states)
    for span, entry in zip(reversed(spans), reversed(entries), strict=bool(spans)):
        d_inputs, carried = _span(
            program, _cut(program, inputs, span), entry, d_output[:, span], carried
        )
        for var, grad, d in zip(program.inputs, grads, d_inputs, strict=True):
            if var.kind == "token":
                grad[:, offset + span.start : offset + span.stop] = d
            else:
                grad += d
    return carried


def _span(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    d_output: Tensor,
    d_states: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    with autograd_inside_an_op():
        leaves = [x.detach().requires_grad_() for x in (*inputs, *states)]
        tokens, entry = leaves[: len(inputs)], leaves[len(inputs) :]
        output, finals = run(program, tokens, entry)
        pairs = [
            (y, d.to(y.dtype).expand_as(y))
            for y, d in zip(
                (output.expand(d_output.shape), *finals), (d_output, *d_states), strict=True
            )
            if y.requires_grad
        ]
        grads = (
            torch.autograd.grad(
                [y for y, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True
            )
            if pairs
            else [None] * len(leaves)
        )
    filled = [torch.zeros_like(x) if d is None else d for x, d in zip(leaves, grads, strict=True)]
    return filled[: len(inputs)], filled[len(inputs) :]


def token(
    program: Program, sizes: Sizes, inputs: Sequence[Tensor], states: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One step: inputs [B, H, *axes], output [B, H, *axes], next states."""
    tokens = {
        var.name: Value(widened(x, x.dim() - len(var.axes) - 1, sizes.heads), var.axes)
        for var, x in zip(program.inputs, _wide(inputs, sizes), strict=True)
    }
    now = {var.name: Value(x, var.axes) for var, x in zip(program.states, states, strict=True)}
    output, following = run_token(program, tokens, now)
    whole = output.to(program.output.axes).expand(sizes.output(program)).to(sizes.dtype)
    finals = [
        following[var.name].to(var.axes).expand_as(x)
        for var, x in zip(program.states, states, strict=True)
    ]
    return whole.contiguous(), finals


def _wide(inputs: Sequence[Tensor], sizes: Sizes) -> list[Tensor]:
    return [x.to(sizes.accumulate) for x in inputs]


def _cut(program: Program, inputs: Sequence[Tensor], span: slice) -> list[Tensor]:
    return [
        x[:, span] if var.kind == "token" else x
        for var, x in zip(program.inputs, inputs, strict=True)
    ]
