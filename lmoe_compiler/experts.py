"""A sparse expert block as one marked op, and the grouped matmul below it.

In: tokens [N, D], their k chosen experts and weights, one 3-D weight per projection. Out: [N, D].
`lmoe::experts` is the mark that passes look for: one node in Dynamo's graph. It is composite, so
eager and AOTAutograd see `swiglu_experts` without anybody's help, and an expert-parallel pass
splices another function. Below it four ops, closed under differentiation:

    op                  computes                                     backward is made of
    dispatch            rows of tokens in order of their expert      collect
    collect             rows back to tokens, k summed in order       dispatch
    grouped_mm          a[rows of e] @ b[e]                          grouped_mm, grouped_mm_weight
    grouped_mm_weight   a[rows of e]^T @ d[rows of e], per e         grouped_mm

The fast path reads no value on the host: shapes do not depend on the routing (dropless). A second
mark, `lmoe::dropped_rows`, stands for what the experts of these choices leave out: nothing here, and
what capacity.py says where the compiler was asked for a fixed capacity.
Notation: N tokens, k experts per token, M = N k rows, E experts, D hidden size, F expert size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.flops import flop_formula

# torch's own grouped matmul wants every row to start on a 16-byte boundary.
_ALIGNMENT = 16
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("lmoe", "FRAGMENT")
_LIBRARY.define(
    "experts(Tensor x, Tensor weights, Tensor ids, Tensor gate_up, Tensor down) -> Tensor"
)
_LIBRARY.define("dropped_rows(Tensor ids, int num_experts) -> Tensor")


def _native(*operands: Tensor) -> bool:
    return all(
        x.dtype in _NATIVE_DTYPES
        and x.shape[-1] * x.element_size() % _ALIGNMENT == 0
        and x.numel() > 0
        for x in operands
    )


def _major(x: Tensor) -> Tensor:
    """Last two axes dense in one order or the other, which is what torch's kernel reads."""
    return x if x.is_contiguous() or x.transpose(-1, -2).is_contiguous() else x.contiguous()


@torch.library.custom_op("lmoe::grouped_mm", mutates_args=())
def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Each group of rows of a [M, K] times its own b[e], b [E, K, N]; offsets [E]: groups' ends."""
    if _native(a, b, b.transpose(-1, -2)):
        return torch._grouped_mm(_major(a), _major(b), offs=offsets).contiguous()
    out = a.new_zeros(a.shape[0], b.shape[-1])
    for expert, (start, end) in enumerate(_spans(offsets)):
        torch.mm(a[start:end], b[expert], out=out[start:end])
    return out


@torch.library.custom_op("lmoe::grouped_mm_weight", mutates_args=())
def grouped_mm_weight(a: Tensor, d: Tensor, offsets: Tensor) -> Tensor:
    """Per group a[rows of e]^T @ d[rows of e], a [M, K], d [M, N] -> [E, K, N]; 0 if empty."""
    if _native(a, d):
        return torch._grouped_mm(_major(a).t(), _major(d), offs=offsets).contiguous()
    out = a.new_zeros(offsets.shape[0], a.shape[1], d.shape[1])
    for expert, (start, end) in enumerate(_spans(offsets)):
        torch.mm(a[start:end].t(), d[start:end], out=out[expert])
    return out


@torch.library.custom_op("lmoe::dispatch", mutates_args=())
def dispatch(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Row i is x[order[i] // k]: tokens [N, D] copied to rows [N k, D], sorted by expert."""
    return x.index_select(0, order // k)


@torch.library.custom_op("lmoe::collect", mutates_args=())
def collect(y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Sum each token's k rows, [N k, D] -> [N, D], in the order of its choices (no atomics)."""
    return y.index_select(0, inverse).view(-1, k, y.shape[-1]).sum(1)


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


@grouped_mm.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[-1])


@grouped_mm_weight.register_fake
def _(a: Tensor, d: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0], a.shape[1], d.shape[1])


@dispatch.register_fake
def _(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    return x.new_empty(order.shape[0], x.shape[1])


@collect.register_fake
def _(y: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    return y.new_empty(y.shape[0] // k, y.shape[1])


class _Context:
    """What torch hands to setup_context and backward (typed here because torch does not)."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class Permutation(_Context):
    """Of an op (rows, index there, index back, k)."""

    k: int


def _save_three(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_mm_backward(ctx: _Context, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b, offsets = ctx.saved_tensors
    d_a = grouped_mm(d_out, b.transpose(-1, -2), offsets) if ctx.needs_input_grad[0] else None
    d_b = grouped_mm_weight(a, d_out, offsets) if ctx.needs_input_grad[1] else None
    return d_a, d_b, None


def _grouped_mm_weight_backward(
    ctx: _Context, d_out: Tensor
) -> tuple[Tensor | None, Tensor | None, None]:
    a, d, offsets = ctx.saved_tensors
    d_a = grouped_mm(d, d_out.transpose(-1, -2), offsets) if ctx.needs_input_grad[0] else None
    d_d = grouped_mm(a, d_out, offsets) if ctx.needs_input_grad[1] else None
    return d_a, d_d, None


def save_permutation(
    ctx: Permutation, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor
) -> None:
    """Keep both indices for the backward, which goes the other way."""
    _, order, inverse, ctx.k = inputs
    ctx.save_for_backward(order, inverse)


def _dispatch_backward(ctx: Permutation, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    return collect(d_out, *ctx.saved_tensors, ctx.k), None, None, None


def _collect_backward(ctx: Permutation, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    return dispatch(d_out, *ctx.saved_tensors, ctx.k), None, None, None


grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_three)
grouped_mm_weight.register_autograd(_grouped_mm_weight_backward, setup_context=_save_three)
dispatch.register_autograd(_dispatch_backward, setup_context=save_permutation)
collect.register_autograd(_collect_backward, setup_context=save_permutation)

for _op in ("lmoe::grouped_mm", "lmoe::grouped_mm_weight"):
    for _device in ("cpu", "cuda"):
        torch.library.register_autocast(_op, _device, torch.bfloat16)


@flop_formula(torch.ops.lmoe.grouped_mm)
def _grouped_mm_flops(
    a: Sequence[int], b: Sequence[int], offsets: Sequence[int], **_: object
) -> int:
    return 2 * a[0] * math.prod(b[1:])


@flop_formula(torch.ops.lmoe.grouped_mm_weight)
def _grouped_mm_weight_flops(
    a: Sequence[int], d: Sequence[int], offsets: Sequence[int], **_: object
) -> int:
    return 2 * math.prod(a) * d[1]


def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, k] -> order [N k] (by expert, ties by token), its inverse, groups' ends [E] int32."""
    by_expert, order = ids.reshape(-1).sort(stable=True)
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    experts = torch.arange(num_experts, device=ids.device)
    return order, inverse, torch.searchsorted(by_expert, experts, right=True).to(torch.int32)


def swiglu_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """out[n] = sum_j weights[n, j] * down[e] (silu(gate[e] x[n]) * up[e] x[n]) with e = ids[n, j].

    x [N, D], weights and ids [N, k], gate_up [E, 2F, D] (gate rows first), down [E, D, F];
    the result is [N, D] in x's dtype.
    """
    k = ids.shape[-1]
    order, inverse, offsets = sort_by_expert(ids, gate_up.shape[0])
    rows = dispatch(x, order, inverse, k)
    gate, up = grouped_mm(rows, gate_up.transpose(-1, -2), offsets).chunk(2, dim=-1)
    y = grouped_mm(F.silu(gate) * up, down.transpose(-1, -2), offsets)
    y = y * weights.reshape(-1).gather(0, order).unsqueeze(-1).to(y.dtype)
    out: Tensor = collect(y, order, inverse, k)
    return out.to(x.dtype)


def _nothing_dropped(ids: Tensor, num_experts: int) -> Tensor:
    return ids.new_zeros(num_experts)


_LIBRARY.impl("experts", swiglu_experts, "CompositeImplicitAutograd")
_LIBRARY.impl("dropped_rows", _nothing_dropped, "CompositeImplicitAutograd")


def experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`swiglu_experts` as the marked op `lmoe::experts`: what models call."""
    out: Tensor = torch.ops.lmoe.experts(x, weights, ids, gate_up, down)
    return out


def dropped_rows(ids: Tensor, num_experts: int) -> Tensor:
    """Rows that `experts` leaves out of ids [N, k], per expert: [E] int64.

    Zeros, unless the model is compiled with `expert_capacity`. The mark `lmoe::dropped_rows`.
    """
    dropped: Tensor = torch.ops.lmoe.dropped_rows(ids, num_experts)
    return dropped
