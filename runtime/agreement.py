"""Ranks compare what they compiled before the first collective of it, through the store that joined them.

A rank with another model, other options or other shapes would hang all of them in a collective; here it is an error,
and so is a rank whose compilation failed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from itertools import zip_longest

import torch.distributed as dist

from lmoe_compiler.errors import RanksDisagree
from lmoe_compiler.runtime.mesh import Axis

_compiled: Counter[str] = Counter()
_FAILED = "failed: "


def agree(text: str, axis: Axis, seconds: float = 120.0) -> None:
    """Raise on every rank of the axis if one of them compiled a graph with other collectives, or none at all.

    `text` has a line for each collective; ranks compare its hash, and read each other's lines only where they differ.
    """
    if not _ranks_can_talk():
        return
    store = dist.distributed_c10d._get_default_store()
    graph, keys = _keys(axis)
    own = hashlib.sha256(text.encode()).hexdigest()
    store.set(f"{keys[axis.index]}/text", text)
    store.set(keys[axis.index], own)
    for rank, key in enumerate(keys):
        try:
            store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            raise RanksDisagree(
                f"rank {rank} of axis {axis.name!r} did not compile graph {graph} in {seconds:.0f} s",
                why="every rank has to compile the same graphs in the same order",
                try_="the same model, options and kinds of inputs on all ranks",
            ) from error
        found = store.get(key).decode()
        if found.startswith(_FAILED):
            raise RanksDisagree(
                f"rank {rank} of axis {axis.name!r} could not compile graph {graph}",
                why=found.removeprefix(_FAILED),
                try_="what its own error says",
            )
        if found != own:
            texts = {axis.index: text, rank: store.get(f"{key}/text").decode()}
            compare(texts, axis.name, graph)


def give_up(error: Exception, axis: Axis) -> None:
    """Tell the others, who wait in `agree`, that this rank has no graph."""
    if _ranks_can_talk():
        _, keys = _keys(axis)
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[axis.index], f"{_FAILED}{error}")


def compare(texts: Mapping[int, str], axis: str, graph: int = 0) -> None:
    """Raise at the first line in which the collectives of two ranks differ; the line names the layer."""
    (first, expected), *others = texts.items()
    for rank, text in others:
        for ours, theirs in zip_longest(expected.splitlines(), text.splitlines(), fillvalue="none"):
            if ours != theirs:
                raise RanksDisagree(
                    f"ranks {first} and {rank} of axis {axis!r} compiled different collectives",
                    where=f"graph {graph}: {ours}   against   {theirs}",
                    why="they would wait for each other for ever",
                    try_="the same model, options and kinds of inputs on all ranks",
                )


def _ranks_can_talk() -> bool:
    return dist.is_initialized() and dist.get_backend() not in ("fake", "threaded")


def _keys(axis: Axis) -> tuple[int, list[str]]:
    """The number of the graph that is being compiled, and the key of each rank for it."""
    group = axis.groups["numbers"]
    index = _compiled[group]
    _compiled[group] += 1
    return index, [f"lmoe/{group}/{index}/{rank}" for rank in range(axis.size)]
