"""The state exchange of a sequence cut over ranks: span maps of all ranks in, the state each starts
from out.

    flight = start(...)     a collective begins
    ...                     whatever does not need the entry state
    S_in = finish(...)      wait, fold, (second collective), this rank's entry states

Schedules, same result:
    all_gather   every rank receives all (M, E) and folds them (LASP-2). One collective, (P-1) n
                 bytes received.
    transpose    two even all-to-alls over heads: rank i folds all summaries of its H/P heads and
                 sends the entry
                 states back. (n + s)(P-1)/P bytes, and no constant in the graph depends on the
                 rank.

The backward is the same exchange against the order of ranks, with M^T: it sends state gradients,
and M again only under all_gather. Kept for it: S_in and M of one rank's size, never what was
gathered. Notation: P ranks, B batch, H heads, n = bytes of (M, E), s = bytes of E.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.runtime import collectives
from lmoe_compiler.runtime.fold import fold, outer

Axes = Sequence[tuple[str, str | None]]  # per state: its axes, and its map's (None: identity)

SCHEDULES = ("all_gather", "transpose")


def start(summaries: Sequence[Tensor], schedule: str, size: int, group: str) -> Tensor:
    """Send span maps: M [B, H, ...] of each state that has one, then E [B, H, ...] of each state."""
    return _send([x.detach() for x in summaries], schedule, size, group)


def finish(
    flight: Tensor,
    summaries: Sequence[Tensor],
    rank: Tensor,
    axes: Axes,
    schedule: str,
    size: int,
    group: str,
) -> list[Tensor]:
    """Entry state of each state on this rank, [B, H, *axes]; differentiable in `summaries`. `rank`
    is [1] int64.
    """
    call = (tuple(axes), schedule, size, group)
    return list(_EntryStates.apply(call, flight, rank, *summaries))


def _maps(values: Sequence[Tensor], axes: Axes) -> list[Tensor | None]:
    given = iter(values)
    return [None if map_axes is None else next(given) for _, map_axes in axes]


def _flat(x: Tensor, leading: int) -> Tensor:
    return x.reshape(*x.shape[:leading], -1)


def _send(values: Sequence[Tensor], schedule: str, size: int, group: str) -> Tensor:
    packed = torch.cat([_flat(x, 2) for x in values], dim=-1)
    if schedule == "all_gather":
        return collectives.start_all_gather(packed, size, group)
    by_head = packed.transpose(0, 1)
    missing = -by_head.shape[0] % size
    return collectives.start_even_all_to_all(F.pad(by_head, (0, 0, 0, 0, 0, missing)), size, group)


def _receive(flight: Tensor, like: Sequence[Tensor], schedule: str, size: int) -> list[Tensor]:
    """What every rank sent, one tensor [P, two of (B, H or this rank's share of H), ...] for each
    of `like`.
    """
    arrived = collectives.wait(flight).unflatten(0, (size, -1))
    shapes = [x.shape[2:] for x in like]
    parts = arrived.split([shape.numel() for shape in shapes], dim=-1)
    return [
        part.reshape(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes, strict=True)
    ]


def _own(
    folded: Sequence[Tensor],
    like: Sequence[Tensor],
    rank: Tensor,
    schedule: str,
    size: int,
    group: str,
) -> list[Tensor]:
    """This rank's part of states [P, ...] that were folded: [B, H, *axes] for each of `like`."""
    if schedule == "all_gather":
        return [x.index_select(0, rank).squeeze(0) for x in folded]
    packed = torch.cat([_flat(x, 3) for x in folded], dim=-1).flatten(0, 1)
    back = collectives.wait(collectives.start_even_all_to_all(packed, size, group))
    heads = like[0].shape[1]
    sizes = [x.shape[2:].numel() for x in like]
    parts = back[:heads].transpose(0, 1).split(sizes, dim=-1)
    return [part.reshape(x.shape) for part, x in zip(parts, like, strict=True)]


class _EntryStates(torch.autograd.Function):
    """finish(), with the backward that sends gradients of states only."""

    @staticmethod
    def forward(
        ctx: Any, call: tuple[Any, ...], flight: Tensor, rank: Tensor, *summaries: Tensor
    ) -> tuple[Tensor, ...]:
        axes, schedule, size, group = call
        received = _receive(flight, summaries, schedule, size)
        num_maps = len(summaries) - len(axes)
        ends = summaries[num_maps:]
        folded = [
            fold(m, e, state, map_axes or "")
            for m, e, (state, map_axes) in zip(
                _maps(received[:num_maps], axes), received[num_maps:], axes, strict=True
            )
        ]
        entries = _own(folded, ends, rank, schedule, size, group)
        # The transpose schedule folds the gradients of the same heads again, so it keeps those
        # maps: no bytes sent.
        kept = received[:num_maps] if schedule == "transpose" else summaries[:num_maps]
        ctx.call = call
        ctx.save_for_backward(rank, *kept, *entries)
        return tuple(entries)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        axes, schedule, size, group = ctx.call
        rank, *kept = ctx.saved_tensors
        maps, entries = kept[: -len(axes)], kept[-len(axes) :]
        resent = maps if schedule == "all_gather" else []
        sent = [*resent, *grads]
        received = _receive(_send(sent, schedule, size, group), sent, schedule, size)
        maps = received[: len(resent)] or maps
        folded = [
            fold(m, g, state, map_axes or "", reverse=True)
            for m, g, (state, map_axes) in zip(
                _maps(maps, axes), received[len(resent) :], axes, strict=True
            )
        ]
        d_ends = _own(folded, entries, rank, schedule, size, group)
        d_maps = [
            outer(d, s, state, map_axes)
            for d, s, (state, map_axes) in zip(d_ends, entries, axes, strict=True)
            if map_axes is not None
        ]
        return None, None, None, *d_maps, *d_ends
