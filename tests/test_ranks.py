"""lmoe.compile on real ranks (gloo): a hybrid Linear-MoE model equals one rank, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import lmoe_compiler as lmoe
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    layer_pattern="LN",
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    linear_heads=2,
    key_dim=4,
    value_dim=4,
    num_experts=4,
    top_k=2,
    expert_size=8,
    shared_expert_size=8,
)
LENGTH = 24


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """fp32 rounding of sums that were taken in another order."""
    error = (got - want).norm() / want.norm().clamp_min(1e-6)
    assert error < 2e-5, (name, float(error))


def train(rank: int, size: int, experts: bool, packed: bool) -> None:
    """Three steps of the compiled model on this rank's tokens against the plain model on all of them."""
    torch.manual_seed(0)
    whole, model = LinearMoEForCausalLM(CONFIG), LinearMoEForCausalLM(CONFIG)
    model.load_state_dict(whole.state_dict())
    documents = torch.tensor([0, 7, 16, LENGTH], dtype=torch.int32) if packed else None
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("sp",))
    if experts:
        lmoe.parallelize(model, mesh, expert_parallel="sp")
    compiled = lmoe.compile(
        model,
        mesh=mesh,
        sequence_parallel="sp",
        expert_parallel="sp" if experts else None,
        inner="aot_eager",
    )
    steps = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
    share = LENGTH // size
    mine = slice(rank * share, (rank + 1) * share)
    for _ in range(3):
        ids, labels = torch.randint(0, 32, (2, 1, LENGTH))
        labels[0, 5] = -100
        expected = whole(ids, labels, documents)
        expected.loss.backward()
        result = compiled(ids[:, mine].contiguous(), labels[:, mine].contiguous(), documents)
        result.loss.backward()
        close(result.loss, expected.loss, "loss")
        close(result.logits, expected.logits[:, mine], "logits")
        assert torch.equal(result.expert_load, expected.expert_load)
        compare_gradients(rank, model, whole)
        for optimiser in steps:
            optimiser.step()
            optimiser.zero_grad()
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
    """Ranks that compile different graphs are told so, by an error on each."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("sp",))
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


@pytest.mark.slow
def test_ranks_that_disagree_are_told_before_they_hang() -> None:
    run_processes(2, disagree)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_two_ranks_equal_one(experts: bool) -> None:
    run_processes(2, train, experts, True)


@pytest.mark.slow
def test_four_ranks_equal_one() -> None:
    run_processes(4, train, True, False)
