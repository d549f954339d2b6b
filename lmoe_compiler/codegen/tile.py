"""Tile program: a chunk graph rewritten into operations that one Triton statement can print.

In: the nodes of a chunk program or chunk adjoint (lower/program.py). Out: the same nodes, hash-consed, with
solves and decayed products replaced by tile operations, and sizes and constants folded.
Next: partition.py cuts the graph into kernels.

  tile op        operands  attributes        meaning ([C, C] pairs: row t, source s)
  -------------  --------  ----------------  -------------------------------------------------------------
  floor          g         -                 max(g, -104): exp of it is exactly what exp(g) is in fp32, never inf - inf
  between        G         -                 [t, s], G_t - G_s where s < t, else 0; G a running sum of floored log decays
  inverse        l         -                 (I - l)^-1, l strictly lower, by block recursion
  pairs          x         half              x where t is in the upper and s in the lower half of one block of 2 * half
  half_sums      g         half, exclusive   upper rows: sum from the half's start to t; lower rows: sum after t in the half
  half_gather    x         half, exclusive   the transpose of half_sums
  diagonal       x [t]     -                 [t, s], x on the diagonal
  diagonal_of    x [t, s]  -                 [t]

A decayed product references each pair (t, s) to the middle of the dyadic block that separates them
(DESIGN.md section 3): one masked C x C product per level, every exponent a local sum of log decays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce

from lmoe_compiler.ir.nodes import ROW, SOURCE, Attr, Node, topological

LOG_ZERO = -104.0
GATE_OPERAND = {"segment": 0, "decayed": 2, "decayed_rows": 2, "decayed_cols": 2, "decayed_gate": 3}


class Builder:
    """Hash-consing constructor: structurally equal nodes become one object."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[object, ...], Node] = {}

    def make(self, op: str, *args: Node, like: Node | None = None, **attrs: Attr) -> Node:
        items = tuple(sorted(attrs.items()))
        key = (op, items, tuple(id(a) for a in args))
        if key not in self._nodes:
            self._nodes[key] = Node(op, args, items, like.loc if like else None)
        return self._nodes[key]

    def const(self, value: float) -> Node:
        return self.make("const", value=float(value))

    def add(self, terms: Iterable[Node]) -> Node:
        return reduce(lambda x, y: self.make("add", x, y), terms)


def to_tiles(
    roots: Iterable[Node], chunk: int, sizes: Mapping[str, int], exact: bool = False
) -> list[Node]:
    """`roots` rewritten; nodes shared between them stay shared.

    `exact` keeps sums over rows as they are. Otherwise all are differences of one running sum, whose error is
    about 1e-7 of the chunk's total of floored decays: far below a half-precision rounding.
    """
    roots = list(roots)
    build = Builder()
    logs = _log_decays(roots)
    done: dict[Node, Node] = {}
    for node in topological(roots):
        args = [done[a] for a in node.args]
        if not exact and node.op in RUNNING:
            new = RUNNING[node.op](build, node, args[0])
        else:
            new = _rewrite(build, node, args, chunk, sizes)
        if node in logs:
            new = build.make("floor", new, like=node)
        done[node] = new
    return [done[root] for root in roots]


def _log_decays(roots: Iterable[Node]) -> set[Node]:
    """Nodes that are summed as log decays: operands of segments and decayed products."""
    return {n.args[GATE_OPERAND[n.op]] for n in topological(roots) if n.op in GATE_OPERAND}


def _rewrite(build: Builder, node: Node, args: list[Node], chunk: int, sizes: Mapping[str, int]) -> Node:
    if node.op == "size":
        return build.const(sizes[str(node["axis"]).rstrip("'")])
    if node.op == "cast":
        return args[0]
    if all(a.op == "const" for a in args) and node.op in FOLD:
        return build.const(FOLD[node.op](*(float(a["value"]) for a in args)))  # type: ignore[arg-type]
    if node.op in EXPAND:
        return EXPAND[node.op](build, node, args, chunk)
    if node.op == "dot":
        return _dot(build, node, args, sizes)
    return build.make(node.op, *args, like=node, **dict(node.attrs))


def _running(build: Builder, x: Node) -> Node:
    return build.make("prefix", x, inclusive=True)


def _prefix(build: Builder, node: Node, x: Node) -> Node:
    total = _running(build, x)
    return total if node["inclusive"] else build.make("sub", total, x, like=node)


def _suffix(build: Builder, node: Node, x: Node) -> Node:
    after = build.make("sub", build.make("sum", x, axis=ROW), _running(build, x), like=node)
    return build.make("add", after, x) if node["inclusive"] else after


def _segment(build: Builder, node: Node, x: Node) -> Node:
    between = build.make("between", _running(build, x), like=node)
    if not node["exclusive"]:
        return between
    return build.make("causal", build.make("sub", between, x), strict=True)


RUNNING: dict[str, Callable[[Builder, Node, Node], Node]] = {
    "prefix": _prefix,
    "suffix": _suffix,
    "segment": _segment,
}

FOLD: dict[str, Callable[..., float]] = {
    "neg": lambda x: -x, "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y, "pow": lambda x, y: x**y, "sqrt": math.sqrt, "rsqrt": lambda x: x**-0.5,
    "recip": lambda x: 1 / x, "exp": math.exp, "log": math.log, "log1p": math.log1p,
}  # fmt: skip


def _dot(build: Builder, node: Node, args: list[Node], sizes: Mapping[str, int]) -> Node:
    """A dot whose axis one operand lacks is a product with a sum."""
    axis = str(node["axis"])
    a, b = args
    if axis in a.axes and axis in b.axes:
        return build.make("dot", a, b, like=node, axis=axis)
    if axis in a.axes:
        a, b = b, a
    if axis not in b.axes:
        return build.make("mul", build.make("mul", a, b), build.const(sizes[axis.rstrip("'")]), like=node)
    return build.make("mul", a, build.make("sum", b, axis=axis), like=node)


def _solve(build: Builder, node: Node, args: list[Node], chunk: int) -> Node:
    l, b = args
    inverse = build.make("inverse", l, like=node)
    if node["transposed"]:
        rows = build.make("dot", inverse, b, like=node, axis=ROW)
        return build.make("rename", rows, old=SOURCE, new=ROW)
    return build.make("dot", inverse, _as_source(build, b), like=node, axis=SOURCE)


def _as_source(build: Builder, x: Node) -> Node:
    return x if SOURCE in x.axes else build.make("rename", x, old=ROW, new=SOURCE)


class Levels:
    """The dyadic levels of one decayed product family: shared factors exp(half_sums) per level."""

    def __init__(self, build: Builder, node: Node, gate: Node, chunk: int) -> None:
        self.build, self.node, self.gate = build, node, gate
        self.exclusive = bool(node["exclusive"])
        self.halves = [chunk >> i for i in range(1, chunk.bit_length())]

    def factor(self, half: int) -> Node:
        sums = self.build.make("half_sums", self.gate, half=half, exclusive=self.exclusive)
        return self.build.make("exp", sums)

    def scaled(self, x: Node, half: int) -> Node:
        return self.build.make("mul", x, self.factor(half))

    def rows(self, w: Node, x: Node, half: int) -> Node:
        """[t, axis]: one level of sum_s w[t, s] x_s exp(...)."""
        b = self.build
        source = _as_source(b, self.scaled(x, half))
        pairs = b.make("pairs", w, half=half)
        return b.make("mul", b.make("dot", pairs, source, like=self.node, axis=SOURCE), self.factor(half))

    def cols(self, w: Node, r: Node, half: int) -> Node:
        """[t := s, axis]: one level of sum_t w[t, s] r_t exp(...)."""
        b = self.build
        pairs = b.make("pairs", w, half=half)
        product = b.make("dot", pairs, self.scaled(r, half), like=self.node, axis=ROW)
        return b.make("mul", b.make("rename", product, old=SOURCE, new=ROW), self.factor(half))


def _row(build: Builder, x: Node) -> Node:
    return x if ROW in x.axes else build.make("rename", x, old=SOURCE, new=ROW)


def _decayed(build: Builder, node: Node, args: list[Node], chunk: int) -> Node:
    r, x, gate = _row(build, args[0]), _row(build, args[1]), args[2]
    levels, axis = Levels(build, node, gate, chunk), str(node["axis"])
    terms = []
    for half in levels.halves:
        source = _as_source(build, levels.scaled(x, half))
        product = build.make("dot", levels.scaled(r, half), source, like=node, axis=axis)
        terms.append(build.make("pairs", product, half=half))
    if not node["strict"]:
        own = build.make("sum", build.make("mul", r, x), axis=axis)
        terms.append(build.make("diagonal", own))
    return build.add(terms)


def _decayed_rows(build: Builder, node: Node, args: list[Node], chunk: int) -> Node:
    w, x, gate = args[0], _row(build, args[1]), args[2]
    levels = Levels(build, node, gate, chunk)
    return build.add([*(levels.rows(w, x, h) for h in levels.halves), *_own(build, node, w, x)])


def _decayed_cols(build: Builder, node: Node, args: list[Node], chunk: int) -> Node:
    w, r, gate = args[0], _row(build, args[1]), args[2]
    levels = Levels(build, node, gate, chunk)
    return build.add([*(levels.cols(w, r, h) for h in levels.halves), *_own(build, node, w, r)])


def _own(build: Builder, node: Node, w: Node, x: Node) -> list[Node]:
    if node["strict"]:
        return []
    return [build.make("mul", build.make("diagonal_of", w), x)]


def _decayed_gate(build: Builder, node: Node, args: list[Node], chunk: int) -> Node:
    w, r, x, gate = args[0], _row(build, args[1]), _row(build, args[2]), args[3]
    levels, terms = Levels(build, node, gate, chunk), []
    for half in levels.halves:
        rows = build.make("mul", r, levels.rows(w, x, half))
        cols = build.make("mul", x, levels.cols(w, r, half))
        both = build.make("add", rows, cols)
        terms.append(build.make("half_gather", both, half=half, exclusive=levels.exclusive))
    return build.add(terms)


EXPAND: dict[str, Callable[[Builder, Node, list[Node], int], Node]] = {
    "solve": _solve,
    "decayed": _decayed,
    "decayed_rows": _decayed_rows,
    "decayed_cols": _decayed_cols,
    "decayed_gate": _decayed_gate,
}
