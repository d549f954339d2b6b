"""Tile pass: a product with a state-free [t, s] factor is spread over the terms of its other operand.

    dot(F, beta (v - e kS))   ->   dot(F beta, v) - dot(F beta, e kS)          F beta: columns of F scaled by rows beta

Why: Triton copies a block asynchronously only where a product reads it directly. Behind the subtraction `v` is an
ordinary load whose whole latency every chunk waits for (measured: 680 against 395 us for a scan). `F beta` depends on
no state, so the prepare kernel stores it and the scan no longer reads `beta`.
Before: tile.py. After: partition.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_

from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, topological


@dataclass(frozen=True)
class Term:
    """One term of a sum: `rest` times row factors [t] that no state moves, subtracted if `minus`."""

    minus: bool
    rows: tuple[Node, ...]
    rest: Node


def solve_form(
    roots: Sequence[Node], carried: frozenset[str], build: Builder | None = None
) -> list[Node]:
    """`roots` with such products spread; `carried` are the names of states and their gradients."""
    build, done = build or Builder(), dict[Node, Node]()
    moving = _depending(roots, carried)
    for node in topological(roots):
        new = build.make(node.op, *(done[a] for a in node.args), like=node, **dict(node.attrs))
        if node.op == "dot" and node in moving:
            new = _spread(build, node, moving, done) or new
        done[node] = new
    return [done[root] for root in roots]


def _depending(roots: Sequence[Node], names: frozenset[str]) -> set[Node]:
    found: set[Node] = set()
    for node in topological(roots):
        if (node.op == "input" and node.name in names) or any(a in found for a in node.args):
            found.add(node)
    return found


def _spread(build: Builder, node: Node, moving: set[Node], done: dict[Node, Node]) -> Node | None:
    """The spread product, or None where no term is an input that a product could read directly."""
    fixed = [a for a in node.args if set(a.axes) == {ROW, SOURCE} and a not in moving]
    other = [a for a in node.args if a.op == "rename" and a in moving]
    if node["axis"] != SOURCE or len(fixed) != 1 or len(other) != 1:
        return None
    terms = list(_terms(other[0].args[0], moving))
    shared = reduce(and_, (Counter(term.rows) for term in terms))
    rests = [_without(build, term, shared, done) for term in terms]
    if len(terms) < 2 or not any(rest.op == "input" for rest in rests):
        return None
    factor = done[fixed[0]]
    for row in shared.elements():
        factor = build.make("mul", factor, build.make("rename", done[row], old=ROW, new=SOURCE))
    result: Node | None = None
    for term, rest in zip(terms, rests, strict=True):
        source = build.make("rename", rest, old=ROW, new=SOURCE)
        product = build.make("dot", factor, source, like=node, axis=SOURCE)
        if result is None:
            result = build.make("neg", product) if term.minus else product
        else:
            result = build.make("sub" if term.minus else "add", result, product)
    return result


def _terms(
    node: Node, moving: set[Node], minus: bool = False, rows: tuple[Node, ...] = ()
) -> Iterator[Term]:
    """The terms of a sum, left to right, through products with row factors."""
    row = next((a for a in node.args if a.axes == (ROW,) and a not in moving), None)
    if node.op in ("add", "sub"):
        yield from _terms(node.args[0], moving, minus, rows)
        yield from _terms(node.args[1], moving, minus ^ (node.op == "sub"), rows)
    elif node.op == "neg":
        yield from _terms(node.args[0], moving, not minus, rows)
    elif node.op == "mul" and row is not None:
        other = node.args[1] if node.args[0] is row else node.args[0]
        yield from _terms(other, moving, minus, (*rows, row))
    else:
        yield Term(minus, rows, node)


def _without(build: Builder, term: Term, shared: Counter[Node], done: dict[Node, Node]) -> Node:
    """The term without its shared row factors."""
    result = done[term.rest]
    for row in (Counter(term.rows) - shared).elements():
        result = build.make("mul", done[row], result)
    return result
