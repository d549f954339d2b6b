"""Several kinds of parallelism in one mesh, on four gloo processes: three optimiser steps equal one rank's.

The mesh is 2 x 2 with axes "a" and "b"; a layout says what each axis does. Every pair of sequence (SP), tensor (TP),
expert (EP) and data parallelism by DDP and FSDP2 is here, experts on an axis of their own or on one that cuts tokens
or rows; so are triples, and pipelines (PP) of two stages. Models are compiled block by block.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import close, device, mesh_of, run_processes
from small_model import SMALL
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor

import lmoe_compiler as lmoe
from lmoe_compiler.cuts import cuts_of
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM

CONFIG = replace(SMALL, mixers={"L": "kda", "N": "attention"}, num_kv_heads=1)
ROWS, LENGTH, STEPS = 4, 12, 3


@dataclass(frozen=True)
class Layout:
    """What the axes of the mesh do. `wrapper`: who sums gradients over `wrapped`; graphs do over the other axes."""

    sequence: str | None = None
    tensor: str | None = None
    expert: str | None = None
    data: str | None = None
    wrapper: str = ""
    wrapped: str = "b"
    inner: str = "eager"
    layers: str = "LN"

    @property
    def rows(self) -> list[str]:
        """Axes whose ranks hold other rows of the batch."""
        given = dict.fromkeys((self.data, self.expert))
        return [axis for axis in given if axis is not None and axis != self.sequence]

    @property
    def options(self) -> dict[str, Any]:
        tokens = [axis for axis in (self.sequence, *self.rows) if axis]
        summed = tuple(axis for axis in tokens if not (self.wrapper and axis == self.wrapped))
        return {
            "sequence_parallel": self.sequence,
            "tensor_parallel": self.tensor,
            "expert_parallel": self.expert,
            "data_parallel": self.data,
            "sum_gradients": summed,
            "inner": self.inner,
        }


# Most of the time goes into torch.compile, so pairs take one layer or the other; three axes' work, both.
LAYOUTS = {
    "SP TP": Layout(sequence="a", tensor="b"),
    "SP EP": Layout(sequence="a", expert="b", layers="L"),
    "SP DDP": Layout(sequence="a", data="b", wrapper="ddp", layers="L"),
    "SP FSDP2": Layout(sequence="a", data="b", wrapper="fsdp2", inner="aot_eager", layers="N"),
    "TP EP": Layout(tensor="a", expert="b", layers="L"),
    "TP DDP": Layout(tensor="a", data="b", wrapper="ddp", layers="L"),
    "TP FSDP2": Layout(tensor="a", data="b", wrapper="fsdp2", layers="N"),
    "EP DDP": Layout(expert="a", data="b", wrapper="ddp", layers="N"),
    "EP FSDP2": Layout(expert="a", data="b", wrapper="fsdp2", layers="N"),
    "SP, TP, EP on the axis of SP": Layout(sequence="a", expert="a", tensor="b"),
    "SP, FSDP2, EP on its axis": Layout(sequence="a", expert="b", data="b", wrapper="fsdp2"),
    "SP, EP, FSDP2 on one axis": Layout(
        sequence="a", expert="a", wrapper="fsdp2", wrapped="a", layers="N"
    ),
    "TP, DDP, EP on its axis": Layout(tensor="a", expert="b", data="b", wrapper="ddp", layers="N"),
}
PIPELINES = {
    "PP SP": Layout(sequence="b"),
    "PP TP": Layout(tensor="b"),
    "PP EP": Layout(expert="b"),
    "PP FSDP2": Layout(data="b", wrapper="fsdp2"),
}


@dataclass
class Reference:
    """One rank's loss at each step, and its weights after the last."""

    losses: list[Tensor] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


def new_model(layers: str = "LN") -> LinearMoEForCausalLM:
    torch.manual_seed(0)
    config = replace(CONFIG, num_layers=len(layers), layer_pattern=layers)
    return LinearMoEForCausalLM(config).to(device())


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(0, 32, (2, ROWS, LENGTH), generator=generator).to(device()))  # type: ignore[misc]
        for _ in range(STEPS)
    ]


def optimiser_of(model: nn.Module) -> torch.optim.Optimizer:
    """One group of all parameters: beside FSDP2's, experts are plain tensors (data_parallel)."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def reference(layers: str) -> Reference:
    model, result = new_model(layers), Reference()
    optimiser = optimiser_of(model)
    for ids, labels in batches():
        loss = model(ids, labels).loss
        loss.backward()
        result.losses.append(loss.detach())
        optimiser.step()
        optimiser.zero_grad()
    result.weights = {n: p.detach() for n, p in model.named_parameters()}
    return result


def own_tokens(mesh: DeviceMesh, layout: Layout, x: Tensor) -> Tensor:
    """This rank's rows and tokens of x [rows, tokens]."""
    for axis in layout.rows:
        x = x.chunk(2, 0)[mesh.get_local_rank(axis)]
    if layout.sequence:
        x = x.chunk(2, 1)[mesh.get_local_rank(layout.sequence)]
    return x.contiguous()


def prepare(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """Cut, compile, wrap; gives what is called."""
    if layout.expert or layout.tensor:
        lmoe.parallelize(model, mesh, expert_parallel=layout.expert, tensor_parallel=layout.tensor)
    lmoe.compile_blocks(model, mesh=mesh, **layout.options)
    if layout.wrapper:
        return lmoe.data_parallel(model, mesh, layout.wrapped, wrapper=layout.wrapper)
    return model


def train(mesh: DeviceMesh, layout: Layout, one: Reference) -> None:
    model = new_model(layout.layers)
    call = prepare(model, mesh, layout)
    optimiser = optimiser_of(model)
    for batch, expected in zip(batches(), one.losses, strict=True):
        loss = call(*(own_tokens(mesh, layout, x) for x in batch)).loss
        loss.backward()
        close(loss.detach(), expected, "loss")
        optimiser.step()
        optimiser.zero_grad()
    compare_weights(model, one.weights)


def compare_weights(model: nn.Module, whole: dict[str, Tensor]) -> None:
    cuts = cuts_of(model)
    for name, parameter in model.named_parameters():
        got, expected = parameter.detach(), whole[name]
        for taken in cuts.get(name, ()):
            expected = taken.take(expected)
        close(got.full_tensor() if isinstance(got, DTensor) else got, expected, name)


class Stage(nn.Module):
    """Half of a model, as a chain of its child modules."""

    def __init__(self, model: LinearMoEForCausalLM, last: bool) -> None:
        super().__init__()
        half = CONFIG.num_layers // 2
        self.first = nn.Identity() if last else model.embed
        self.layers = nn.ModuleList(model.layers[half:] if last else model.layers[:half])
        self.last = nn.Sequential(model.norm, model.lm_head) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x, _ = layer(x)
        return self.last(x)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def stage_of(mesh: DeviceMesh, layout: Layout, whole: nn.Module) -> tuple[Stage, dict[str, Tensor]]:
    """This rank's stage, cut, compiled and wrapped, and the whole model's weights under the stage's names."""
    model = new_model()
    names = {id(p): name for name, p in model.named_parameters()}
    stage = Stage(model, last=mesh.get_local_rank("a") == 1)
    weights = {n: whole.get_parameter(names[id(p)]).detach() for n, p in stage.named_parameters()}
    prepare(stage, mesh, layout)
    return stage, weights


def schedule_of(mesh: DeviceMesh, layout: Layout, stage: Stage, ids: Tensor) -> ScheduleGPipe:
    """Two stages over axis "a", two microbatches of `ids`."""
    part, index = ids.chunk(2)[0].to("meta"), mesh.get_local_rank("a")
    hidden, logits = (
        torch.empty(*part.shape, size, device="meta", requires_grad=True)
        for size in (CONFIG.hidden_size, CONFIG.vocab_size)
    )
    piece = PipelineStage(
        stage,
        index,
        2,
        torch.device("cpu"),
        input_args=(hidden if index else part,),
        output_args=(logits if index else hidden,),
        group=mesh.get_group("a"),
    )
    options = layout.options | {"tensor_parallel": None, "expert_parallel": None}
    options["data_parallel"] = tuple(layout.rows) or None
    return ScheduleGPipe(piece, 2, loss_fn=lmoe.compile(cross_entropy, mesh=mesh, **options))


def pipeline(mesh: DeviceMesh, layout: Layout) -> None:
    """Without the losses of routers, which are not on the last stage."""
    whole = new_model()
    stage, weights = stage_of(mesh, layout, whole)
    schedule = schedule_of(mesh, layout, stage, own_tokens(mesh, layout, batches()[0][0]))
    optimisers = [optimiser_of(m) for m in (whole, stage)]
    for batch in batches():
        expected = cross_entropy(whole(batch[0]).logits, batch[1])
        expected.backward()
        ids, labels = (own_tokens(mesh, layout, x) for x in batch)
        losses: list[Tensor] = []
        if mesh.get_local_rank("a") == 0:
            schedule.step(ids)
        else:
            schedule.step(target=labels, losses=losses)
            close(torch.stack(losses).mean(), expected.detach(), "loss")
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    compare_weights(stage, weights)


def all_layouts(rank: int, size: int, layouts: dict[str, Layout]) -> None:
    """On a mesh of two axes, the second of two ranks."""
    mesh = mesh_of(a=size // 2, b=2)
    references = {layers: reference(layers) for layers in ("LN", "L", "N")}
    for name, layout in layouts.items():
        torch._dynamo.reset()
        try:
            if name in PIPELINES:
                pipeline(mesh, layout)
            else:
                train(mesh, layout, references[layout.layers])
        except Exception as error:
            raise AssertionError(f"rank {rank}, {name}: {error}") from error
        dist.barrier()


@pytest.mark.slow
def test_pairs_and_triples_equal_one_rank() -> None:
    run_processes(4, all_layouts, LAYOUTS | PIPELINES)
