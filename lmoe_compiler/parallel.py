"""Spreading a model over ranks: what has to happen outside of the compiled graph.

    mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("sp",))
    lmoe.parallelize(model, mesh, expert_parallel="sp")      # before the optimiser is made
    model = lmoe.compile(model, mesh=mesh, sequence_parallel="sp", expert_parallel="sp")

Each rank passes its own contiguous shard of the sequence. Everything else is done by passes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lmoe_compiler.errors import NotShardable
from lmoe_compiler.runtime.mesh import Names, axis_of

M = TypeVar("M", bound=nn.Module)


def parallelize(model: M, mesh: DeviceMesh, *, expert_parallel: Names) -> M:
    """Keep this rank's experts only: rows [i E/P, (i+1) E/P) of every expert weight, in place.

    Expert weights are the 3-D parameters of a module that has a `router`. Call it on every rank
    with equal weights, before the optimiser is made.
    """
    axis = axis_of(mesh, expert_parallel)
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
                    why=f"each rank of axis {expert_parallel!r} holds as many experts as the others",
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
