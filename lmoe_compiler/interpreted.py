"""The program interpreted token by token and differentiated by torch: the ops' `implementation="reference"`.

Slow, and short enough to be believed: the oracle of the other implementations behind the same ops, and of the passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.config import Options
from lmoe_compiler.ir import interpret
from lmoe_compiler.ir.nodes import Program, Var
from lmoe_compiler.layout import Saved, Tensors


def scan(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> Saved:
    output, finals = _run(program, inputs, states, cu_seqlens)
    return output, finals, []


def scan_backward(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    saved: Tensors,
    d_output: Tensor,
    d_states: Sequence[Tensor | None],
    options: Options,
) -> tuple[list[Tensor], list[Tensor] | None]:
    with autograd_inside_an_op():
        leaves = [x.detach().requires_grad_() for x in (*inputs, *(states or ()))]
        given, initial = leaves[: len(inputs)], leaves[len(inputs) :]
        output, finals = _run(program, given, initial or None, cu_seqlens)
        grads = _vjp([output, *finals], [d_output, *d_states], leaves)
    return grads[: len(inputs)], grads[len(inputs) :] if states else None


def step(
    program: Program, inputs: Tensors, states: Tensors | None, options: Options
) -> tuple[Tensor, list[Tensor]]:
    rows = [
        x.unsqueeze(1) if var.kind == "token" else x
        for var, x in zip(program.inputs, inputs, strict=True)
    ]
    output, finals = _run(program, rows, states, None)
    return output.squeeze(1).contiguous(), finals


def step_(program: Program, inputs: Tensors, states: Tensors, options: Options) -> Tensor:
    output, finals = step(program, inputs, states, options)
    for state, new in zip(states, finals, strict=True):
        state.copy_(new)
    return output


def span_map(
    program: Program, inputs: Tensors, cu_seqlens: Tensor | None, options: Options
) -> tuple[list[Tensor | None], list[Tensor]]:
    """E is the final state from zeros; a column of M is what one unit of the entry state adds to it."""
    return _span_map(program, inputs, cu_seqlens)


def span_map_backward(
    program: Program,
    inputs: Tensors,
    cu_seqlens: Tensor | None,
    d_maps: Sequence[Tensor | None],
    d_ends: Sequence[Tensor | None],
    options: Options,
) -> list[Tensor]:
    with autograd_inside_an_op():
        leaves = [x.detach().requires_grad_() for x in inputs]
        maps, ends = _span_map(program, leaves, cu_seqlens)
        present = [m for m in maps if m is not None]
        return _vjp([*present, *ends], [*(d for d in d_maps if d is not None), *d_ends], leaves)


def _run(
    program: Program, inputs: Tensors, states: Tensors | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Computed in the states' dtype, returned in the layouts and dtypes of the op."""
    sizes = layout.measure(program, inputs, states or (), cu_seqlens)
    wide = [x.to(sizes.accumulate) for x in inputs]
    output, finals = interpret.run(program, wide, states, cu_seqlens)
    output = output.expand(sizes.output(program)).to(sizes.dtype)
    return output.contiguous(), [x.clone(memory_format=torch.contiguous_format) for x in finals]


def _span_map(
    program: Program, inputs: Tensors, cu_seqlens: Tensor | None
) -> tuple[list[Tensor | None], list[Tensor]]:
    axes = layout.map_axes(program)
    if cu_seqlens is not None:
        start = int(cu_seqlens[-2])
        inputs = [
            x[:, start:] if var.kind == "token" else x
            for var, x in zip(program.inputs, inputs, strict=True)
        ]
    sizes = layout.measure(program, inputs, (), None)
    zeros = [
        inputs[0].new_zeros(sizes.state(var), dtype=sizes.accumulate) for var in program.states
    ]
    _, ends = _run(program, inputs, zeros, None)
    # A document that began inside the span has seen nothing of what came before; documents
    # without tokens ahead of it are no boundary (a shard's offsets have them).
    carried = 0 if cu_seqlens is not None and start > 0 else 1
    maps: list[Tensor | None] = []
    for i, (var, own) in enumerate(zip(program.states, axes, strict=True)):
        if own is None:
            maps.append(None)
            continue
        columns = []
        for unit in _units(var, own, zeros[i]):
            _, moved = _run(program, inputs, [*zeros[:i], unit, *zeros[i + 1 :]], None)
            change = moved[i] - ends[i]
            for position in reversed(range(len(var.axes))):
                if var.axes[position] not in own:
                    change = change.select(2 + position, 0)
            columns.append(change)
        dense = any(axis.endswith("'") for axis in own)
        m = torch.stack(columns, -1) if dense else columns[0]
        maps.append((m * carried).contiguous())
    return maps, ends


def _units(var: Var, axes: tuple[str, ...], zero: Tensor) -> Iterator[Tensor]:
    """Entry states that show M: all ones where it acts entry by entry, else one row at a time."""
    dense = [axis[:-1] for axis in axes if axis.endswith("'")]
    if not dense:
        yield torch.ones_like(zero)
        return
    dim = 2 + var.axes.index(dense[0])
    for j in range(zero.shape[dim]):
        unit = torch.zeros_like(zero)
        unit.select(dim, j).fill_(1)
        yield unit


def _vjp(
    results: Sequence[Tensor], d_results: Sequence[Tensor | None], leaves: list[Tensor]
) -> list[Tensor]:
    pairs = [
        (result, d)
        for result, d in zip(results, d_results, strict=True)
        if d is not None and result.requires_grad
    ]
    if not pairs:
        return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in leaves]
    grads = torch.autograd.grad(
        [result for result, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True
    )
    return [
        x.new_zeros(x.shape) if grad is None else grad.contiguous()
        for x, grad in zip(leaves, grads, strict=True)
    ]


@contextmanager
def autograd_inside_an_op() -> Iterator[None]:
    """The dispatcher switches autograd off in the body of an op; here torch's own is needed."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield
