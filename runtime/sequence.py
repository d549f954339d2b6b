"""Where a shard of the sequence lies, as data of the graph: no value is read on the host.

Rank r holds tokens offset .. offset + T of the sequence; T may differ between ranks. `cu_seqlens`
is global and the same on every rank. Notation: P ranks, N documents, T tokens of this rank, H
heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.runtime import collectives


def number(x: Tensor, dims: list[int]) -> int:
    """Of tokens in x, which are along these axes."""
    return math.prod(x.shape[dim] for dim in dims)


def start_counts(x: Tensor, dims: list[int], size: int, group: str) -> Tensor:
    """Tell every rank how many tokens this one holds, along these axes of x. In flight."""
    own = torch.full((1,), number(x, dims), dtype=torch.int64, device=x.device)
    return collectives.start_all_gather(own, size, group)


def token_offset(counts: Tensor, rank: Tensor) -> Tensor:
    """counts [P], rank [1] -> [1]: tokens before this rank's first."""
    return (counts.cumsum(0) - counts).index_select(0, rank)


def global_count(counts: Tensor, factor: int) -> Tensor:
    """`factor` for each token of the whole sequence, as a float32 scalar."""
    return counts.sum().to(torch.float32) * factor


def local_documents(cu_seqlens: Tensor, offset: Tensor, x: Tensor) -> Tensor:
    """The documents' parts on this rank as offsets into x [B, T, ...]: [N+1]; absent ones are
    empty.
    """
    return (cu_seqlens - offset).clamp(0, x.shape[1]).to(torch.int32)


def shifted_documents(cu_seqlens: Tensor, offset: Tensor) -> Tensor:
    """Where the documents start and end, counted from this rank's first token: [N+1], any sign."""
    return (cu_seqlens - offset).to(torch.int32)


def last_document(cu_seqlens: Tensor, offset: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The last document on this rank: ([0, its start here, T] int32, [1] whether it began on an
    earlier rank).
    """
    length = x.shape[1]
    last = (offset + length - 1).to(cu_seqlens.dtype)
    # Not in cu_seqlens[1:]: on a GPU, Inductor (torch 2.11) searches in what a slice is a part of.
    document = torch.searchsorted(cu_seqlens, last, right=True).sub(1).clamp_min(0)
    start = cu_seqlens.index_select(0, document) - offset
    parts = torch.cat([torch.zeros_like(start), start.clamp_min(0), torch.full_like(start, length)])
    return parts.to(torch.int32), start < 0


def reset(map_: Tensor, enters: Tensor) -> Tensor:
    """M of a span: zero unless the document at its end was there at its start."""
    return torch.where(enters, map_, torch.zeros_like(map_))


def reset_only(end: Tensor, enters: Tensor) -> Tensor:
    """The map [B, H] of a state that has none (the identity), for E [B, H, ...]: one, or zero at a
    boundary.
    """
    return enters.to(end.dtype).expand(end.shape[:2])


def place(entry: Tensor, cu_seqlens: Tensor, offset: Tensor) -> Tensor:
    """Entry state [1, H, ...] of the document that goes on from the rank before -> states [N, H,
    ...], others zero.
    """
    open_ = (cu_seqlens[:-1] < offset) & (cu_seqlens[1:] > offset)
    open_ = open_.reshape(-1, *(1 for _ in entry.shape[1:]))
    return torch.where(open_, entry, torch.zeros_like(entry))


def check_history(counts: Tensor, count: int, layer: str) -> Tensor:
    """counts [P], after a check that the `count` tokens before each rank's first are on the rank before, or before the
    sequence: that no rank between others holds fewer. No value is read on the host.
    """
    upto = counts.cumsum(0)
    short = (counts < count) & (upto > counts) & (upto < counts.sum())
    torch._assert_async(
        ~short.any(),
        f"{layer} looks {count} tokens back, and a rank between others holds fewer: what it looks at comes from the "
        f"rank before alone. Give each rank at least {count} tokens (the first and the last may have fewer), or use "
        "fewer ranks",
    )
    return counts.view_as(counts)


def tail(x: Tensor, count: int) -> Tensor:
    """The last `count` tokens of x [B, T, ...], [B, count, ...]: zeros before them where T is less, in one graph for
    any T.
    """
    padded = F.pad(x, (*[0, 0] * (x.dim() - 2), count, 0))
    return padded.narrow(1, x.shape[1], count)


def halo(x: Tensor, count: int, rank: Tensor, index: int, size: int, group: str) -> Tensor:
    """The last `count` tokens of the rank before, [B, count, ...] of x [B, T, ...]; zeros on the
    first rank.

    Ranks form a ring, so that shapes agree; what the first receives is masked by data.
    """
    sent = tail(x, count).unsqueeze(0)
    to, from_ = [0] * size, [0] * size
    to[(index + 1) % size] = from_[(index - 1) % size] = 1
    received = collectives.wait(collectives.start_all_to_all(sent, from_, to, group)).squeeze(0)
    return torch.where(rank > 0, received, torch.zeros_like(received))


def shift(x: Tensor, received: Tensor) -> Tensor:
    """Every token gets the one n before it: x [B, T, ...], received [B, n, ...] -> [B, T, ...]."""
    return torch.cat([received, x], dim=1).narrow(1, 0, x.shape[1])


def sum_over_tokens(x: Tensor, dims: list[int], keepdim: bool, group: str) -> Tensor:
    """Sum over `dims`, then over ranks; every rank has the result."""
    return collectives.global_sum(x.sum(dim=dims, keepdim=keepdim), group)


def mean_over_tokens(
    x: Tensor, dims: list[int], keepdim: bool, counts: Tensor, each: int, group: str
) -> Tensor:
    """Mean over `dims` of all ranks' tokens, `each` numbers of x for one of them."""
    total = counts.sum().to(x.dtype) * each
    return collectives.global_sum(x.sum(dim=dims, keepdim=keepdim) / total, group)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    group: str,
) -> Tensor:
    """F.cross_entropy over the tokens of all ranks: the mean divides by all labels that count."""
    total = F.cross_entropy(
        logits,
        labels,
        weight,
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if reduction == "mean":
        known = labels != ignore_index
        shares = known if weight is None else weight[labels.where(known, 0)] * known
        total = total / collectives.all_reduce(shares.sum().to(total.dtype), group)
    return collectives.global_sum(total, group)
