"""Axes of a DeviceMesh as passes need them: size, this rank's place, and a process group for each
kind of traffic.

A wait on one collective of a group also waits for all earlier ones of it, so state exchange, tokens
(keys, halos), experts and small statistics each have their own group. They are made here, on all
ranks in one order, before anything is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lmoe_compiler.errors import InvalidOption

TRAFFIC = ("state", "tokens", "experts", "numbers")


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh, seen from this rank. `groups`: name of the process group for each kind of
    traffic.
    """

    name: str
    size: int
    index: int
    groups: Mapping[str, str] = field(hash=False)

    @classmethod
    def on_one_group(cls, name: str, size: int, index: int, group: str) -> Axis:
        """All traffic on one group: simulated ranks, dry runs."""
        return cls(name, size, index, dict.fromkeys(TRAFFIC, group))


Names = str | tuple[str, ...]


def names_of(axis: Names | None) -> tuple[str, ...]:
    """Names of mesh axes: one, several that are taken as one, or none."""
    return () if axis is None else (axis,) if isinstance(axis, str) else axis


@cache
def axis_of(mesh: DeviceMesh, axis: Names) -> Axis:
    """The axis of that name, with its own groups; call it on every rank, in the same order.

    Several names are one axis over all of their ranks, the last name running fastest. A collective
    of it gives up after the time that `init_process_group(timeout=)` was told.
    """
    known, names = mesh.mesh_dim_names or (), names_of(axis)
    for name in names:
        if name not in known:
            raise InvalidOption(
                f"the mesh has no axis {name!r}",
                where=f"DeviceMesh of shape {tuple(mesh.mesh.shape)}",
                why=f"its axes are {', '.join(known) or 'unnamed'}",
                try_=f'init_device_mesh("cuda", (dp, {name}), mesh_dim_names=("dp", "{name}"))',
            )
    dims = [known.index(name) for name in names]
    size = math.prod(mesh.mesh.shape[dim] for dim in dims)
    rows = mesh.mesh.movedim(dims, list(range(-len(dims), 0))).reshape(-1, size).tolist()
    groups, title = {}, "_".join(names)
    for traffic in TRAFFIC:
        mine, _ = dist.new_subgroups_by_enumeration(
            rows, timeout=_timeout(mesh.device_type), group_desc=f"lmoe_{title}_{traffic}"
        )
        groups[traffic] = mine.group_name
    index = next(row.index(dist.get_rank()) for row in rows if dist.get_rank() in row)
    return Axis(title, size, index, groups)


def _timeout(device: str) -> timedelta | None:
    """Of the world's collectives: torch would give new groups its default of 10 or 30 minutes."""
    world = dist.group.WORLD
    assert world is not None
    options = getattr(world._get_backend(torch.device(device)), "options", None)
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return timeout
