"""Which scan of a backward writes which gradient.

A gradient that needs states only, or their gradients only, can be written by a scan that carries these, tiled along an
axis that it does not contract. Where that is so of all, nothing of chunks has to be stored:

    dq   states          forward, keys in tiles
    dk   their gradients reverse, keys in tiles
    dv   their gradients reverse, values in tiles

A gradient that needs both is a sum of terms that need one each, once the solves' results are rows in memory. A scan
leaves the sum of its terms; the last one adds what the others left, and row sums are added up at the end:

    dk      -beta S dy - ...                forward          + y d.S + ...   reverse
    dbeta   sum_K k (S dy + ...), in parts  forward          + sum_V v dy    reverse, values in tiles

Before: partition.py's kernels. Used by backward.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmoe_compiler.codegen.plan import Carry, Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import signed, sum_of_products, terms_of
from lmoe_compiler.codegen.tile import Builder
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
        """Whether it can write a gradient: tiled as what it carries, or a number a token summed over its tiles."""
        if any(depends.get(n, frozenset()) & self.without for n in closure([store.node], stored)):
            return False
        scan = closure([carry.following for carry in self.carries], stored)
        axes = dict.fromkeys(carry.axes[self.position] for carry in self.carries if carry.axes)
        tiled = [a for a in axes if _uncontracted(scan, a, stored)]
        own = closure([store.node], stored)
        if not store.value.axes:
            return bool(tiled) and all(_summed(own, axis, stored) for axis in tiled)
        return bool(tiled) and all(
            axis in store.value.axes and _uncontracted(own, axis, stored) for axis in tiled
        )


def _uncontracted(nodes: Sequence[Node], axis: str, stored: Mapping[Node, Value]) -> bool:
    """Whether each tile of the axis needs nothing of the others."""
    found = split(nodes, axis, stored)
    return found is not None and "part" not in found.values() and not _running(nodes, axis, stored)


def _summed(nodes: Sequence[Node], axis: str, stored: Mapping[Node, Value]) -> bool:
    """Whether the last of `nodes` is a sum of one term for each tile of the axis."""
    found = split(nodes, axis, stored)
    return found is not None and found[nodes[-1]] == "part" and not _running(nodes, axis, stored)


def _running(nodes: Sequence[Node], axis: str, stored: Mapping[Node, Value]) -> bool:
    """Whether rows of a tile are summed up one after another, which no kernel does."""
    running = (n for n in nodes if n.op in ("prefix", "suffix") and n not in stored)
    return any(axis in n.axes for n in running)


def shared_out(
    outputs: Sequence[Store],
    scans: Sequence[Scan],
    stored: Mapping[Node, Value],
    depends: Mapping[Node, frozenset[str]],
    in_terms: bool = False,
) -> list[Store]:
    """Gives each gradient, or `in_terms` its terms, to a scan that can write it; what remains to be computed.

    Those of `scans` that are tiled along the same axes are in the order in which they run.
    """
    late: list[Store] = []
    for store in outputs:
        scan = next((s for s in scans if s.writes(store, stored, depends)), None)
        if scan and store.value.axes:
            scan.stores.append(store)
        else:
            rest = _in_terms(store, scans, stored, depends) if in_terms else store
            late += [rest] if rest else []
    return late


def _in_terms(
    store: Store,
    scans: Sequence[Scan],
    stored: Mapping[Node, Value],
    depends: Mapping[Node, frozenset[str]],
) -> Store | None:
    """Each term to the last scan that can write it. A gradient one of whose terms none can remains as it is, and of
    row sums that several scans leave, their sum.
    """
    if not store.value.axes and store.value.per != "row":
        return store
    build = Builder()
    found: dict[int, list[tuple[int, Node]]] = {}
    for sign, term in terms_of(store.node, 1, stored):
        term = sum_of_products(build, term)
        one = replace(store, node=term)
        able = [i for i, s in enumerate(scans) if s.writes(one, stored, depends)]
        if not able:
            return store
        found.setdefault(able[-1], []).append((sign, term))
    total: Node | None = None
    for i in sorted(found):
        own = signed(build, found[i])
        total = own if total is None else build.make("add", total, own)
        if store.value.axes:
            # What the scans before it left is where the sum goes.
            scans[i].stores.append(replace(store, node=total))
        else:
            part = Value(f"{store.value.name}_{i}", (), "vector", "fp32")
            scans[i].stores.append(Store(own, part))
    assert total is not None
    return None if store.value.axes else replace(store, node=total)
