"""Expert parallelism with a fixed number of places (lmoe_compiler/capacity.py): every rank sends C
rows to each expert, filled or not, so that all exchanges are even and nothing is read on the host.

    sent = send(x, ids)             rows to their places, on their way
    ...                             shared experts, whatever else does not need them
    back = compute(sent, weights)   wait, batched matmuls, rows start back
    y = combine(back, weights)      wait, sum each token's rows in the order of its choices

C comes from the tokens of one rank, and all ranks must have as many: `check_rows` says so before the
first exchange of a step, on every rank. Which rows are left out depends on the tokens of their own
rank alone. Notation: P ranks, L = E / P experts here, else as there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lmoe_compiler import capacity
from lmoe_compiler.runtime import collectives

UNEVEN = (
    "ranks ask experts for different numbers of rows, and with expert_capacity= these travel in equal "
    "parts: give every rank as many tokens, or compile without expert_capacity"
)


class Sent(NamedTuple):
    """Rows on their way to experts, and where they come from."""

    rows: Tensor  # in flight: [P L C, D], by source rank, then by expert
    source: Tensor  # [E C]
    slot: Tensor  # [M]


def check_rows(ids: Tensor, size: int, group: str) -> Tensor:
    """Stop every rank if one has other rows than ids.numel(); returns those of each, [P]. No value
    is read on the host.
    """
    own = torch.full((1,), ids.numel(), dtype=torch.int64, device=ids.device)
    rows = collectives.wait(collectives.start_all_gather(own, size, group))
    torch._assert_async((rows == rows[0]).all(), UNEVEN)
    return rows


def send(x: Tensor, ids: Tensor, num_local: int, size: int, factor: float, group: str) -> Sent:
    """x [N, D], ids [N, k] of E = P L experts."""
    source, slot = capacity.places(ids, num_local * size, factor)
    rows: Tensor = capacity.place(x, source, slot, ids.shape[-1])
    return Sent(collectives.start_even_all_to_all(rows, size, group), source, slot)


def compute(rows: Tensor, gate_up: Tensor, down: Tensor, size: int, group: str) -> Tensor:
    """SwiGLU of this rank's experts, gate_up [L, 2F, D] and down [L, D, F]; its rows in flight to
    their tokens.
    """
    rows = collectives.wait(rows)
    num_local = gate_up.shape[0]
    places = rows.shape[0] // (size * num_local)
    here = rows.view(size, num_local, places, rows.shape[-1]).transpose(0, 1).flatten(1, 2)
    y = capacity.batched_swiglu(here, gate_up, down)
    back = y.unflatten(1, (size, places)).transpose(0, 1).flatten(0, 2)
    return collectives.start_even_all_to_all(back, size, group)


def combine(back: Tensor, weights: Tensor, source: Tensor, slot: Tensor, x: Tensor) -> Tensor:
    """Weighted sum of each token's rows: weights [N, k] -> [N, D] in x's dtype."""
    return capacity.weighted_sum(collectives.wait(back), weights, source, slot, x)


def dropped_rows(ids: Tensor, num_experts: int, factor: float, group: str) -> Tensor:
    """Rows of all ranks' tokens without a place, per expert: [E] int64."""
    return collectives.all_reduce(capacity.dropped_rows(ids, num_experts, factor), group)
