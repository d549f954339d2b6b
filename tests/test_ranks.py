"""lmoe.compile on real ranks (gloo): a hybrid Linear-MoE model equals one rank, gradients included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CASES, Sizes, make_inputs
from processes import close, device, mesh_of, run_processes
from small_model import SMALL
from torch import nn

import lmoe_compiler as lmoe
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.models.short_convolution import short_conv

LENGTH = 24
# Tokens of each rank, step by step: one graph for all of them, one token or none among them, and first of all.
LENGTHS = {2: ([23, 1], [9, 15], [24, 0]), 4: ([6, 6, 6, 6], [1, 9, 9, 5], [0, 20, 3, 1])}


def train(
    rank: int,
    size: int,
    experts: bool,
    packed: bool,
    inner: str = "aot_eager",
    kv_heads: int | None = None,
    blocks: bool = False,
    **options: Any,
) -> None:
    """Three steps of the compiled model on this rank's tokens against the plain model on all of them. With a capacity,
    which has places for all here, ranks have as many tokens. In one graph, or block by block.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    # On two ranks everybody gets all keys; on four, heads travel.
    config = replace(SMALL, num_kv_heads=kv_heads or (1 if size == 2 else 4))
    # Drawn on the CPU, so that all devices have the same.
    whole, model = (LinearMoEForCausalLM(config) for _ in range(2))
    model.load_state_dict(whole.state_dict())
    whole, model = whole.to(device()), model.to(device())
    documents = torch.tensor([0, 7, 16, LENGTH], dtype=torch.int32).to(device())
    documents = documents if packed else None
    mesh = mesh_of(sp=size)
    if experts:
        lmoe.parallelize(model, mesh, expert_parallel="sp")
    compiled = (lmoe.compile_blocks if blocks else lmoe.compile)(
        model,
        mesh=mesh,
        sequence_parallel="sp",
        expert_parallel="sp" if experts else None,
        inner=inner,
        **options,
    )
    steps = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (whole, model)]
    even = [[LENGTH // size] * size] * 3
    for lengths in even if "expert_capacity" in options else LENGTHS[size]:
        mine = slice(sum(lengths[:rank]), sum(lengths[: rank + 1]))
        ids, labels = torch.randint(0, 32, (2, 1, LENGTH)).to(device())
        labels[0, 5] = -100
        expected = whole(ids, labels, documents)
        expected.loss.backward()
        result = compiled(ids[:, mine], labels[:, mine], documents)
        result.loss.backward()
        close(result.loss, expected.loss, "loss")
        close(result.logits, expected.logits[:, mine], "logits")
        assert torch.equal(result.expert_load, expected.expert_load)
        assert not result.expert_dropped.any()
        compare_gradients(rank, model, whole)
        for optimiser in steps:
            optimiser.step()
            optimiser.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # Both layers, the embedding, the norm, the head and the losses.
    assert graphs == (6 if blocks else 1)
    dist.barrier()


def compare_gradients(rank: int, model: nn.Module, whole: nn.Module) -> None:
    """Of replicated parameters all of it, of experts this rank's share."""
    reference = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = reference[name].grad
        assert grad is not None
        assert parameter.grad is not None, name
        if parameter.shape != grad.shape:
            count = parameter.shape[0]
            grad = grad[rank * count : (rank + 1) * count]
        close(parameter.grad, grad, name)


def disagree(rank: int, size: int) -> None:
    """Ranks that compile different graphs, or hold other numbers of tokens than promised, are told so by an error on
    each.
    """
    mesh = mesh_of(sp=size)
    schedule = "all_gather" if rank else "transpose"
    layer = lmoe.compile(
        lambda q, k, v: RECURRENCES["linear_attention"](q, k, v),
        mesh=mesh,
        sequence_parallel="sp",
        schedule=schedule,
        inner="aot_eager",
    )
    with pytest.raises(Exception, match="compiled different collectives"):
        layer(*torch.randn(3, 1, 6, 2, 4))
    dist.barrier()
    promised = lmoe.compile(
        lambda q, k, v: torch.ops.lmoe.attention(q * 2, k * 2, v * 2),
        mesh=mesh,
        sequence_parallel="sp",
        even_tokens=True,
        inner="aot_eager",
    )
    assert promised(*torch.randn(3, 1, 6, 2, 4)).shape == (1, 6, 2, 4)
    with pytest.raises(RuntimeError, match="even_tokens=True promised as many"):
        promised(*torch.randn(3, 1, 6 + rank, 2, 4))
    dist.barrier()


@pytest.mark.slow
def test_ranks_that_disagree_are_told_before_they_hang() -> None:
    run_processes(2, disagree)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_two_ranks_equal_one(experts: bool) -> None:
    run_processes(2, train, experts, True)


@pytest.mark.slow
def test_blocks_compiled_one_by_one_take_any_number_of_tokens() -> None:
    run_processes(2, in_blocks)


def in_blocks(rank: int, size: int) -> None:
    train(rank, size, experts=True, packed=True, blocks=True)


# One of each kind of map: the identity, a scalar, a diagonal, rank-one changes (dense).
KINDS = ("linear_attention", "simple_gla", "gla", "gated_delta_rule")
DOCUMENTS = torch.tensor([0, 3, 3, 9, 14], dtype=torch.int32)


def recurrence(rank: int, size: int, name: str, uneven: bool, **options: Any) -> None:
    """One recurrence compiled over all ranks: outputs and the gradients of every input."""
    case = next(case for case in CASES if case.name == name)
    length = int(DOCUMENTS[-1]) if uneven else 16
    lengths = {2: [13, 1], 4: [5, 2, 3, 4]}[size] if uneven else [length // size] * size
    sizes = Sizes(B=1 if uneven else 2, T=length, H=3, K=4, V=3)
    documents = DOCUMENTS.to(device()) if uneven else None
    given = [x.float().to(device()) for x in make_inputs(case, sizes)[0].values()]
    inputs = [x.requires_grad_() for x in given]
    expected = case.recurrence(*inputs, cu_seqlens=documents)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3)).to(device())
    grads = torch.autograd.grad((expected * weight).sum(), inputs)

    def layer(*args: torch.Tensor | None) -> torch.Tensor:
        *xs, cu_seqlens = args
        return case.recurrence(*xs, cu_seqlens=cu_seqlens)

    mesh = mesh_of(sp=size)
    options = {"inner": "eager", **options}
    compiled = lmoe.compile(layer, mesh=mesh, sequence_parallel="sp", **options)
    mine = [x.detach().split(lengths, 1)[rank].clone().requires_grad_() for x in inputs]
    o = compiled(*mine, documents)
    close(o, expected.split(lengths, 1)[rank], name)
    got = torch.autograd.grad((o * weight.split(lengths, 1)[rank]).sum(), mine)
    for i, (x, grad) in enumerate(zip(got, grads, strict=True)):
        close(x, grad.split(lengths, 1)[rank], f"{name}, gradient {i}")


def too_few(rank: int, size: int, inner: str) -> None:
    """A rank between others with fewer tokens than the next one looks back at, in the second call: an error on each."""
    weight = torch.ones(4, 4)
    layer = lmoe.compile(
        lambda x: short_conv(x * 2, weight),
        mesh=mesh_of(sp=size),
        sequence_parallel="sp",
        inner=inner,
    )
    layer(torch.randn(1, [0, 3, 3, 1][rank], 4))
    with pytest.raises(RuntimeError, match=r"looks 3 tokens back.*Give each rank at least 3"):
        layer(torch.randn(1, [4, 2, 6, 4][rank], 4))
    dist.barrier()


def four(rank: int, size: int) -> None:
    """Everything on four ranks, in one set of processes."""
    for inner in ("eager", "aot_eager"):
        too_few(rank, size, inner)
    for name in KINDS:
        for uneven in (False, True):
            recurrence(rank, size, name, uneven)
            torch._dynamo.reset()
    train(rank, size, experts=True, packed=True, inner="eager")


@pytest.mark.slow
def test_four_ranks_equal_one() -> None:
    run_processes(4, four)
