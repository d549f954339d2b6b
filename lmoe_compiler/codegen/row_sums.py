"""Gradients of numbers, one a token or a chunk, from what scans leave of their terms.

    dbeta   sum_K k (S dy + ...), in parts  forward          + sum_V v dy    parallel
    dg      sums from each row on of        forward          + reverse       + parallel, + <S, d.S> (inner_products.py)

Such a gradient is a sum of terms under running sums, sums over rows or factors of rows. Terms that the same scan
writes, and that enter everything alike, are one value in memory.
Used by recomputing.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmoe_compiler.codegen.gradient_scans import Scans
from lmoe_compiler.codegen.inner_products import InnerProduct
from lmoe_compiler.codegen.plan import Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import factors_of, signed, terms_of
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import ROW, Attr, Node

SUMS = frozenset({"add", "sub", "neg"})

Step = tuple[str, tuple[Node | None, ...], tuple[tuple[str, Attr], ...]]
"""A linear operation on numbers of rows: its name, its operands, None for these numbers, and its attributes."""

Steps = tuple[Step, ...]
"""In the order in which they are applied."""

Use = tuple[int, Steps]
"""In which of the roots a term enters, and through what."""

KNOWN = -1
"""In the place of a scan: a term that is known without one."""

Alike = tuple[int | None, int, tuple[tuple[Use, int], ...]]
"""Which scan a term needs, None if none can write it, how many axes it has, and how often it is used for what."""


@dataclass
class RowSums:
    """Takes sums apart; `products` are the inner products that are known as leaves."""

    build: Builder
    scans: Scans
    products: Sequence[InnerProduct]

    def of(self, roots: Sequence[Node]) -> list[Node]:
        """The roots by what scans leave, which is given to the scans."""
        sums: dict[Use, list[tuple[int, Node]]] = {}
        for number, ((_, _, uses), members) in enumerate(self.alike(roots).items()):
            node = signed(self.build, members)
            scan = self.last(node)
            if scan is not None:
                self.scans.scans[scan].stores.append(Store(node, self.value(f"sum_{number}", node)))
            for use, count in uses:
                sums.setdefault(use, []).extend([(1 if count > 0 else -1, node)] * abs(count))
        found: list[list[tuple[int, Node]]] = [[] for _ in roots]
        for (root, steps), terms in sums.items():
            found[root].append((1, self.applied(steps, terms)))
        return [signed(self.build, own) if own else self.build.const(0.0) for own in found]

    def alike(self, roots: Sequence[Node]) -> dict[Alike, list[tuple[int, Node]]]:
        """Terms with their signs, those together that can be one value: uses are alike up to one sign."""
        counts: dict[Node, Counter[Use]] = {}
        for number, root in enumerate(roots):
            for sign, steps, term in self.terms(root, 1, ()):
                counts.setdefault(term, Counter())[number, steps] += sign
        uses = list(dict.fromkeys(use for counted in counts.values() for use in counted))
        found: dict[Alike, list[tuple[int, Node]]] = {}
        for term, counted in counts.items():
            own = [(use, counted[use]) for use in uses if counted[use]]
            if own:
                sign = 1 if own[0][1] > 0 else -1
                signs = tuple([(use, sign * count) for use, count in own])
                scan = self.last(term) if self.carried(term) else KNOWN
                found.setdefault((scan, len(term.axes), signs), []).append((sign, term))
        return found

    def terms(self, node: Node, sign: int, steps: Steps) -> Iterator[tuple[int, Steps, Node]]:
        """Terms with their signs and what is done to them. Sums that are stored too: their terms may meet others."""
        linear = None if node in self.scans.stored else self.linear(node)
        if node.op in SUMS:
            for each, term in terms_of(node, sign):
                yield from self.terms(term, each, steps)
        elif node in self.scans.stored:
            yield sign, steps, node
        elif node.op == "mul":
            yield from self.product(factors_of(node, self.scans.stored), sign, steps)
        elif linear is not None:
            operands = tuple([None if i == linear else a for i, a in enumerate(node.args)])
            step = (node.op, operands, node.attrs)
            yield from self.terms(node.args[linear], sign, (step, *steps))
        else:
            yield sign, steps, node

    def linear(self, node: Node) -> int | None:
        """Which operand, a number a row, a node is linear in, beside what is known."""
        moving = [i for i, a in enumerate(node.args) if self.carried(a)]
        if len(moving) != 1 or not {*node.args[moving[0]].axes} <= {ROW}:
            return None
        (i,) = moving
        others = [a for a in node.args if a is not node.args[i]]
        if node.op in ("prefix", "suffix"):
            return i
        if node.op == "sum":
            return i if node["axis"] == ROW else None
        if node.op == "where":
            zero = [a for a in others[1:] if a.op == "const" and a["value"] == 0.0]
            return i if i > 0 and zero else None
        return i if node.op == "div" and i == 0 else None

    def product(
        self, factors: list[Node], sign: int, steps: Steps
    ) -> Iterator[tuple[int, Steps, Node]]:
        """A product that no scan can write, without the factors that are known."""
        factors = self.with_leaves(factors)
        for factor in factors:
            if factor.op in SUMS and factor not in self.scans.stored and self.carried(factor):
                others = list(factors)
                others.remove(factor)
                for each, term in terms_of(factor, sign, self.scans.stored):
                    parts = [*others, *factors_of(term, self.scans.stored)]
                    yield from self.product(parts, each, steps)
                return
        term = self.build.product(factors)
        known = [f for f in factors if {*f.axes} <= {ROW} and not self.carried(f)]
        rest = [f for f in factors if f not in known]
        if known and len(rest) == 1 and self.last(term) is None:
            own: Steps = tuple([("mul", (f, None), ()) for f in known])
            yield from self.terms(rest[0], sign, (*own, *steps))
        else:
            yield sign, steps, term

    def with_leaves(self, factors: list[Node]) -> list[Node]:
        """The factors, f <S, d.S'> as a leaf."""
        for product in self.products:
            sums = [f for f in factors if _summed(f) == product.node]
            if sums and product.factor in factors:
                rest = list(factors)
                rest.remove(sums[0])
                rest.remove(product.factor)
                return [*rest, product.past]
        return factors

    def applied(self, steps: Steps, terms: list[tuple[int, Node]]) -> Node:
        node = signed(self.build, terms)
        for op, operands, attrs in steps:
            args = [node if a is None else a for a in operands]
            node = self.build.make(op, *args, like=node, **dict(attrs))
        return node

    def carried(self, node: Node) -> bool:
        return any(self.scans.depends.get(n) for n in closure([node], self.scans.stored))

    def last(self, node: Node) -> int | None:
        """The last scan that can write a term; None if none can."""
        return self.scans.last(Store(node, self.value("", node)))

    def value(self, name: str, node: Node) -> Value:
        return Value(name, (), "vector" if ROW in node.axes else "chunk", "fp32")


def _summed(node: Node) -> Node:
    """What a sum over all axes of a state is of."""
    while node.op == "sum" and ROW not in node.axes:
        (node,) = node.args
    return node
