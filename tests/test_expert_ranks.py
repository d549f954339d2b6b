"""Experts on real ranks (gloo): a mesh with an axis of its own for them, exact and with a capacity;
op sequences after AOTAutograd and process groups are the same on every rank.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import lmoe_compiler as lmoe
from lmoe_compiler.capacity import capacity
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes.base import Record

CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=1, layer_pattern="L", linear_heads=2, key_dim=4,
    value_dim=4, num_experts=4, top_k=2, expert_size=8, shared_expert_size=8,
)  # fmt: skip
LENGTH = 16


def close(got: Tensor, want: Tensor, name: str) -> None:
    """fp32 rounding of sums that were taken in another order."""
    error = (got - want).norm() / want.norm().clamp_min(1e-6)
    assert error < 2e-5, (name, float(error))


def same_everywhere(value: Any, size: int) -> None:
    values = [None] * size
    dist.all_gather_object(values, value)
    assert all(other == value for other in values)


def train(rank: int, size: int, shape: dict[str, int]) -> None:
    """Two steps against the plain model on all tokens: rows of the batch over `ep`, parts over `sp`."""
    torch.manual_seed(0)
    whole, model = LinearMoEForCausalLM(CONFIG), LinearMoEForCausalLM(CONFIG)
    model.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))
    lmoe.parallelize(model, mesh, expert_parallel="ep")
    record = Record(texts=True)
    compiled = lmoe.compile(
        model, mesh=mesh, sequence_parallel="sp", expert_parallel="ep", inner="aot_eager",
        record=record,
    )  # fmt: skip
    groups = len(dist.distributed_c10d._world.pg_map)
    row, part = mesh.get_local_rank("ep"), mesh.get_local_rank("sp")
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (whole, model)]
    for _ in range(2):
        ids, labels = torch.randint(0, 32, (2, shape["ep"], LENGTH))
        labels[0, 5:9] = -100
        own = [x[row : row + 1].chunk(shape["sp"], 1)[part].contiguous() for x in (ids, labels)]
        expected, result = whole(ids, labels), compiled(*own)
        expected.loss.backward()
        result.loss.backward()
        for name in ("loss", "aux_loss", "z_loss"):
            close(getattr(result, name), getattr(expected, name), name)
        assert torch.equal(result.expert_load, expected.expert_load)
        for name, parameter in model.named_parameters():
            grad = whole.get_parameter(name).grad
            assert grad is not None
            assert parameter.grad is not None, name
            close(parameter.grad, grad.chunk(shape["ep"])[row] if grad.dim() == 3 else grad, name)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    assert len(dist.distributed_c10d._world.pg_map) == groups, "groups were made after lmoe.compile"
    (graph,) = record.graphs
    for _, text in graph.lowered:
        ops = re.findall(r"= torch\.ops\.(\S+?)\(", text)
        assert any("all_to_all" in op for op in ops)
        same_everywhere(ops, size)
    dist.barrier()


def drop(rank: int, size: int) -> None:
    """A tight capacity: each rank has its places, the counts are those of all ranks."""
    torch.manual_seed(0)
    model = LinearMoEForCausalLM(CONFIG)
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))
    whole = lmoe.compile(model, expert_capacity=0.5, inner="aot_eager")
    ids = torch.randint(0, 32, (size, LENGTH))
    own = ids[rank : rank + 1]
    expected = whole(own, own)
    cut = LinearMoEForCausalLM(CONFIG)
    cut.load_state_dict(model.state_dict())
    lmoe.parallelize(cut, mesh, expert_parallel="ep")
    torch._dynamo.reset()
    compiled = lmoe.compile(
        cut, mesh=mesh, expert_parallel="ep", expert_capacity=0.5, inner="aot_eager"
    )
    result = compiled(own, own)
    # A rank drops the rows that it would drop alone.
    close(result.logits, expected.logits, "logits")
    total = expected.expert_dropped.clone()
    dist.all_reduce(total)
    assert torch.equal(result.expert_dropped, total)
    places = capacity(own.numel() * 2, 4, 0.5)
    assert torch.equal(expected.expert_dropped, (expected.expert_load - places).clamp_min(0))
    assert total.sum() > 0
    again = compiled(own, own)
    assert torch.equal(again.logits, result.logits), "not repeatable"
    dist.barrier()


@pytest.mark.slow
def test_an_axis_for_experts_next_to_the_sequence_on_four_ranks() -> None:
    run_processes(4, train, {"sp": 2, "ep": 2})


@pytest.mark.slow
def test_a_tight_capacity_on_two_ranks() -> None:
    run_processes(2, drop)
