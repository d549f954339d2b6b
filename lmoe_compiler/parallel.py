"""Spreading a model over ranks: what has to happen outside of the compiled graph.

    mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("sp",))
    lmoe.parallelize(model, mesh, expert_parallel="sp")      # before the optimiser is made
    model = lmoe.compile(model, mesh=mesh, sequence_parallel="sp", expert_parallel="sp")

Each rank passes its own contiguous shard of the sequence; along an axis that is not the sequence's
ranks pass other rows of the batch. Everything else is done by passes:

    axes                                     a replicated parameter's      an expert's gradient
                                             gradient is summed over       is summed over
    sequence_parallel="sp", experts too      sp                            nothing
    sequence_parallel="sp", experts="ep"     sp x ep                       sp
    data_parallel="dp", experts="ep"         dp x ep                       dp
    data_parallel="dp", experts too          dp                            nothing
    "sp" and "dp", experts=("sp", "dp")      sp x dp                       nothing

Experts need no sum over the axes that they are cut over: the rows of all ranks there came to them.
Next: cuts.py, what a rank keeps of a parameter.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lmoe_compiler.config import CompileOptions
from lmoe_compiler.cuts import Part, cut, located, share
from lmoe_compiler.errors import InvalidOption, NotShardable
from lmoe_compiler.runtime.mesh import Axis, axis_of

M = TypeVar("M", bound=nn.Module)


def parallelize(
    model: M,
    mesh: DeviceMesh,
    *,
    expert_parallel: str | tuple[str, ...] | None = None,
    tensor_parallel: str | None = None,
) -> M:
    """Keep this rank's part of the weights only, in place: names of mesh axes say what is cut over which ranks.

    expert_parallel: an axis or several as one; rows [i E/P, (i+1) E/P) of every expert weight, which is a 3-D parameter
    of a module that has a `router`. tensor_parallel: an axis; heads and hidden channels of every layer that has
    `tensor_parts(ranks)`, which says what parameters they own (models/mixers.py); other weights stay whole. Call it on
    every rank with equal weights, before the optimiser is made and before DDP or fully_shard. Raises NotShardable where
    a size is not a multiple of the ranks.
    """
    if expert_parallel is None and tensor_parallel is None:
        raise InvalidOption(
            "parallelize was told no axis",
            why="it cuts experts, or heads and hidden channels, over an axis of the mesh",
            try_=f'lmoe.parallelize(model, mesh, expert_parallel="{(mesh.mesh_dim_names or ("ep",))[0]}")',
        )
    if expert_parallel is not None:
        names = (expert_parallel,) if isinstance(expert_parallel, str) else expert_parallel
        _cut_experts(model, axis_of(mesh, *names))
    if tensor_parallel is not None:
        _cut_layers(model, axis_of(mesh, tensor_parallel))
    return model


def _cut_experts(model: nn.Module, axis: Axis) -> None:
    for path, module in model.named_modules():
        if not hasattr(module, "router"):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() != 3:
                continue
            with located(f"{path}.{name}"):
                share(parameter.shape[0], axis.size, "experts")
            cut(module, name, Part.even(parameter, 0), axis.name, axis.index, axis.size)


def _cut_layers(model: nn.Module, axis: Axis) -> None:
    layers = [(path, m) for path, m in model.named_modules() if hasattr(m, "tensor_parts")]
    if not layers:
        raise NotShardable(
            f"{type(model).__name__} has no layer that can be cut over axis {axis.name!r}",
            why="tensor parallelism asks each layer for tensor_parts(ranks), the parameters that heads or channels own",
            try_="def tensor_parts(self, ranks): return {'up.weight': Part.even(self.up.weight, 0), ...}",
        )
    for path, layer in layers:
        with located(path):
            parts = layer.tensor_parts(axis.size)
            for name, part in parts.items():
                cut(layer, name, part, axis.name, axis.index, axis.size)


def check_cuts(options: CompileOptions) -> None:
    """Raise InvalidOption if weights are cut over an axis that the compiler is not told of: it would not sum."""
    given = (options.expert_axes, (options.tensor_parallel,) if options.tensor_parallel else ())
    told = {axis_of(options.mesh, *names).name for names in given if names}
    for name, cuts in options.cuts.items():
        for cut_ in cuts:
            if cut_.axis not in told:
                raise InvalidOption(
                    f"{name} is cut over axis {cut_.axis!r}, and the compiler is not told",
                    why="it puts the sums over the ranks of that axis into the graph",
                    try_="lmoe.compile(model, mesh=mesh, ...) with the axes that lmoe.parallelize was given",
                )
