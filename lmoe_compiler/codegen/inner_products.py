"""<S, d.S> at every chunk, without a kernel that knows both: a gate's gradient needs it.

With S' = f S + u and d.S = f d.S' + w, f a number,

    f <S, d.S'>  =  <S, d.S> - <S, w>          <S', d.S'>  =  f <S, d.S'> + <u, d.S'>

so that <S, d.S>, once it is known where a span starts, goes through the span's chunks by sums of numbers. u and w are
sums of products over rows, and <S, k^T x> = sum_t sum_K k (S x), of which S x is there for other gradients.

What a difference leaves of large numbers is what they were rounded by, and no later decay makes that less. So the
squares of these errors are added up beside it, and what is no larger is taken for nothing: so it is behind decays, and
behind the last token that has a gradient. Behind a reset both start again.
Used by row_sums.py and recomputing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmoe_compiler.codegen.plan import Carry
from lmoe_compiler.codegen.simplify import factors_of, signed, terms_of
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import ROW, Node, input_

LEAST = 2.0**-24
"""Where f is less, nothing is left of <S, d.S'>."""

ROUNDED = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}
"""Relative errors that numbers of rows are taken to have, two or three times what they have: products round states,
rows, and what these are scaled by.
"""


@dataclass(frozen=True)
class InnerProduct:
    """Of a state and its gradient.

    node     the product of both as the graph has it, before its sums
    leaf     <S, d.S> at a chunk's entry
    error    the square of what that is off by
    past     f <S, d.S'>, what of it comes from beyond the chunk: a leaf until `of_rows` are known
    factor   f
    of_rows  <S, w> and <u, d.S'>, before they are summed over the chunk's rows
    """

    node: Node
    leaf: Node
    error: Node
    past: Node
    factor: Node
    of_rows: tuple[Node, Node]


def inner_product(build: Builder, forward: Carry, reverse: Carry) -> InnerProduct | None:
    """None where f is no number, or u or w is more than products over rows."""
    name = forward.leaf.name
    parts = [_parts(build, c) for c in (reverse, forward)]
    factors = [f for f, _ in parts]
    if len(forward.axes) != 2 or None in factors or factors[0] != factors[1]:
        return None
    pairs = zip(parts, (forward, reverse), strict=True)
    of_rows = [_of_rows(build, terms, other) for (_, terms), other in pairs]
    if factors[0] is None or of_rows[0] is None or of_rows[1] is None:
        return None
    return InnerProduct(
        build.make("mul", forward.leaf, reverse.leaf),
        input_(f"{name}_product"),
        input_(f"{name}_product_error"),
        input_(f"{name}_product_past"),
        factors[0],
        (of_rows[0], of_rows[1]),
    )


def _parts(build: Builder, carry: Carry) -> tuple[Node | None, list[tuple[int, Node]]]:
    """The number that scales what is carried, None if it is no number, and what is added to it."""
    scale: Node | None = None
    added: list[tuple[int, Node]] = []
    for sign, term in terms_of(carry.following, 1):
        factors = factors_of(term)
        if carry.leaf not in factors:
            added.append((sign, term))
            continue
        rest = [f for f in factors if f != carry.leaf]
        if sign < 0 or scale is not None or any(f.axes for f in rest):
            return None, []
        scale = build.product(rest) if rest else build.const(1.0)
    return scale, added


def _of_rows(build: Builder, added: Sequence[tuple[int, Node]], other: Carry) -> Node | None:
    """The inner product of what is added to one carried value and of the `other`, a number a row."""
    found: list[tuple[int, Node]] = []
    keys_axis, values_axis = other.axes
    for sign, term in added:
        if term.op != "dot" or term["axis"] != ROW:
            return None
        factors = [f for operand in term.args for f in factors_of(operand)]
        keys = [f for f in factors if keys_axis in f.axes]
        values = [f for f in factors if values_axis in f.axes]
        rows = [f for f in factors if f.axes == (ROW,)]
        if not keys or not values or len(keys) + len(values) + len(rows) != len(factors):
            return None
        read = build.make("dot", other.leaf, build.product(values), axis=values_axis)
        summed = build.make("sum", build.make("mul", build.product(keys), read), axis=keys_axis)
        found.append((sign, build.product([*rows, summed])))
    return signed(build, found) if found else None


def through_chunk(
    build: Builder, product: InnerProduct, inside: Node, added: Node, dtype: str
) -> tuple[Node, Node, Node]:
    """f <S, d.S'>, <S', d.S'> and its error, given <S, w> and <u, d.S'> of the chunk's rows."""

    def summed(x: Node) -> Node:
        return build.make("sum", x, axis=ROW)

    def squared(x: Node) -> Node:
        return build.make("mul", x, x)

    def error(before: Node, rows: Node) -> Node:
        rounded = build.make("mul", summed(squared(rows)), build.const(ROUNDED[dtype] ** 2))
        return build.make("add", before, rounded)

    def through(x: Node) -> Node:
        there = build.make("ge", product.factor, build.const(LEAST))
        return build.make("where", there, x, build.const(0.0))

    left = build.make("sub", product.leaf, summed(inside))
    off = error(product.error, inside)
    large = build.make("ge", squared(left), off)
    past = through(build.make("where", large, left, build.const(0.0)))
    return past, build.make("add", past, summed(added)), error(through(off), added)
