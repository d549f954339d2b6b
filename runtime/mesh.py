"""Axes of a DeviceMesh as passes need them: size, this rank's place, and a process group for each
kind of traffic.

A wait on one collective of a group also waits for all earlier ones of it, so state exchange, tokens
(keys, halos), experts, small statistics and gradients each have their own group, and so have sizes,
which are numbers in the hosts' memory and travel by gloo. They are made
before anything is compiled, on all ranks in one order, once: `lmoe.parallelize` and `lmoe.compile`
do it, and a compilation only looks them up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lmoe_compiler.errors import InvalidOption

TRAFFIC = ("state", "tokens", "experts", "numbers", "gradients", "sizes")

_LOOKUP_ONLY = ContextVar("lookup_only", default=False)


@dataclass(frozen=True)
class Axis:
    """One axis of a mesh, or several as one, seen from this rank. `groups`: name of the process
    group for each kind of traffic.
    """

    name: str
    size: int
    index: int
    groups: Mapping[str, str] = field(hash=False)

    @classmethod
    def on_one_group(cls, name: str, size: int, index: int, group: str) -> Axis:
        """All traffic on one group: simulated ranks, dry runs."""
        return cls(name, size, index, dict.fromkeys(TRAFFIC, group))


@contextmanager
def lookup_only() -> Iterator[None]:
    """Inside, `axis_of` refuses to make groups: ranks do not compile at the same time."""
    token = _LOOKUP_ONLY.set(True)
    try:
        yield
    finally:
        _LOOKUP_ONLY.reset(token)


@cache
def axis_of(mesh: DeviceMesh, *names: str) -> Axis:
    """The axis of that name, or several as one (the last counts fastest), with its own groups.

    The first call makes the groups: call it on every rank, in the same order. Their collectives
    give up after the time that `init_process_group(timeout=)` was told. Raises InvalidOption
    for a name that the mesh lacks, and for a first call in the middle of a compilation.
    """
    known = mesh.mesh_dim_names or ()
    for name in names:
        if name not in known:
            raise InvalidOption(
                f"the mesh has no axis {name!r}",
                where=f"DeviceMesh of shape {tuple(mesh.mesh.shape)}",
                why=f"its axes are {', '.join(known) or 'unnamed'}",
                try_=f'init_device_mesh("cuda", (dp, {name}), mesh_dim_names=("dp", "{name}"))',
            )
    label = " x ".join(names)
    if _LOOKUP_ONLY.get():
        raise InvalidOption(
            f"axis {label} has no process groups yet",
            where="in the middle of a compilation",
            why="ranks would make them in different orders, and wait for each other for ever",
            try_="lmoe.compile(model, mesh=mesh, ...), which makes them first, on all ranks",
        )
    dims = [known.index(name) for name in names]
    rest = [d for d in range(mesh.mesh.dim()) if d not in dims]
    size = math.prod(mesh.mesh.shape[d] for d in dims)
    rows = mesh.mesh.permute(*rest, *dims).reshape(-1, size).tolist()
    groups = {}
    for traffic in TRAFFIC:
        mine, _ = dist.new_subgroups_by_enumeration(
            rows,
            timeout=_timeout(mesh.device_type),
            group_desc=f"lmoe_{'_'.join(names)}_{traffic}",
            **_backend(mesh.device_type, traffic),
        )
        groups[traffic] = mine.group_name
    rank = dist.get_rank()
    return Axis(label, size, next(row.index(rank) for row in rows if rank in row), groups)


def _backend(device: str, traffic: str) -> dict[str, str]:
    """That of the world, but for numbers that never were on a device."""
    return {"backend": "gloo"} if traffic == "sizes" and device != "cpu" else {}


def _timeout(device: str) -> timedelta | None:
    """Of the world's collectives: torch would give new groups its default of 10 or 30 minutes."""
    world = dist.group.WORLD
    assert world is not None
    if torch.device(device) not in world._device_types:  # simulated ranks
        return None
    options = getattr(world._get_backend(torch.device(device)), "options", None)
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return timeout
