"""Axes of a DeviceMesh as passes need them: size, this rank's place, and a process group for each
kind of traffic.

A wait on one collective of a group also waits for all earlier ones of it, so state exchange, tokens
(keys, halos), experts and small statistics each have their own group. They are made here, on all
ranks in one order, before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

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


@cache
def axis_of(mesh: DeviceMesh, name: str) -> Axis:
    """The axis of that name, with its own groups; call it on every rank, in the same order."""
    names = mesh.mesh_dim_names or ()
    if name not in names:
        raise InvalidOption(
            f"the mesh has no axis {name!r}",
            where=f"DeviceMesh of shape {tuple(mesh.mesh.shape)}",
            why=f"its axes are {', '.join(names) or 'unnamed'}",
            try_=f'init_device_mesh("cuda", (dp, {name}), mesh_dim_names=("dp", "{name}"))',
        )
    dim = names.index(name)
    size = mesh.mesh.shape[dim]
    rows = mesh.mesh.movedim(dim, -1).reshape(-1, size).tolist()
    groups = {}
    for traffic in TRAFFIC:
        mine, _ = dist.new_subgroups_by_enumeration(rows, group_desc=f"lmoe_{name}_{traffic}")
        groups[traffic] = mine.group_name
    return Axis(name, size, mesh.get_local_rank(name), groups)
