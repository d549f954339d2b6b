"""lmoe.compile on real ranks (gloo): a hybrid Linear-MoE model equals one rank, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch.distributed.device_mesh import init_device_mesh

import lmoe_compiler as lmoe
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


def train_step(rank: int, size: int, experts: bool, packed: bool) -> None:
    """One step of the compiled model on this rank's tokens against the plain model on all of them."""
    torch.manual_seed(0)
    whole = LinearMoEForCausalLM(CONFIG)
    model = LinearMoEForCausalLM(CONFIG)
    model.load_state_dict(whole.state_dict())
    ids, labels = torch.randint(0, 32, (2, 1, LENGTH))
    labels[0, 5] = -100
    documents = torch.tensor([0, 7, 16, LENGTH], dtype=torch.int32) if packed else None
    expected = whole(ids, labels, documents)
    expected.loss.backward()

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
    share = LENGTH // size
    mine = slice(rank * share, (rank + 1) * share)
    result = compiled(ids[:, mine].contiguous(), labels[:, mine].contiguous(), documents)
    result.loss.backward()
    close(result.loss, expected.loss, "loss")
    close(result.logits, expected.logits[:, mine], "logits")
    assert torch.equal(result.expert_load, expected.expert_load)
    reference = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = reference[name].grad
        assert grad is not None
        if parameter.shape != grad.shape:
            count = parameter.shape[0]
            grad = grad[rank * count : (rank + 1) * count]
        assert parameter.grad is not None, name
        close(parameter.grad, grad, name)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
def test_two_ranks_equal_one(experts: bool) -> None:
    run_processes(2, train_step, experts, True)


@pytest.mark.slow
def test_four_ranks_equal_one() -> None:
    run_processes(4, train_step, True, False)
