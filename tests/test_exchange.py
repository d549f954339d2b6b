"""State exchange on simulated ranks: entry states and gradients of P ranks are those of a
sequential fold.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmoe_compiler.runtime import exchange
from lmoe_compiler.runtime.fold import fold
from lmoe_compiler.runtime.local_world import run_ranks

SIZES = {"K": 3, "K'": 3, "V": 2, "V'": 2}
# One tuple a recurrence: per state its axes and its map's.
FORMS = {
    "identity": (("K V", None),),
    "scalar": (("K V", ""),),
    "diagonal": (("K V", "K"),),
    "values": (("K V", "V"),),
    "dense": (("K V", "K K'"),),
    "dense_values": (("K V", "V V'"),),
    "elementwise": (("K V", "K V"),),
    "two_states": (("K", "K"), ("K V", "K K'")),
    "normaliser": (("K", None), ("K V", None)),
}


def summaries(axes: exchange.Axes, size: int, heads: int, resets: set[int]) -> list[Tensor]:
    """Maps, then ends: [P, B, H, ...]; ranks in `resets` have a document's start inside."""
    generator = torch.Generator().manual_seed(size)

    def draw(names: str) -> Tensor:
        shape = (size, 2, heads, *(SIZES[name] for name in names.split()))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = [draw(m) for _, m in axes if m is not None]
    for m in maps:
        m[list(resets)] = 0
    return [*maps, *(draw(state) for state, _ in axes)]


def sequential(axes: exchange.Axes, values: list[Tensor]) -> list[Tensor]:
    """The definition, written with matrices on one rank."""
    given = iter(values)
    maps = [None if m is None else next(given) for _, m in axes]
    out = []
    for (_, names), m, ends in zip(axes, maps, given, strict=True):
        state, entries = torch.zeros_like(ends[0]), []
        for j, end in enumerate(ends):
            entries.append(state)
            if names is None:
                moved = state
            elif names == "K K'":
                moved = m[j] @ state
            elif names == "V V'":
                moved = state @ m[j].mT
            elif names == "K" and state.dim() == 4:
                moved = m[j][..., None] * state
            elif names == "V":
                moved = m[j][..., None, :] * state
            elif names == "":
                moved = m[j][..., None, None] * state
            else:
                moved = m[j] * state
            state = moved + end
        out.append(torch.stack(entries))
    return out


def loss(states: list[Tensor], first_rank: int) -> Tensor:
    """A different weight for each rank, so that a gradient sent to the wrong one shows."""
    total = torch.zeros((), dtype=torch.float64)
    for x in states:
        ranks = torch.arange(first_rank, first_rank + x.shape[0], dtype=x.dtype)
        total = total + (x.square().flatten(1).sum(1) * (1 + ranks)).sum()
    return total


@pytest.mark.parametrize("schedule", exchange.SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_equal_a_sequential_fold(form: str, schedule: str, size: int) -> None:
    axes, heads = FORMS[form], 4
    values = summaries(axes, size, heads, resets={size // 2})
    whole = [x.clone().requires_grad_() for x in values]
    expected = sequential(axes, whole)
    loss(expected, 0).backward()

    def one(rank: int, group: str) -> tuple[list[Tensor], list[Tensor]]:
        own = [x[rank].clone().requires_grad_() for x in values]
        flight = exchange.start(own, schedule, size, group)
        where = torch.tensor([rank])
        states = exchange.finish(flight, own, where, axes, schedule, size, group)
        loss([s[None] for s in states], rank).backward()
        return [s.detach() for s in states], [x.grad for x in own]

    for rank, (states, grads) in enumerate(run_ranks(size, one)):
        for got, want in zip(states, expected, strict=True):
            torch.testing.assert_close(got, want[rank].detach(), rtol=1e-12, atol=1e-12)
        for got, want in zip(grads, whole, strict=True):
            torch.testing.assert_close(got, want.grad[rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_fold(form: str, reverse: bool) -> None:
    (state, map_axes), *_ = FORMS[form]
    values = summaries(((state, map_axes),), 3, 1, resets=set())
    maps = values[0].requires_grad_() if map_axes is not None else None
    ends = values[-1].requires_grad_()

    def run(*tensors: Tensor) -> Tensor:
        return fold(
            tensors[0] if maps is not None else None, tensors[-1], state, map_axes or "", reverse
        )

    tensors = (ends,) if maps is None else (maps, ends)
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_an_error_on_one_rank_ends_all() -> None:
    def one(rank: int, group: str) -> None:
        if rank == 1:
            raise ValueError("rank 1 fell")
        exchange.start([torch.ones(1, 2, 3)], "all_gather", 2, group)

    with pytest.raises(ValueError, match="rank 1 fell"):
        run_ranks(2, one)
