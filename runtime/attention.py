"""Keys and values, or heads, of a softmax layer on their way between ranks that may hold different
numbers of tokens.

How many is told on the host, by a collective of numbers in its memory: no device is waited for, and
the sizes are values of the graph. The largest and the sum are enough to gather keys, in parts that
are filled up to the largest; heads travel in parts of their own sizes. Where all ranks promise as
many (`even_tokens`), nothing is told, and a broken promise stops every rank.

Notation: P ranks, B batch, T tokens of this rank, S of all, M the most of one; H query heads, G
key-value heads, E and F head sizes; n [P] tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_compiler.capacity import place
from lmoe_compiler.runtime import collectives

UNEVEN = (
    "ranks hold different numbers of tokens, and even_tokens=True promised as many on each: "
    "give every rank as many, or compile without it"
)


def check_even(counts: Tensor) -> Tensor:
    """counts, after a check that all are the same; no value is read on the host."""
    torch._assert_async((counts == counts[0]).all(), UNEVEN)
    return counts.view_as(counts)


def start_lengths(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """Tell every rank's host how many tokens this one holds, x.shape[dim]: [P], in flight."""
    own = torch.full((1,), x.shape[dim], dtype=torch.int64, device="cpu")
    return collectives.start_all_gather(own, size, group)


def largest_and_total(lengths: Tensor) -> list[int]:
    """n on the host -> [M, S]."""
    return _read(torch.stack([lengths.max(), lengths.sum()]))


def each(lengths: Tensor) -> list[int]:
    """n on the host -> its numbers."""
    return _read(lengths)


def _read(numbers: Tensor) -> list[int]:
    values: list[int] = numbers.tolist()
    for value in values:
        torch._check(value >= 0)
    return values


def gather_keys_values(
    k: Tensor,
    v: Tensor,
    size: int,
    group: str,
    counts: Tensor | None = None,
    most: int = 0,
    total: int = 0,
) -> tuple[Tensor, Tensor]:
    """k [B, T, G, E], v [B, T, G, F] -> the same of all ranks' tokens, by one collective."""
    both = gather_tokens(torch.cat([k, v], dim=-1), size, group, counts, most, total)
    keys, values = both.split([k.shape[-1], v.shape[-1]], dim=-1)
    return keys, values


def gather_tokens(
    x: Tensor, size: int, group: str, counts: Tensor | None = None, most: int = 0, total: int = 0
) -> Tensor:
    """Tokens of all ranks, x [B, T, ...] -> [B, S, ...].

    counts (n), most (M) and total (S): where ranks hold different numbers. Backward:
    reduce-scatter.
    """
    rows = x.transpose(0, 1)
    by_token = rows.flatten(1)
    if counts is not None:
        by_token = _fill(by_token, most)
    by_token = collectives.wait(collectives.start_all_gather(by_token, size, group))
    if counts is not None:
        by_token = _join(by_token, counts, most, total)
    return by_token.unflatten(1, rows.shape[1:]).transpose(0, 1)


def _fill(x: Tensor, most: int) -> Tensor:
    """x [T, D] -> [M, D], zeros behind the tokens."""
    row = torch.arange(most, device=x.device)
    filled: Tensor = place(
        x, torch.where(row < x.shape[0], row, -1), torch.arange(x.shape[0], device=x.device), 1
    )
    return filled


def _join(x: Tensor, counts: Tensor, most: int, total: int) -> Tensor:
    """x [P M, D] -> [S, D], without what was filled in."""
    first = counts.cumsum(0) - counts
    row = torch.arange(total, device=x.device)
    rank = torch.searchsorted(counts.cumsum(0), row, right=True)
    source = rank * most + row - first[rank]
    turn = torch.arange(most, device=x.device)
    slot = torch.where(turn < counts.unsqueeze(1), first.unsqueeze(1) + turn, -1)
    joined: Tensor = place(x, source, slot.flatten(), 1)
    return joined


def tokens_to_heads(x: Tensor, size: int, group: str, lengths: list[int] | None = None) -> Tensor:
    """This rank's tokens of all heads -> all ranks' tokens of its share of heads: [B, T, H, E] -> [B, S, H/P, E].

    lengths: tokens of each rank, None where all have T.
    """
    by_rank = x.unflatten(2, (size, -1)).permute(2, 1, 0, 3, 4)
    own = [x.shape[1]] * size
    rows = by_rank.flatten(2).flatten(0, 1)
    flight = collectives.start_all_to_all(rows, lengths or own, own, group)
    return collectives.wait(flight).unflatten(1, by_rank.shape[2:]).transpose(0, 1)


def first_place(x: Tensor) -> Tensor:
    """[1] zero: the place of the first query, where all tokens are here."""
    return torch.zeros(1, dtype=torch.int64, device=x.device)


def heads_to_tokens(
    x: Tensor, like: Tensor, size: int, group: str, lengths: list[int] | None = None
) -> Tensor:
    """The way back: [B, S, H/P, E] -> [B, T, H, E], T tokens as in `like`."""
    by_token = x.transpose(0, 1)
    own = [like.shape[1]] * size
    flight = collectives.start_all_to_all(by_token.flatten(1), own, lengths or own, group)
    by_rank = collectives.wait(flight).unflatten(1, by_token.shape[1:])
    return by_rank.unflatten(0, (size, like.shape[1])).permute(2, 1, 0, 3, 4).flatten(2, 3)
