"""Expert parallelism on simulated ranks: routed rows come back with the bits of one rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmoe_compiler.experts import swiglu_experts
from lmoe_compiler.runtime import dispatch
from lmoe_compiler.runtime.local_world import run_ranks

HIDDEN, WIDTH, EXPERTS, TOP = 8, 6, 8, 2


def spread(
    rank: int,
    size: int,
    group: str,
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Tensor:
    sent = dispatch.send(x, ids, EXPERTS // size, size, group)
    back = dispatch.compute(sent.rows, sent.received, sent.out, sent.in_, gate_up, down, group)
    return dispatch.combine(back, weights, sent.order, sent.inverse, x)


ROUTINGS = {
    "random": lambda n: torch.randn(n, EXPERTS).topk(TOP, -1).indices,
    "all_on_one": lambda n: torch.tensor([3, 4]).repeat(n, 1),
    "one_rank_idle": lambda n: torch.randint(0, 2, (n, TOP)),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("size", "tokens"), [(2, [5, 7]), (4, [3, 0, 6, 1])])
def test_ranks_equal_one(size: int, tokens: list[int], routing: str) -> None:
    total = sum(tokens)
    x = torch.randn(total, HIDDEN, dtype=torch.float64)
    weights, ids = torch.rand(total, TOP, dtype=torch.float64), ROUTINGS[routing](total)
    gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, dtype=torch.float64)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.float64)
    whole = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
    expected = swiglu_experts(whole[0], whole[1], ids, whole[2], whole[3])
    expected.square().sum().backward()

    shards = [t.split(tokens) for t in (x, weights, ids)]
    share = EXPERTS // size

    def one(rank: int, group: str) -> tuple[Tensor, list[Tensor | None]]:
        own = [
            shards[0][rank],
            shards[1][rank],
            gate_up.split(share)[rank],
            down.split(share)[rank],
        ]
        own = [t.clone().requires_grad_() for t in own]
        y = spread(rank, size, group, own[0], own[1], shards[2][rank], own[2], own[3])
        again = spread(rank, size, group, own[0], own[1], shards[2][rank], own[2], own[3])
        assert torch.equal(y, again), "not repeatable"
        y.square().sum().backward()
        return y.detach(), [t.grad for t in own]

    results = run_ranks(size, one)
    assert torch.equal(torch.cat([y for y, _ in results]), expected.detach())
    for i, tensor in enumerate(whole):
        joined = torch.cat([grads[i] for _, grads in results])
        torch.testing.assert_close(joined, tensor.grad, rtol=1e-12, atol=1e-12)
