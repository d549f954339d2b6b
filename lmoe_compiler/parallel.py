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
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lmoe_compiler.errors import NotShardable
from lmoe_compiler.runtime.mesh import axis_of

M = TypeVar("M", bound=nn.Module)


def parallelize(model: M, mesh: DeviceMesh, *, expert_parallel: str | tuple[str, ...]) -> M:
    """Keep this rank's experts only: rows [i E/P, (i+1) E/P) of every expert weight, in place.

    `expert_parallel`: an axis of the mesh, or several as one. Expert weights are the 3-D parameters
    of a module that has a `router`. Call it on every rank with equal weights, before the optimiser
    is made.
    """
    names = (expert_parallel,) if isinstance(expert_parallel, str) else expert_parallel
    axis = axis_of(mesh, *names)
    for path, module in model.named_modules():
        if not hasattr(module, "router"):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() != 3:
                continue
            experts = parameter.shape[0]
            if experts % axis.size:
                raise NotShardable(
                    f"{experts} experts on {axis.size} ranks",
                    where=f"{path}.{name}",
                    why=f"each rank of axis {axis.name} holds as many experts as the others",
                    try_=f"a number of experts that {axis.size} divides, or a smaller axis",
                )
            share = experts // axis.size
            own = parameter.detach().narrow(0, axis.index * share, share).clone()
            setattr(module, name, nn.Parameter(own, requires_grad=parameter.requires_grad))
    return model


def follow_tokens(compiled: Any, sequence_dim: int) -> Any:
    """Let the token axis of the inputs be a symbol, so that passes can tell it from other axes."""

    def mark(args: Any, kwargs: dict[str, Any]) -> None:
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.dim() > sequence_dim:
                torch._dynamo.maybe_mark_dynamic(x, sequence_dim)

    if isinstance(compiled, nn.Module):
        hook = lambda _, args, kwargs: mark(args, kwargs)  # noqa: E731
        compiled.register_forward_pre_hook(hook, with_kwargs=True)
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        mark(args, kwargs)
        return compiled(*args, **kwargs)

    return call
