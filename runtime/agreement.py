"""Ranks compare what they compiled before the first collective of it, through the store that joined them.

A rank with another model, other options or other shapes would hang all of them in a collective; here it is an error.
"""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import torch.distributed as dist

from lmoe_compiler.errors import WrongOnRanks
from lmoe_compiler.runtime.mesh import Axis

_compiled: Counter[str] = Counter()


def agree(signature: str, axis: Axis, seconds: float = 120.0) -> None:
    """Raise on every rank of the axis if one of them compiled a graph with other collectives, or none at all."""
    if not dist.is_initialized() or dist.get_backend() in ("fake", "threaded"):
        return
    group = axis.groups["numbers"]
    index = _compiled[group]
    _compiled[group] += 1
    store = dist.distributed_c10d._get_default_store()
    keys = [f"lmoe/{group}/{index}/{rank}" for rank in range(axis.size)]
    store.set(keys[axis.index], signature)
    for rank, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            raise WrongOnRanks(
                f"rank {rank} of axis {axis.name!r} did not compile graph {index} in {seconds:.0f} s",
                why="every rank has to compile the same graphs in the same order",
                try_="the same model, options and kinds of inputs on all ranks",
            ) from error
        if store.get(key).decode() != signature:
            raise WrongOnRanks(
                f"ranks {axis.index} and {rank} of axis {axis.name!r} compiled different collectives",
                where=f"graph {index}",
                why="they would wait for each other for ever",
                try_="the same model, options and kinds of inputs on all ranks",
            )
