"""The processes of a run: a grid of dp x sp ranks, started by torchrun, or one process alone.

    torchrun --nproc-per-node 4 -m lmoe_compiler.cli train --sp 2 --ep 2 --dp 2

    rank = row * sp + shard     a rank trains on its rows of the batch (dp) and its part of their tokens (sp)
    ep                          experts are spread over ranks that are there anyway: those of a sequence (ep = sp),
                                those of the same part of other rows (ep = dp), or all of them (ep = dp sp)

Losses and router statistics are those of the whole batch on every rank, and a gradient is a rank's share of the one
loss. So gradients are summed, never averaged: over all ranks, and those of experts over the ranks that hold the same
ones. Everything that a person sees is written by the first rank.

A rank that dies breaks the next collective of the others, which end with CollectiveFailed; torchrun ends what is left
after its 30 s. A rank that hangs is waited for `--timeout` seconds (what is different on
GPUs: runtime/failures.py). `lmoe train --resume` goes on from the last checkpoint, on any grid: it is that of the
flags, not the one that saved.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import lmoe_compiler
from lmoe_compiler.errors import InvalidTraining
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.runtime import collectives
from lmoe_compiler.runtime.failures import explained, named
from lmoe_compiler.runtime.join import join as join_processes
from lmoe_compiler.runtime.mesh import axis_of
from lmoe_compiler.train.config import TrainConfig
from lmoe_compiler.train.machine import pick_device

T = TypeVar("T")
AXES = ("dp", "sp")


@dataclass
class Ranks:
    """This process among those of its run. Without a mesh it is alone, and nothing is communicated.

    `experts`: the axes that experts are spread over.
    """

    mesh: DeviceMesh | None = None
    experts: tuple[str, ...] = ()
    index: int = 0
    _cut: frozenset[str] = field(default=frozenset(), init=False)

    @property
    def size(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def first(self) -> bool:
        return self.index == 0

    @property
    def options(self) -> dict[str, Any]:
        """Those of `lmoe.compile`."""
        if self.mesh is None:
            return {}
        return {
            "mesh": self.mesh,
            "data_parallel": "dp",
            "sequence_parallel": "sp" if self.mesh["sp"].size() > 1 else None,
            "expert_parallel": self.experts or None,
            # check_layout has seen to it.
            "even_tokens": True,
            # Once a step, after all of its batches: `sum_gradients` below.
            "sum_gradients": False,
        }

    # -- plain values ----------------------------------------------------------------------------

    def all(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def by_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all ranks; none goes on before that. Its error is everyone's."""
        if self.mesh is None:
            return make()
        made: list[Any] = [None, None]
        if self.first:
            try:
                made[0] = make()
            except Exception as error:
                made[1] = error
        dist.broadcast_object_list(made)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def of_first(self, value: float) -> float:
        """The first rank's number."""
        return self._total(value if self.first else 0.0, "the first rank's clock")

    def any(self, value: bool) -> bool:
        return bool(self._total(float(value), "whether to stop"))

    def _total(self, value: float, purpose: str) -> float:
        if self.mesh is None:
            return value
        wide = torch.tensor([value], dtype=torch.float64, device=self.mesh.device_type)
        return float(self._sum(wide, AXES, purpose))

    def _sum(self, x: Tensor, axes: tuple[str, ...], purpose: str) -> Tensor:
        assert self.mesh is not None
        group = axis_of(self.mesh, *axes).groups["numbers"]
        return collectives.all_reduce(x, named(group, f"lmoe train: {purpose}"))

    # -- batches ---------------------------------------------------------------------------------

    def mine(self, batch: Tensor) -> Tensor:
        """This rank's rows and tokens [B / dp, T / sp] of a batch [B, T]; a view."""
        if self.mesh is None:
            return batch
        for dim, axis in enumerate(AXES):
            batch = batch.chunk(self.mesh[axis].size(), dim)[self.mesh.get_local_rank(axis)]
        return batch

    def assemble(self, mine: Tensor, shape: Sequence[int]) -> Tensor:
        """The whole [B, T] of which every rank has its part."""
        if self.mesh is None:
            return mine
        whole = mine.new_zeros(tuple(shape))
        self.mine(whole).copy_(mine)
        return self._sum(whole, AXES, "held-out text")

    # -- the model -------------------------------------------------------------------------------

    def spread(self, model: LinearMoEForCausalLM) -> None:
        """Keep this rank's experts only."""
        if self.mesh is None or not self.experts:
            return
        whole = {name: parameter.shape for name, parameter in model.named_parameters()}
        lmoe_compiler.parallelize(model, self.mesh, expert_parallel=self.experts)
        own = model.named_parameters()
        self._cut = frozenset(name for name, p in own if p.shape != whole[name])

    def as_global(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their parameter's name; those of experts as rows of a global DTensor that shares their memory."""
        if self.mesh is None:
            return dict(tensors)
        placements = [Shard(0) if axis in self.experts else Replicate() for axis in AXES]
        return {
            name: DTensor.from_local(x, self.mesh, placements, run_check=False)
            if name in self._cut and x.dim()
            else x
            for name, x in tensors.items()
        }

    def whole(self, model: LinearMoEForCausalLM) -> LinearMoEForCausalLM:
        """The model with all of its experts, on every rank: for text and for finding faults."""
        if not self._cut:
            return model
        state = self.as_global(model.state_dict())
        whole = LinearMoEForCausalLM(model.config).to(model.embed.weight.device)
        whole.load_state_dict(
            {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in state.items()}
        )
        return whole

    # -- gradients -------------------------------------------------------------------------------

    def _parts(self, model: nn.Module) -> list[tuple[str, list[Tensor], tuple[str, ...]]]:
        """(what, gradients, axes whose ranks hold the same ones) of replicated weights and of experts."""
        grads: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                grads[name in self._cut].append(parameter.grad)
        copies = tuple(axis for axis in AXES if axis not in self.experts)
        return [("weights", grads[0], AXES), ("experts", grads[1], copies)]

    @torch.no_grad()
    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the shares of all ranks, as one tensor."""
        if self.mesh is None:
            return
        for what, grads, axes in self._parts(model):
            if grads and axes:
                total = self._sum(
                    torch.cat([g.flatten() for g in grads]), axes, f"gradients of {what}"
                )
                parts = total.split([g.numel() for g in grads])
                torch._foreach_copy_(
                    grads, [part.view_as(g) for part, g in zip(parts, grads, strict=True)]
                )

    @torch.no_grad()
    def clip_gradients(self, model: nn.Module, limit: float) -> Tensor:
        """Scale the gradient down to the norm `limit`; its norm before, that of the whole model."""
        if not self._cut:
            return nn.utils.clip_grad_norm_(model.parameters(), limit)
        (_, weights, _), (_, experts, _) = self._parts(model)
        of_experts = nn.utils.get_total_norm(experts).square()
        of_experts = self._sum(of_experts, self.experts, "norm of the experts' gradients")
        norm = (nn.utils.get_total_norm(weights).square() + of_experts).sqrt()
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
        return norm


@contextmanager
def join(config: TrainConfig) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, until the block ends; alone without torchrun."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(config, size)
    if size == 1:
        yield Ranks()
        return
    device = join_processes(pick_device(config.device).type, timedelta(seconds=config.timeout))
    mesh = init_device_mesh(device.type, (size // config.sp, config.sp), mesh_dim_names=AXES)
    with explained():
        yield Ranks(mesh, expert_axes(config, size), dist.get_rank())
    # Not after an error: the others may be gone, and the process ends anyway.
    dist.destroy_process_group()


def expert_axes(config: TrainConfig, size: int) -> tuple[str, ...]:
    """The axes whose ranks make `ep`."""
    sizes: dict[tuple[str, ...], int] = {
        (): 1,
        ("sp",): config.sp,
        ("dp",): size // config.sp,
        AXES: size,
    }
    for axes, ranks in sizes.items():
        if ranks == config.ep:
            return axes
    raise InvalidTraining(
        f"experts cannot be spread over ep={config.ep} ranks",
        why=f"of sp={config.sp} and dp={size // config.sp} that is possible over "
        f"{', '.join(map(str, sorted(set(sizes.values()))))}: none, sp, dp, or all ranks",
        try_=f"--ep {size}",
    )


def check_layout(config: TrainConfig, size: int) -> None:
    """Raise InvalidTraining unless the flags make a grid of `size` processes that divides the batch."""
    wanted = config.sp * (config.dp or max(1, size // config.sp))
    if wanted != size:
        raise InvalidTraining(
            f"sp={config.sp} and dp={config.dp or 'the rest'} do not make {size} processes",
            why="every rank has its rows of the batch (dp) and its part of their tokens (sp)",
            try_=f"torchrun --nproc-per-node {wanted} -m lmoe_compiler.cli train "
            f"--sp {config.sp} --ep {config.ep} --dp {wanted // config.sp}",
        )
    expert_axes(config, size)
    for name, count in (("batch_size", size // config.sp), ("sequence_length", config.sp)):
        value = getattr(config, name)
        if value % count:
            raise InvalidTraining(
                f"{name}={value} on {count} ranks",
                why="every rank has as many rows and as many tokens as the others",
                try_=f"--{name.replace('_', '-')} {-(-value // count) * count}",
            )
    if size > 1 and config.compiler == "none":
        raise InvalidTraining(
            f"compiler='none' on {size} ranks",
            why="what ranks say to each other is put into the model by the compiler",
            try_="--compiler aot_eager",
        )
