"""Several kinds of parallelism in one mesh, on four gloo processes: three optimiser steps equal one rank's.

The mesh is 2 x 2 with axes "a" and "b"; a layout says what each axis does. Every pair of sequence (SP), tensor (TP),
expert (EP) and data parallelism by DDP and FSDP2 is here, experts on an axis of their own or on one that cuts tokens
or rows; so are triples, and pipelines (PP) of two stages. Models are compiled block by block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lmoe_compiler as lmoe
from lmoe_compiler.cuts import cuts_of
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    layer_pattern="LN",
    mixers={"L": "kda", "N": "attention"},
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    linear_heads=4,
    key_dim=4,
    value_dim=4,
    num_experts=4,
    top_k=2,
    expert_size=8,
    shared_expert_size=8,
    init_std=0.2,
)
ROWS, LENGTH, STEPS = 2, 12, 3


@dataclass(frozen=True)
class Layout:
    """What the axes of the mesh do. `data`: the axis of rows, `wrapper`: who averages over it."""

    sequence: str | None = None
    tensor: str | None = None
    expert: str | None = None
    data: str | None = None
    wrapper: str = ""
    inner: str = "eager"

    @property
    def options(self) -> dict[str, Any]:
        return {
            "sequence_parallel": self.sequence,
            "tensor_parallel": self.tensor,
            "expert_parallel": self.expert,
            "inner": self.inner,
        }


LAYOUTS = {
    "SP TP": Layout(sequence="a", tensor="b"),
    "SP EP": Layout(sequence="a", expert="b"),
    "SP DDP": Layout(sequence="a", data="b", wrapper="ddp"),
    "SP FSDP2": Layout(sequence="a", data="b", wrapper="fsdp", inner="aot_eager"),
    "TP EP": Layout(tensor="a", expert="b"),
    "TP DDP": Layout(tensor="a", data="b", wrapper="ddp"),
    "TP FSDP2": Layout(tensor="a", data="b", wrapper="fsdp"),
    "EP DDP": Layout(expert="a", data="b", wrapper="ddp"),
    "EP FSDP2": Layout(expert="a", data="b", wrapper="fsdp"),
    "EP on the axis of DDP, TP": Layout(tensor="a", expert="b", data="b", wrapper="ddp"),
    "EP on the axis of FSDP2, SP": Layout(sequence="a", expert="b", data="b", wrapper="fsdp"),
    "EP on the axis of SP, TP": Layout(sequence="a", expert="a", tensor="b", inner="aot_eager"),
    "EP on the axis of SP, FSDP2": Layout(sequence="a", expert="a", data="b", wrapper="fsdp"),
}


@dataclass
class Reference:
    """One rank's losses and weights after each step. `rows`: the mean of the rows' own losses, which is what data
    parallelism trains; else the loss of the batch.
    """

    rows: bool
    losses: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def new_model() -> LinearMoEForCausalLM:
    torch.manual_seed(0)
    return LinearMoEForCausalLM(CONFIG)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(0, 32, (2, ROWS, LENGTH), generator=generator))  # type: ignore[misc]
        for _ in range(STEPS)
    ]


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def reference(rows: bool) -> Reference:
    model, result = new_model(), Reference(rows)
    optimiser = optimiser_of(model)
    for ids, labels in batches():
        parts = zip(ids.split(1), labels.split(1), strict=True) if rows else [(ids, labels)]
        losses = torch.stack([model(*part).loss for part in parts])
        losses.mean().backward()
        result.losses.append(losses.detach())
        optimiser.step()
        optimiser.zero_grad()
    result.weights = {n: p.detach() for n, p in model.named_parameters()}
    return result


def close(got: Tensor, want: Tensor, name: str) -> None:
    """fp32 rounding of sums that were taken in another order, after three steps."""
    error = (got - want).norm() / want.norm().clamp_min(1e-6)
    assert error < 2e-5, (name, float(error))


def place(mesh: DeviceMesh, axis: str | None, x: Tensor, dim: int) -> Tensor:
    return x if axis is None else x.chunk(2, dim)[mesh.get_local_rank(axis)].contiguous()


def prepare(model: LinearMoEForCausalLM, mesh: DeviceMesh, layout: Layout) -> Callable[..., Any]:
    """Cut, compile, wrap; gives what is called."""
    if layout.expert or layout.tensor:
        lmoe.parallelize(
            model, mesh, expert_parallel=layout.expert, tensor_parallel=layout.tensor
        )
    lmoe.compile_blocks(model, mesh=mesh, **layout.options)
    # Experts that are cut over the axis of rows have had all rows; the wrapper's mean is theirs too.
    own = {
        name: p
        for name, p in model.named_parameters()
        if any(c.axis == layout.data for c in cuts_of(model).get(name, ()))
    }
    for parameter in own.values():
        parameter.register_hook(lambda grad: grad / 2)
    if layout.wrapper == "fsdp":
        assert layout.data is not None
        for layer in model.layers:
            fully_shard(layer, mesh=mesh[layout.data], ignored_params=set(own.values()))
        return fully_shard(model, mesh=mesh[layout.data], ignored_params=set(own.values()))
    if layout.wrapper == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(own))
        return DistributedDataParallel(model, process_group=mesh.get_group(layout.data))
    return model


def train(mesh: DeviceMesh, layout: Layout, one: Reference) -> None:
    model = new_model()
    call = prepare(model, mesh, layout)
    optimiser = optimiser_of(model)
    for step, batch in enumerate(batches()):
        ids, labels = (
            place(mesh, layout.sequence, place(mesh, layout.data, x, 0), 1) for x in batch
        )
        loss = call(ids, labels).loss
        loss.backward()
        row = 0 if layout.data is None else mesh.get_local_rank(layout.data)
        close(loss.detach(), one.losses[step][row], "loss")
        optimiser.step()
        optimiser.zero_grad()
    cuts = cuts_of(model)
    for name, parameter in model.named_parameters():
        got = parameter.detach()
        expected = one.weights[name]
        for taken in cuts.get(name, ()):
            expected = taken.take(expected)
        close(got.full_tensor() if isinstance(got, DTensor) else got, expected, name)


def all_layouts(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    references = {rows: reference(rows) for rows in (False, True)}
    for name, layout in LAYOUTS.items():
        try:
            train(mesh, layout, references[layout.data is not None])
        except Exception as error:
            raise AssertionError(f"rank {rank}, {name}: {error}") from error
        dist.barrier()


@pytest.mark.slow
def test_pairs_and_triples_equal_one_rank() -> None:
    run_processes(4, all_layouts)
