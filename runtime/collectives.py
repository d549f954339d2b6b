"""Functional collectives as compiled graphs have them, under one name in torch 2.11 to 2.13.

A start and its wait are separate calls, so whatever stands between them in a graph runs while data
moves. The ops carry autograd (all-gather and reduce-scatter, all-to-all and itself). Operands are
made contiguous here: the collectives need it. Groups are names, which are text in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops._c10d_functional


def wait(x: Tensor) -> Tensor:
    """The result of a started collective."""
    return _ops.wait_tensor(x)


def start_all_gather(x: Tensor, size: int, group: str) -> Tensor:
    """x [n, ...] of every rank -> [size * n, ...], in flight."""
    return _ops.all_gather_into_tensor(x.contiguous(), size, group)


def start_all_to_all(x: Tensor, out: Sequence[Any], in_: Sequence[Any], group: str) -> Tensor:
    """Rows of x, in_[j] of them to rank j; gives out[j] rows of each rank j, in flight."""
    return _ops.all_to_all_single(x.contiguous(), list(out), list(in_), group)


def start_even_all_to_all(x: Tensor, size: int, group: str) -> Tensor:
    """Rows of x [size * n, ...], n to each rank, in flight."""
    share = x.shape[0] // size
    return start_all_to_all(x, [share] * size, [share] * size, group)


def all_reduce(x: Tensor, group: str) -> Tensor:
    """Sum over ranks (its derivative is the sum over ranks too)."""
    return wait(_ops.all_reduce(x.contiguous(), "sum", group))


class _GlobalSum(torch.autograd.Function):
    """Sum over ranks of a value that all of them use alike: one loss, not one a rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _SumGradient(torch.autograd.Function):
    """Identity on a replicated parameter; its gradient is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None


class _SumRowsGradient(torch.autograd.Function):
    """Identity on a parameter of which ranks have some rows in common; their gradient is summed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, spans: tuple[tuple[int, int], ...], group: str
    ) -> Tensor:
        ctx.dim, ctx.spans, ctx.group = dim, spans, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows = torch.cat([grad.narrow(ctx.dim, a, b - a) for a, b in ctx.spans], ctx.dim)
        sums = all_reduce(rows, ctx.group).split([b - a for a, b in ctx.spans], ctx.dim)
        parts, end = [], 0
        for (a, b), total in zip(ctx.spans, sums, strict=True):
            parts += [grad.narrow(ctx.dim, end, a - end), total]
            end = b
        parts.append(grad.narrow(ctx.dim, end, grad.shape[ctx.dim] - end))
        return torch.cat(parts, ctx.dim), None, None, None


class _SumCopiesGradient(torch.autograd.Function):
    """Identity on one of the parts of a parameter; its gradient is summed over the ranks with the same one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, part: Tensor, parts: int, group: str) -> Tensor:
        ctx.save_for_backward(part)
        ctx.parts, ctx.group = parts, group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (part,) = ctx.saved_tensors
        own = grad.unsqueeze(0)
        # All parts at once: they are few and small, and need no groups of their own.
        each = own.new_zeros(ctx.parts, *grad.shape).index_copy(0, part, own)
        return all_reduce(each, ctx.group).index_select(0, part).squeeze(0), None, None, None


def global_sum(x: Tensor, group: str) -> Tensor:
    """Forward: sum over ranks. Backward: identity, since every rank holds the same derivative of
    the one result.
    """
    return _GlobalSum.apply(x, group)


def sum_gradient(x: Tensor, group: str) -> Tensor:
    """Forward: identity. Backward: sum over ranks."""
    return _SumGradient.apply(x, group)


def sum_rows_gradient(
    x: Tensor, dim: int, spans: tuple[tuple[int, int], ...], group: str
) -> Tensor:
    """Forward: identity. Backward: sum over ranks within `spans` (start, stop) of dimension `dim`."""
    return _SumRowsGradient.apply(x, dim, spans, group)


def sum_copies_gradient(x: Tensor, part: Tensor, parts: int, group: str) -> Tensor:
    """Forward: identity. Backward: sum over the ranks that have part `part` [1] of so many parts."""
    return _SumCopiesGradient.apply(x, part, parts, group)
