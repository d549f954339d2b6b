"""Expert parallelism on simulated ranks: routed rows come back with the bits of one rank, and with a
capacity each rank drops what it would drop alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from lmoe_compiler import capacity
from lmoe_compiler.experts import swiglu_experts
from lmoe_compiler.runtime import capacity as on_ranks
from lmoe_compiler.runtime import dispatch
from lmoe_compiler.runtime.local_world import run_ranks

HIDDEN, WIDTH, EXPERTS, TOP = 8, 6, 8, 2


def exact(
    size: int, group: str, x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    sent = dispatch.send(x, ids, EXPERTS // size, size, group)
    back = dispatch.compute(sent.rows, sent.received, sent.out, sent.in_, gate_up, down, group)
    return dispatch.combine(back, weights, sent.order, sent.inverse, x)


def fixed(
    size: int,
    group: str,
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    factor: float,
) -> Tensor:
    rows, source, slot = on_ranks.send(x, ids, EXPERTS // size, size, factor, group)
    back = on_ranks.compute(rows, gate_up, down, size, group)
    return on_ranks.combine(back, weights, source, slot, x)


ROUTINGS = {
    "random": lambda n: torch.randn(n, EXPERTS).topk(TOP, -1).indices,
    "all_on_two": lambda n: torch.tensor([3, 4]).repeat(n, 1),
    "all_on_one": lambda n: torch.tensor([5, 5]).repeat(n, 1),
    "one_rank_idle": lambda n: torch.randint(0, 2, (n, TOP)),
}


def operands(total: int, routing: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(total)
    sizes = ((total, HIDDEN), (total, TOP), (EXPERTS, 2 * WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
    x, weights, gate_up, down = (torch.randn(size, dtype=dtype) for size in sizes)
    return [x, weights, ROUTINGS[routing](total), gate_up, down]


def results(function: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    """Output and gradients of x, weights, gate_up and down; twice, with equal bits."""
    twice = []
    for _ in range(2):
        own = [t.clone().requires_grad_(t.is_floating_point()) for t in given]
        y = function(*own)
        y.square().sum().backward()
        twice.append([y.detach(), *(t.grad for t in own if t.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True)), "not repeatable"
    return twice[0]


def on_each(
    function: Callable[..., Tensor], given: list[Tensor], tokens: list[int]
) -> list[list[Tensor]]:
    """The same of every rank, which has its tokens and its experts."""
    size = len(tokens)
    shards = [t.split(tokens) for t in given[:3]]
    shards += [t.split(EXPERTS // size) for t in given[3:]]

    def one(rank: int, group: str) -> list[Tensor]:
        return results(partial(function, size, group), [shard[rank] for shard in shards])

    return run_ranks(size, one)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("size", "tokens"), [(2, [5, 7]), (4, [3, 0, 6, 1]), (4, [0, 0, 0, 2])])
def test_ranks_equal_one(size: int, tokens: list[int], routing: str) -> None:
    given = operands(sum(tokens), routing)
    expected = results(swiglu_experts, given)
    ranks = on_each(exact, given, tokens)
    joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    assert torch.equal(joined[0], expected[0])
    for got, want in zip(joined, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tokens", [[6, 6], [3, 3, 3, 3], [0, 0]])
def test_places_for_all_give_what_the_exact_exchange_gives(tokens: list[int], routing: str) -> None:
    given = operands(sum(tokens), routing)
    ranks = on_each(partial(fixed, factor=float(EXPERTS)), given, tokens)
    joined = [torch.cat(parts) for parts in zip(*ranks, strict=True)]
    for got, want in zip(joined, results(swiglu_experts, given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("factor", [0.4, 1.0])
def test_a_rank_drops_what_it_would_drop_alone(factor: float, routing: str) -> None:
    """One rank with all experts and the same tokens is the reference, gradients of experts summed."""
    tokens = [4, 4, 4, 4]
    given = operands(sum(tokens), routing)
    ranks = on_each(partial(fixed, factor=factor), given, tokens)
    alone = [
        results(partial(capacity.swiglu_experts, factor=factor), [*own, *given[3:]])
        for own in zip(*(t.split(tokens) for t in given[:3]), strict=True)
    ]
    for i in range(3):
        for rank, reference in zip(ranks, alone, strict=True):
            torch.testing.assert_close(rank[i], reference[i], rtol=1e-12, atol=1e-12)
    for i in (3, 4):
        want = torch.stack([reference[i] for reference in alone]).sum(0)
        got = torch.cat([rank[i] for rank in ranks])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    counts = [capacity.dropped_rows(part, EXPERTS, factor) for part in given[2].split(tokens)]

    def count(rank: int, group: str) -> Tensor:
        return on_ranks.dropped_rows(given[2].split(tokens)[rank], EXPERTS, factor, group)

    for total in run_ranks(4, count):
        assert torch.equal(total, torch.stack(counts).sum(0))
    assert routing == "random" or int(torch.stack(counts).sum()) > 0
