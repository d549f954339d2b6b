"""Which scan of a backward writes which gradient.

A gradient that needs states only, or their gradients only, can be written by a scan that carries these, tiled along an
axis that it does not contract. Where that is so of all, nothing of chunks has to be stored:

    dq   states          forward, keys in tiles
    dk   their gradients reverse, keys in tiles
    dv   their gradients reverse, values in tiles

Before: partition.py's kernels. Used by backward.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lmoe_compiler.codegen.plan import Carry, Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.ir.nodes import Node


@dataclass
class Scan:
    """A scan that may write gradients, and those that it writes.

    position   of the axis that it is tiled along, in what it carries
    without    carried values of the other direction, which it knows nothing of
    """

    carries: Sequence[Carry]
    position: int
    without: frozenset[str]
    stores: list[Store] = field(default_factory=list)

    def writes(
        self, store: Store, stored: Mapping[Node, Value], depends: Mapping[Node, frozenset[str]]
    ) -> bool:
        """Whether it can write a gradient: tiled as what it carries."""
        if depends[store.node] & self.without:
            return False
        scan = closure([carry.following for carry in self.carries], stored)
        axes = dict.fromkeys(carry.axes[self.position] for carry in self.carries if carry.axes)
        tiled = [a for a in axes if _uncontracted(scan, a, stored)]
        own = closure([store.node], stored)
        return bool(tiled) and all(
            axis in store.value.axes and _uncontracted(own, axis, stored) for axis in tiled
        )


def _uncontracted(nodes: Sequence[Node], axis: str, stored: Mapping[Node, Value]) -> bool:
    """Whether each tile of the axis needs nothing of the others. (No kernel has running sums over rows of a tile.)"""
    found = split(nodes, axis, stored)
    running = (n for n in nodes if n.op in ("prefix", "suffix") and n not in stored)
    whole = found is not None and "part" not in found.values()
    return whole and not any(axis in n.axes for n in running)


def shared_out(
    outputs: Sequence[Store],
    scans: Sequence[Scan],
    stored: Mapping[Node, Value],
    depends: Mapping[Node, frozenset[str]],
) -> list[Store]:
    """Gives each gradient to the first scan that can write it; those that none can."""
    late: list[Store] = []
    for store in outputs:
        scan = next((s for s in scans if s.writes(store, stored, depends)), None)
        (scan.stores if scan else late).append(store)
    return late
