"""Experts with a fixed number of places: shapes depend on sizes alone, so that nothing is read on
the host and a CUDA graph can hold the layer. What finds no place is left out, and counted.

Each expert has C = ceil(factor * N k / E) places for the rows of N tokens, and takes the first C in
the order of tokens, then of a token's choices. Not by router weight: a later token would then push
an earlier one out, and the past would depend on the future. A row without a place adds nothing to
its token and gets no gradient; weights of the other choices stay as they are.

    op       computes                                            backward is made of
    place    rows of tokens in their places, zeros where none    pick
    pick     rows back to tokens, k summed in order              place

With places for all of them the result is that of experts.py. Notation: N tokens, k experts per
token, M = N k rows, E experts, C places of each, S = E C, D hidden size, F expert size.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.experts import Permutation, save_permutation, sort_by_expert


class Places(NamedTuple):
    """Which row is in which place, both ways; -1 for none."""

    source: Tensor  # [S] row in each place, by expert
    slot: Tensor  # [M] place of each row


def capacity(rows: int, num_experts: int, factor: float) -> int:
    """Places of an expert, ceil(factor * rows / E), in exact arithmetic on the factor as written."""
    exact = Fraction(str(factor))
    return -(-rows * exact.numerator // (num_experts * exact.denominator))


def places(ids: Tensor, num_experts: int, factor: float) -> Places:
    """The places of the rows that ids [N, k] asks for."""
    count = capacity(ids.numel(), num_experts, factor)
    order, inverse, ends = sort_by_expert(ids, num_experts)
    starts = F.pad(ends, (1, -1)).to(torch.int64)
    chosen = ids.reshape(-1)
    turn = inverse - starts.index_select(0, chosen)
    slot = torch.where(turn < count, chosen * count + turn, -1)
    turns = starts.unsqueeze(1) + torch.arange(count, device=ids.device)
    filled = turns < ends.unsqueeze(1)
    # The last turns of the last expert may lie behind the last row.
    row = order.index_select(0, turns.clamp_max(order.shape[0] - 1).flatten())
    return Places(torch.where(filled.flatten(), row, -1), slot)


def dropped_rows(ids: Tensor, num_experts: int, factor: float) -> Tensor:
    """Rows without a place, per expert: [E] int64."""
    count = capacity(ids.numel(), num_experts, factor)
    _, _, ends = sort_by_expert(ids, num_experts)
    return (F.pad(ends, (1, 0)).diff().to(torch.int64) - count).clamp_min(0)


@torch.library.custom_op("lmoe::place", mutates_args=())
def place(x: Tensor, source: Tensor, slot: Tensor, k: int) -> Tensor:
    """Place i has x[source[i] // k], or zeros: tokens [N, D] -> [S, D]."""
    if not x.shape[0]:
        return x.new_zeros(source.shape[0], x.shape[1])
    rows = x.index_select(0, source.clamp_min(0) // k)
    return rows.masked_fill_((source < 0).unsqueeze(1), 0)


@torch.library.custom_op("lmoe::pick", mutates_args=())
def pick(y: Tensor, source: Tensor, slot: Tensor, k: int) -> Tensor:
    """Sum each token's k rows, or those that have a place, [S, D] -> [N, D], in the order of its
    choices (no atomics).
    """
    if not y.shape[0]:
        return y.new_zeros(slot.shape[0] // k, y.shape[1])
    rows = y.index_select(0, slot.clamp_min(0)).masked_fill_((slot < 0).unsqueeze(1), 0)
    return rows.view(-1, k, y.shape[-1]).sum(1)


@place.register_fake
def _(x: Tensor, source: Tensor, slot: Tensor, k: int) -> Tensor:
    return x.new_empty(source.shape[0], x.shape[1])


@pick.register_fake
def _(y: Tensor, source: Tensor, slot: Tensor, k: int) -> Tensor:
    return y.new_empty(slot.shape[0] // k, y.shape[1])


def _place_backward(ctx: Permutation, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    return pick(d_out, *ctx.saved_tensors, ctx.k), None, None, None


def _pick_backward(ctx: Permutation, d_out: Tensor) -> tuple[Tensor, None, None, None]:
    return place(d_out, *ctx.saved_tensors, ctx.k), None, None, None


place.register_autograd(_place_backward, setup_context=save_permutation)
pick.register_autograd(_pick_backward, setup_context=save_permutation)


def batched_swiglu(rows: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down[e] (silu(gate[e] x) * up[e] x) for the rows [E, R, D] of every expert."""
    gate, up = torch.bmm(rows, gate_up.transpose(-1, -2)).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate) * up, down.transpose(-1, -2))


def weighted_sum(y: Tensor, weights: Tensor, source: Tensor, slot: Tensor, x: Tensor) -> Tensor:
    """Places y [S, D] and weights [N, k] -> each token's sum, [N, D] in x's dtype."""
    rows: Tensor = pick(y, source, slot, 1)
    rows = rows * weights.reshape(-1, 1).to(rows.dtype)
    return rows.unflatten(0, weights.shape).sum(1).to(x.dtype)


def swiglu_experts(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor, *, factor: float
) -> Tensor:
    """`experts.swiglu_experts` with a capacity factor: same operands, same result where every row
    has a place.
    """
    num_experts = gate_up.shape[0]
    source, slot = places(ids, num_experts, factor)
    rows: Tensor = place(x, source, slot, ids.shape[-1])
    # The number of places is spelled out: with no token at all it cannot be inferred.
    count = capacity(ids.numel(), num_experts, factor)
    y = batched_swiglu(rows.view(num_experts, count, x.shape[-1]), gate_up, down)
    return weighted_sum(y.flatten(0, 1), weights, source, slot, x)
