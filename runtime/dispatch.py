"""Expert parallelism: rows travel to the ranks that hold their experts, and back. Exact, nothing is
dropped.

    sent = send(x, ids)             sort by expert, tell counts (even all-to-all, one host read), rows start
    ...                             shared experts, whatever else does not need them
    back = compute(sent, weights)   wait, group by expert, grouped matmuls, rows start back
    y = combine(back, weights)      wait, sum each token's k rows in the order of its choices

The sum is done where the tokens live, so it has the order and the bits of one rank. Splits are
values of the graph: one graph for every routing, ranks without tokens included. Notation: P ranks,
N tokens here, k experts a token, M = N k rows, E experts in all, L = E / P here, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.experts import collect, dispatch, grouped_mm, sort_by_expert
from lmoe_compiler.runtime import collectives


class Sent(NamedTuple):
    """Rows on their way to experts, and what is needed to send them back."""

    rows: Tensor  # in flight: [rows that this rank gets, D], by source rank, then by expert
    order: Tensor  # [M] rows by expert
    inverse: Tensor  # [M]
    received: Tensor  # [P, L] rows of each source rank for each expert here
    out: list[int]  # rows from each rank
    in_: list[int]  # rows to each rank


def send(x: Tensor, ids: Tensor, num_local: int, size: int, group: str) -> Sent:
    """x [N, D], ids [N, k] of E = P L experts."""
    order, inverse, ends = sort_by_expert(ids, num_local * size)
    counts = ends.diff(prepend=ends.new_zeros(1)).to(torch.int64).view(size, num_local)
    received = collectives.wait(collectives.start_even_all_to_all(counts, size, group))
    out, in_ = _read(torch.stack([received.sum(1), counts.sum(1)]))
    rows = dispatch(x, order, inverse, ids.shape[-1])
    flight = collectives.start_all_to_all(rows, out, in_, group)
    return Sent(flight, order, inverse, received, out, in_)


def _read(splits: Tensor) -> list[list[int]]:
    """The one host read of a layer: a compiled graph reads each number alone, so they move first."""
    values: list[list[int]] = splits.cpu().tolist()
    for row in values:
        for value in row:
            torch._check(value >= 0)
    return values


def compute(
    rows: Tensor,
    received: Tensor,
    out: list[int],
    in_: list[int],
    gate_up: Tensor,
    down: Tensor,
    group: str,
) -> Tensor:
    """SwiGLU of this rank's experts, gate_up [L, 2F, D] and down [L, D, F]; its rows in flight to
    their tokens.
    """
    rows = collectives.wait(rows)
    size, num_local = received.shape
    expert = torch.arange(num_local, device=rows.device).repeat(size)
    expert = expert.repeat_interleave(received.flatten(), output_size=rows.shape[0])
    order = expert.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.shape[0], device=order.device)
    )
    offsets = received.sum(0).cumsum(0).to(torch.int32)
    grouped = dispatch(rows, order, inverse, 1)
    gate, up = grouped_mm(grouped, gate_up.transpose(-1, -2), offsets).chunk(2, dim=-1)
    y = grouped_mm(F.silu(gate) * up, down.transpose(-1, -2), offsets)
    return collectives.start_all_to_all(collect(y, order, inverse, 1), in_, out, group)


def combine(back: Tensor, weights: Tensor, order: Tensor, inverse: Tensor, x: Tensor) -> Tensor:
    """Weighted sum of each token's rows: weights [N, k] -> [N, D] in x's dtype."""
    y = collectives.wait(back)
    y = y * weights.reshape(-1).gather(0, order).unsqueeze(-1).to(y.dtype)
    return collect(y, order, inverse, weights.shape[-1]).to(x.dtype)
