"""Which scan of a backward writes which gradient.

A gradient that needs states only, or their gradients only, can be written by a scan that carries these, tiled along an
axis that it does not contract. Where that is so of all, nothing of chunks has to be stored:

    dq   states          forward, keys in tiles
    dk   their gradients reverse, keys in tiles
    dv   their gradients reverse, values in tiles

A gradient that needs both is a sum of terms that need one each, once the solves' results are rows in memory. A scan
leaves the sum of its terms; the last one adds what the others left. Gradients of numbers are added up at the end from
what scans leave of them (row_sums.py).

    dk      -beta S dy - ...                forward          + y d.S + ...   reverse

Before: partition.py's kernels. Used by backward.py and recomputing.py.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lmoe_compiler.codegen.plan import Carry, Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import factors_of, signed, terms_of
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.ir.nodes import ROW, Node


@dataclass
class Scan:
    """A scan that may write gradients, and those that it writes. Without carries it is a kernel parallel over chunks.

    position   of the axis that it is tiled along, in what it carries
    without    carried values that it knows nothing of
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
        if not self.carries:
            # What is made of numbers alone needs no kernel of its own.
            needed = closure([store.node], stored)
            return not store.value.axes and any({*n.axes} - {ROW} for n in needed)
        scan = closure([carry.following for carry in self.carries], stored)
        axes = dict.fromkeys(carry.axes[self.position] for carry in self.carries if carry.axes)
        tiled = [a for a in axes if _uncontracted(scan, a, stored)]
        own = closure([store.node], stored)
        if not store.value.axes:
            return bool(tiled) and all(_summed(own, axis, stored) for axis in tiled)
        return bool(tiled) and all(
            axis in store.value.axes and _uncontracted(own, axis, stored) for axis in tiled
        )

    def tiled_rows_scaled(self, stored: Container[Node]) -> list[Carry]:
        """What it carries, with row factors on those operands of products over rows whose blocks are tiles.

        The others are read as they lie in memory, which costs no registers.
        """
        tiled = {carry.axes[self.position] for carry in self.carries if carry.axes}
        build, done = Builder(), dict[Node, Node]()
        for node in closure([carry.following for carry in self.carries], stored):
            args = [done[a] for a in node.args] if node not in stored else list(node.args)
            if node.op == "dot" and node["axis"] == ROW and node not in stored:
                args = _scaled(build, args, tiled, stored)
            same = all(x is y for x, y in zip(args, node.args, strict=True))
            done[node] = node if same else build.make(node.op, *args, like=node, **dict(node.attrs))
        return [replace(carry, following=done[carry.following]) for carry in self.carries]


def _scaled(
    build: Builder, operands: list[Node], tiled: Container[str], stored: Container[Node]
) -> list[Node]:
    """The operands of a product over rows, the row factors of one without tiled axes on the other."""
    for whole, other in (operands, operands[::-1]):
        factors = factors_of(whole, stored)
        rows = [f for f in factors if f.axes == (ROW,)]
        rest = [f for f in factors if f.axes != (ROW,)]
        has = [any(a in tiled for a in x.axes) for x in (whole, other)]
        if rows and len(rest) == 1 and has == [False, True]:
            return [rest[0], build.scaled(other, rows)]
    return operands


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


@dataclass
class Scans:
    """Scans in the order in which they run, what lies in memory for them, and which carried values each node needs."""

    scans: Sequence[Scan]
    stored: Mapping[Node, Value]
    depends: Mapping[Node, frozenset[str]]

    def share_out(self, outputs: Sequence[Store]) -> list[Store]:
        """Gives each gradient to the first scan that can write it; what remains to be computed."""
        late: list[Store] = []
        for store in outputs:
            scan = next((s for s in self.scans if s.writes(store, self.stored, self.depends)), None)
            if scan and store.value.axes:
                scan.stores.append(store)
            else:
                late.append(store)
        return late

    def share_terms(self, store: Store) -> bool:
        """Gives each term of a gradient to the last scan that can write it; False, and nothing given, where one has
        none.
        """
        build = Builder()
        found: dict[int, list[tuple[int, Node]]] = {}
        for sign, term in terms_of(store.node, 1, self.stored):
            last = self.last(replace(store, node=term))
            if last is None:
                return False
            found.setdefault(last, []).append((sign, term))
        total: Node | None = None
        for i in sorted(found):
            own = signed(build, found[i])
            # What the scans before it left is where the sum goes.
            total = own if total is None else build.make("add", total, own)
            self.scans[i].stores.append(replace(store, node=total))
        return True

    def last(self, store: Store) -> int | None:
        """The number of the last scan that can write a value."""
        numbered = enumerate(self.scans)
        able = [i for i, s in numbered if s.writes(store, self.stored, self.depends)]
        return able[-1] if able else None
