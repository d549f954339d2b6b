"""Tile program: a chunk graph rewritten into operations that one Triton statement can print.

In: the nodes of a chunk program or chunk adjoint (lower/program.py). Out: the same nodes, hash-consed, with
solves and decayed products replaced by tile operations, and sizes and constants folded.
Next: partition.py cuts the graph into kernels.

  tile op        operands  attributes        meaning ([C, C] pairs: row t, source s)
  -------------  --------  ----------------  -------------------------------------------------------------
  floor          g         -                 max(g, -104): exp of it is exactly exp(g) in fp32, never inf - inf
  between        G         -                 [t, s], G_t - G_s where s < t, else 0; G running sums of floored g
  inverse        l         -                 (I - l)^-1, l strictly lower, by block recursion
  level_sum      x         -                 sum over the levels of x, which may contain
  pairs          x         -                   x at the pairs s < t of this level, else 0
  level_sums     g         exclusive, of       log decay from the row (of = row) or to it (col) to its block's middle
  level_gather   x         exclusive, of       the transpose of level_sums
  level_sign     -         -                   -1 in the near level, else 1: level_sums of cols over that of rows
  diagonal       x [t]     -                 [t, s], x on the diagonal
  diagonal_of    x [t, s]  -                 [t]

A decayed product references each pair (t, s) to the middle of the dyadic block that separates them
(DESIGN.md section 3): one masked C x C product per level, every exponent a local sum of log decays. Blocks whose
decays sum to little need no halving: one `near` level covers all pairs in them, with rows and columns scaled from
the block's middle in both directions. How large such blocks are is seen at run time, so weak gates cost one level. What
kernels parallel over chunks store of a chunk that is near as a whole has no levels at all: near_form.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import reduce

from lmoe_compiler.codegen.simplify import (
    merge_running,
    segment_gradient,
    values_first,
    without_axis,
)
from lmoe_compiler.ir.nodes import ROW, SOURCE, Attr, Node, topological
from lmoe_compiler.lower.program import VALID

GATE_OPERAND = {"segment": 0, "decayed": 2, "decayed_rows": 2, "decayed_cols": 2, "decayed_gate": 3}


LEVEL_OPS = frozenset({"pairs", "level_sign", "level_sums", "level_gather"})


def inside_levels(nodes: Iterable[Node]) -> set[Node]:
    """Of `nodes` (operands first), those whose value differs from dyadic level to level."""
    inside: set[Node] = set()
    for node in nodes:
        if node.op in LEVEL_OPS or (node.op != "level_sum" and any(a in inside for a in node.args)):
            inside.add(node)
    return inside


AXES = {"diagonal": (ROW, SOURCE), "between": (ROW, SOURCE), "diagonal_of": (ROW,)}
COMMUTATIVE = frozenset({"dot", "mul", "add"})


class Builder:
    """Hash-consing constructor: structurally equal nodes become one object."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self.values = frozenset(values)
        self._nodes: dict[tuple[object, ...], Node] = {}
        self._born: dict[int, int] = {}

    def make(self, op: str, *args: Node, like: Node | None = None, **attrs: Attr) -> Node:
        items = tuple(sorted(attrs.items()))
        if op in COMMUTATIVE:
            args = tuple(sorted(args, key=lambda a: self._born.setdefault(id(a), len(self._born))))
        key = (op, items, tuple(id(a) for a in args))
        if key not in self._nodes:
            node = Node(op, args, items, like.loc if like else None)
            if op in AXES:
                object.__setattr__(node, "axes", AXES[op])
            self._nodes[key] = node
        return self._nodes[key]

    def const(self, value: float) -> Node:
        return self.make("const", value=float(value))

    def add(self, terms: Iterable[Node]) -> Node:
        return reduce(lambda x, y: self.make("add", x, y), terms)

    def product(self, factors: Iterable[Node]) -> Node:
        """The same node in whatever order its factors come."""
        first, *rest = sorted(factors, key=lambda f: self._born.setdefault(id(f), len(self._born)))
        return self.scaled(first, rest)

    def scaled(self, x: Node, factors: Iterable[Node]) -> Node:
        return reduce(lambda y, factor: self.make("mul", y, factor), factors, x)


def to_tiles(
    roots: Iterable[Node], sizes: Mapping[str, int], values: Iterable[str], exact: bool = False
) -> list[Node]:
    """`roots` rewritten; nodes shared between them stay shared.

    `values` are the axes that scans tile first. `exact` keeps sums over rows as they are. Otherwise all are
    differences of one running sum, whose error is about 1e-7 of the chunk's total of floored decays (1e-5 where kernels
    add up vectors in halves): far below a half-precision rounding.
    """
    roots = list(roots)
    build = Builder(values)
    logs = _log_decays(roots)
    done: dict[Node, Node] = {}
    for node in topological(roots):
        args = [done[a] for a in node.args]
        new = (None if exact else _shorter(build, node, args)) or _rewrite(build, node, args, sizes)
        if not exact:
            new = _running_sums(build, new)
        if node in logs:
            new = build.make("floor", new, like=node)
        done[node] = new
    results = [_stored(done[root]) for root in roots]
    return results if exact else [merge_running(build, x) for x in results]


def _shorter(build: Builder, node: Node, args: list[Node]) -> Node | None:
    """A contraction over a state's axis, its row factors outside: equal products then are one."""
    if node.op not in ("sum", "dot") or node["axis"] in (ROW, SOURCE):
        return None
    inside, outside = without_axis(build, args, str(node["axis"]))
    result = values_first(build, node, inside, build.values)
    if result is None and node.op == "sum" and outside:
        result = build.make("sum", *inside, like=node, axis=node["axis"])
    if result is None and node.op == "dot" and outside:
        a, b = inside
        result = _product(build, node, a, b, str(node["axis"]))
    return None if result is None else build.scaled(result, outside)


def _stored(node: Node) -> Node:
    """A root without its mask of rows past the end: stores have it."""
    if node.op == "where" and _is_valid(node.args[0]) and _is_zero(node.args[2]):
        return node.args[1]
    return node


def _log_decays(roots: Iterable[Node]) -> set[Node]:
    """Nodes that are summed as log decays: operands of segments and decayed products."""
    return {n.args[GATE_OPERAND[n.op]] for n in topological(roots) if n.op in GATE_OPERAND}


def _rewrite(build: Builder, node: Node, args: list[Node], sizes: Mapping[str, int]) -> Node:
    if node.op == "size":
        return build.const(sizes[str(node["axis"]).rstrip("'")])
    if node.op == "cast":
        return args[0]
    if all(a.op == "const" for a in args) and node.op in FOLD:
        return build.const(FOLD[node.op](*(float(a["value"]) for a in args)))  # type: ignore[arg-type]
    if node.op == "where" and _is_valid(args[0]) and _is_zero(args[2]) and _empty_rows(args[1]):
        return args[1]
    if node.op in EXPAND:
        return EXPAND[node.op](build, node, args)
    if node.op == "dot":
        return _dot(build, node, args, sizes)
    return build.make(node.op, *args, like=node, **dict(node.attrs))


def _running_sums(build: Builder, node: Node) -> Node:
    """Every sum over rows as a difference of one running sum."""
    if node.op == "sum":
        node = segment_gradient(build, node, list(node.args)) or node
    if node.op not in ("prefix", "suffix", "segment"):
        return node
    (x,) = node.args
    if node.op != "segment" and SOURCE in x.axes:
        return node
    total = build.make("prefix", x, inclusive=True)
    if node.op == "prefix":
        return total if node["inclusive"] else build.make("sub", total, x, like=node)
    if node.op == "suffix":
        after = build.make("sub", build.make("sum", x, axis=ROW), total, like=node)
        return build.make("add", after, x) if node["inclusive"] else after
    between = build.make("between", total, like=node)
    if not node["exclusive"]:
        return between
    return build.make("causal", build.make("sub", between, x), strict=True)


def _is_valid(node: Node) -> bool:
    return node.op == "input" and node.name == VALID


def _is_zero(node: Node) -> bool:
    return node.op == "const" and node["value"] == 0.0


def _empty_rows(node: Node) -> bool:
    """Whether rows past the end are zero by themselves: loads are masked, and products keep zeros."""
    if node.op == "input":
        return ROW in node.axes
    if node.op in ("neg", "floor"):
        return _empty_rows(node.args[0])
    if node.op in ("add", "sub"):
        return all(_empty_rows(a) for a in node.args)
    if node.op == "where":
        return _is_valid(node.args[0]) and _is_zero(node.args[2])
    return node.op == "mul" and any(_empty_rows(a) for a in node.args)


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
        return _product(build, node, a, b, axis)
    if axis in a.axes:
        a, b = b, a
    if axis not in b.axes:
        return build.make(
            "mul", build.make("mul", a, b), build.const(sizes[axis.rstrip("'")]), like=node
        )
    return build.make("mul", a, build.make("sum", b, axis=axis), like=node)


def _product(build: Builder, node: Node, a: Node, b: Node, axis: str) -> Node:
    """A dot whose loaded operands stay as they were loaded: row factors go to the result or to the values.

    dot(f q, S) = f dot(q, S), and dot_t(f k, v) = dot_t(k, f v): no block passes through registers to be scaled.
    """
    (a, of_a), (b, of_b) = _factors(build, a), _factors(build, b)
    outside = [f for f in (*of_a, *of_b) if axis not in f.axes]
    for factor in (f for f in (*of_a, *of_b) if axis in f.axes):
        if build.values & set(b.axes) or not build.values & set(a.axes):
            b = build.make("mul", b, factor)
        else:
            a = build.make("mul", a, factor)
    return build.scaled(build.make("dot", a, b, like=node, axis=axis), outside)


def _factors(build: Builder, x: Node) -> tuple[Node, list[Node]]:
    """A product of a loaded block and factors with fewer axes, taken apart; anything else is left whole."""
    core, factors = x, []
    while True:
        if core.op == "rename" and core.args[0].op == "mul":
            core = build.make("mul", *(_renamed(build, a, core) for a in core.args[0].args))
        if core.op != "mul":
            break
        first, second = core.args
        if set(second.axes) < set(core.axes) and set(first.axes) == set(core.axes):
            core, factor = first, second
        elif set(first.axes) < set(core.axes) and set(second.axes) == set(core.axes):
            core, factor = second, first
        else:
            break
        factors.append(factor)
    loaded = core.args[0] if core.op == "rename" else core
    return (core, factors) if loaded.op == "input" else (x, [])


def _renamed(build: Builder, x: Node, rename: Node) -> Node:
    return (
        build.make("rename", x, old=rename["old"], new=rename["new"])
        if rename["old"] in x.axes
        else x
    )


def _solve(build: Builder, node: Node, args: list[Node]) -> Node:
    l, b = args
    inverse = build.make("inverse", l, like=node)
    if node["transposed"]:
        rows = build.make("dot", inverse, b, like=node, axis=ROW)
        return build.make("rename", rows, old=SOURCE, new=ROW)
    return build.make("dot", inverse, _as_source(build, b), like=node, axis=SOURCE)


def _as_source(build: Builder, x: Node) -> Node:
    return x if SOURCE in x.axes else build.make("rename", x, old=ROW, new=SOURCE)


class Levels:
    """One level of a decayed product family, symbolically: `level_sum` runs over all of them.

    Products that share gates share the factors, and the printer puts all sums into one loop. `row` scales what reads,
    `col` what is read; where the read sees the row's own decay they differ in a sign only.
    """

    def __init__(self, build: Builder, node: Node, gate: Node) -> None:
        self.build, self.node = build, node
        self.exclusive = bool(node["exclusive"])
        sums = build.make("level_sums", gate, exclusive=self.exclusive, of="row")
        self.row = build.make("exp", sums)
        self.sign = build.make("level_sign")
        other = build.make("mul", self.sign, sums)
        if self.exclusive:
            other = build.make("level_sums", gate, exclusive=False, of="col")
        self.col = build.make("exp", other)

    def rows(self, w: Node, x: Node) -> Node:
        """[t, axis]: one level of sum_s w[t, s] x_s exp(...)."""
        b = self.build
        source = _as_source(b, b.make("mul", x, self.col))
        product = b.make("dot", b.make("pairs", w), source, like=self.node, axis=SOURCE)
        return b.make("mul", product, self.row)

    def cols(self, w: Node, r: Node) -> Node:
        """[t := s, axis]: one level of sum_t w[t, s] r_t exp(...)."""
        b = self.build
        product = b.make(
            "dot", b.make("pairs", w), b.make("mul", r, self.row), like=self.node, axis=ROW
        )
        return b.make("mul", b.make("rename", product, old=SOURCE, new=ROW), self.col)

    def gate(self, of_rows: Node, of_cols: Node) -> Node:
        """[t, axis]: one level of the gradient to the gates, from r * rows and x * cols."""
        b = self.build
        if self.exclusive:
            first = b.make("level_gather", of_rows, exclusive=True, of="row")
            return b.make("add", first, b.make("level_gather", of_cols, exclusive=False, of="col"))
        both = b.make("add", of_rows, b.make("mul", self.sign, of_cols))
        return b.make("level_gather", both, exclusive=False, of="row")


def _row(build: Builder, x: Node) -> Node:
    return x if ROW in x.axes else build.make("rename", x, old=SOURCE, new=ROW)


def _decayed(build: Builder, node: Node, args: list[Node]) -> Node:
    r, x, gate = _row(build, args[0]), _row(build, args[1]), args[2]
    levels, axis = Levels(build, node, gate), str(node["axis"])
    left, right = build.make("mul", r, levels.row), build.make("mul", x, levels.col)
    product = build.make("dot", left, _as_source(build, right), like=node, axis=axis)
    total = build.make("level_sum", build.make("pairs", product), like=node)
    if node["strict"]:
        return total
    own = build.make("sum", build.make("mul", r, x), axis=axis)
    return build.make("add", total, build.make("diagonal", own))


def _decayed_rows(build: Builder, node: Node, args: list[Node]) -> Node:
    w, x, gate = args[0], _row(build, args[1]), args[2]
    total = build.make("level_sum", Levels(build, node, gate).rows(w, x), like=node)
    return _with_own(build, node, total, w, x)


def _decayed_cols(build: Builder, node: Node, args: list[Node]) -> Node:
    w, r, gate = args[0], _row(build, args[1]), args[2]
    total = build.make("level_sum", Levels(build, node, gate).cols(w, r), like=node)
    return _with_own(build, node, total, w, r)


def _with_own(build: Builder, node: Node, total: Node, w: Node, x: Node) -> Node:
    if node["strict"]:
        return total
    return build.make("add", total, build.make("mul", build.make("diagonal_of", w), x))


def _decayed_gate(build: Builder, node: Node, args: list[Node]) -> Node:
    w, r, x, gate = args[0], _row(build, args[1]), _row(build, args[2]), args[3]
    levels = Levels(build, node, gate)
    of_rows = build.make("mul", r, levels.rows(w, x))
    of_cols = build.make("mul", x, levels.cols(w, r))
    return build.make("level_sum", levels.gate(of_rows, of_cols), like=node)


EXPAND: dict[str, Callable[[Builder, Node, list[Node]], Node]] = {
    "solve": _solve,
    "decayed": _decayed,
    "decayed_rows": _decayed_rows,
    "decayed_cols": _decayed_cols,
    "decayed_gate": _decayed_gate,
}
