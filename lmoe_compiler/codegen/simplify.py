"""Algebra on tile graphs that saves products and running sums; every rule keeps the value, up to rounding.

Used by tile.py while it rewrites; each rule returns None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Protocol

from lmoe_compiler.ir.nodes import ROW, SOURCE, Attr, Node

Make = Callable[..., Node]


class Maker(Protocol):
    def make(self, op: str, *args: Node, like: Node | None = None, **attrs: Attr) -> Node: ...

    def const(self, value: float) -> Node: ...

    def scaled(self, x: Node, factors: Iterable[Node]) -> Node: ...


def without_axis(
    build: Maker, operands: Sequence[Node], axis: str
) -> tuple[list[Node], list[Node]]:
    """The operands of a contraction over `axis` without their factors that lack it, and those factors.

    dot(f x, S) = f dot(x, S): a row factor scales the result. Products which differ in one are then computed once, and
    an input is not rounded again after it was scaled.
    """
    inside, outside = list[Node](), list[Node]()
    for operand in operands:
        factors = _flat(build, operand)
        kept = [f for f in factors if axis in f.axes]
        rows = {a for f in kept for a in f.axes} >= set(operand.axes)
        if len(kept) == len(factors) or not kept or not rows:
            inside.append(operand)
            continue
        outside += [f for f in factors if axis not in f.axes]
        inside.append(build.scaled(kept[0], kept[1:]))
    return inside, outside


def _flat(build: Maker, x: Node) -> list[Node]:
    if x.op == "div":
        return [*_flat(build, x.args[0]), build.make("recip", x.args[1])]
    return [f for a in x.args for f in _flat(build, a)] if x.op == "mul" else [x]


def values_first(
    build: Maker, node: Node, args: list[Node], values: Collection[str]
) -> Node | None:
    """sum_V (sum_K k S) v = sum_K k (sum_V S v): gradients need the inner product with the values anyway."""
    axis = str(node["axis"])
    if axis not in values or node.op not in ("sum", "dot"):
        return None
    factors = args if node.op == "dot" else list(args[0].args) if args[0].op == "mul" else []
    if len(factors) != 2:
        return None
    for inner, other in (factors, factors[::-1]):
        if inner.op != "dot" or inner["axis"] in (ROW, SOURCE, axis) or other.axes != (ROW, axis):
            continue
        for state, rows in (inner.args, inner.args[::-1]):
            if ROW not in state.axes and axis in state.axes and rows.axes == (ROW, inner["axis"]):
                product = build.make("dot", other, state, like=node, axis=axis)
                return build.make("sum", build.make("mul", product, rows), axis=str(inner["axis"]))
    return None


def segment_gradient(build: Maker, node: Node, args: list[Node]) -> Node | None:
    """sum_s of w[t', s] over s < t <= t' as one running sum of w's row sums less its column sums."""
    (x,) = args
    if node.op != "sum" or node["axis"] != SOURCE or x.op != "causal" or not x["strict"]:
        return None
    (tails,) = x.args
    if tails.op != "suffix" or not tails["inclusive"] or set(tails.args[0].axes) != {ROW, SOURCE}:
        return None
    w = build.make("causal", tails.args[0], strict=True)
    columns = build.make("rename", build.make("sum", w, axis=ROW), old=SOURCE, new=ROW)
    rows = build.make("sum", w, axis=SOURCE)
    return build.make("suffix", build.make("sub", rows, columns), inclusive=True, like=node)


def merge_running(build: Maker, root: Node, loaded: Container[Node] = ()) -> Node:
    """A sum of running sums over rows as one running sum; `loaded` nodes stay terms of their own."""
    terms = terms_of(root, 1, loaded)
    own = [(sign, x) for sign, x in terms if x not in loaded]
    running = [(sign, x) for sign, x in own if x.op == "prefix" and x["inclusive"]]
    totals = [(sign, x) for sign, x in own if x.op == "sum" and x["axis"] == ROW]
    if len(running) < 2:
        return root
    rest = [(sign, x) for sign, x in terms if (sign, x) not in running and (sign, x) not in totals]
    merged = build.make(
        "prefix", signed(build, [(s, x.args[0]) for s, x in running]), inclusive=True
    )
    parts = [(1, merged), *rest]
    if totals:
        parts.append(
            (1, build.make("sum", signed(build, [(s, x.args[0]) for s, x in totals]), axis=ROW))
        )
    return signed(build, parts)


def merge_levels(build: Maker, root: Node, loaded: Container[Node] = ()) -> Node:
    """A sum of sums over levels of the same vectors as one, which gathers once for each kind of gather in them."""
    terms = terms_of(root, 1, loaded)
    levels = [(s, x) for s, x in terms if x.op == "level_sum" and x not in loaded]
    if len(levels) < 2 or len({frozenset(x.axes) for _, x in levels}) > 1:
        return root
    inside = [t for s, x in levels for t in terms_of(x.args[0], s, loaded)]
    gathers: dict[tuple[object, ...], list[tuple[int, Node]]] = {}
    parts: list[tuple[int, Node]] = []
    for sign, x in inside:
        if x.op == "level_gather":
            gathers.setdefault(x.attrs, []).append((sign, x))
        else:
            parts.append((sign, x))
    for same in gathers.values():
        (_, like), *_ = same
        total = signed(build, [(s, x.args[0]) for s, x in same])
        parts.append((1, build.make("level_gather", total, like=like, **dict(like.attrs))))
    merged = build.make("level_sum", signed(build, parts), like=root)
    return signed(build, [(1, merged), *(t for t in terms if t not in levels)])


def merge_sums(
    build: Maker,
    roots: Iterable[Node],
    nodes: Iterable[Node],
    loaded: Mapping[Node, Node],
    merge: Callable[[Maker, Node, Container[Node]], Node],
) -> list[Node]:
    """The roots with every whole sum among `nodes` (operands first) merged; `loaded` nodes stay as they are."""
    nodes, roots = list(nodes), list(roots)
    sums = {"add", "sub", "neg"}
    whole = {*roots, *(a for n in nodes if n.op not in sums and n not in loaded for a in n.args)}
    done: dict[Node, Node] = {}
    for node in nodes:
        new = node
        if node not in loaded:
            new = build.make(node.op, *(done[a] for a in node.args), like=node, **dict(node.attrs))
            new = merge(build, new, loaded) if node in whole else new
        done[node] = loaded.get(new, new)
    return [done[root] for root in roots]


def bare(node: Node) -> Node:
    """A value, whichever axis it is seen along."""
    return node.args[0] if node.op == "rename" else node


def terms_of(node: Node, sign: int, loaded: Container[Node] = ()) -> list[tuple[int, Node]]:
    """The terms of a sum with their signs; `loaded` nodes are terms as they are."""
    if node in loaded or node.op not in ("add", "sub", "neg"):
        return [(sign, node)]
    signs = (-sign,) if node.op == "neg" else (sign, sign if node.op == "add" else -sign)
    return [t for s, x in zip(signs, node.args, strict=True) for t in terms_of(x, s, loaded)]


def factors_of(node: Node, loaded: Container[Node] = ()) -> list[Node]:
    """The factors of a product; `loaded` nodes are factors as they are."""
    if node in loaded or node.op != "mul":
        return [node]
    return [f for x in node.args for f in factors_of(x, loaded)]


def signed(build: Maker, terms: list[tuple[int, Node]]) -> Node:
    """Their sum, the positive ones first."""
    terms = sorted(terms, key=lambda term: -term[0])
    sign, total = terms[0]
    if sign < 0:
        total = build.make("neg", total)
    for sign, x in terms[1:]:
        total = build.make("add" if sign > 0 else "sub", total, x)
    return total
