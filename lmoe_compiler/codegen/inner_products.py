"""<S, d.S> at every chunk, without a kernel that knows both: a gate's gradient needs it.

With S' = f S + u and d.S = f d.S' + w, f a number,

    f <S, d.S'>  =  <S, d.S> - <S, w>          <S', d.S'>  =  f <S, d.S'> + <u, d.S'>

so that <S, d.S>, once it is known where a span starts, goes through the span's chunks by sums of numbers, and once it
is known where the span ends, back through them. u and w are sums of products over rows, and
<S, k^T x> = sum_t sum_K k (S x), of which S x is there for other gradients.

What a difference leaves of large numbers is what they were rounded by, and no later decay makes that less. So the
squares of these errors are added up beside it. From the start they grow towards the end, and from the end towards the
start: both estimates are taken, each with the other's error as its weight. What is no larger than the error of this
mean is taken for nothing. Behind a reset everything starts again.
Used by row_sums.py and recomputing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lmoe_compiler.codegen.plan import Carry, Store, Value
from lmoe_compiler.codegen.simplify import factors_of, signed, terms_of
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import ROW, Node, input_

LEAST = 2.0**-24
"""Where f is less, nothing is left of <S, d.S'>."""

SMALLEST, LARGEST = 2.0**-126, 2.0**120
"""What squares of errors are kept between: of two estimates without errors the second one is taken."""

ROUNDED = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20}
"""Relative errors that numbers of rows are taken to have, two or three times what they have: products round states,
rows, and what these are scaled by.
"""


@dataclass(frozen=True)
class InnerProduct:
    """Of a state and its gradient.

    state, gradient   as they are carried
    node     the product of both as the graph has it, before its sums
    past     f <S, d.S'>, what of it comes from beyond the chunk: a leaf until `of_rows` are known
    factor   f
    of_rows  <S, w> and <u, d.S'>, before they are summed over the chunk's rows
    """

    state: Node
    gradient: Node
    node: Node
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
        forward.leaf,
        reverse.leaf,
        build.make("mul", forward.leaf, reverse.leaf),
        input_(f"{name}.past"),
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


@dataclass(frozen=True)
class OneWay:
    """An inner product from one end of a span to the other.

    start         what the scan of d.S leaves of it there
    number, error how it goes on from chunk to chunk, and the square of its error
    past          the estimate of what comes from beyond a chunk, f <S, d.S'>, and the square of its error
    """

    start: Store
    number: Carry
    error: Carry
    past: tuple[Node, Node]

    @property
    def carries(self) -> list[Carry]:
        return [self.number, self.error]


@dataclass(frozen=True)
class Followed:
    """An inner product through a span.

    state     what the scan of S leaves of it where the span ends, if that is wanted
    at_exit   leaves that S and d.S are known by there
    """

    product: InnerProduct
    state: Store
    at_exit: tuple[Node, Node]
    from_entry: OneWay
    from_exit: OneWay

    @property
    def late(self) -> list[Store]:
        """Estimates from the exit, which the scan from the entry finds in memory."""
        names = (f"{self.product.state.name}_{x}" for x in ("from_exit", "error_from_exit"))
        pairs = zip(self.from_exit.past, names, strict=True)
        return [Store(node, Value(name, (), "chunk", "fp32")) for node, name in pairs]


def followed(
    build: Builder, product: InnerProduct, read: Node, written: Node, dtype: str, span: int
) -> Followed:
    """Given <S, w> and <u, d.S'> of the rows of a chunk."""
    carried = product.state, product.gradient
    state, gradient = (input_(f"{leaf.name}.exit", leaf.axes) for leaf in carried)
    at_exit = build.make("mul", state, gradient)

    def one_way(at: str, node: Node, first: Node, then: Node) -> OneWay:
        name = product.state.name
        leaf, error = input_(f"{name}.{at}_product"), input_(f"{name}.{at}_error")
        there = build.make("ge", product.factor, build.const(LEAST))
        found = _plus(build, (leaf, error), build.make("neg", first), dtype)
        past, past_error = (build.make("where", there, x, build.const(0.0)) for x in found)
        after, after_error = _plus(build, (past, past_error), then, dtype)
        start = Value(f"{name}_{at}_sum", (), "span", "fp32", span=span)
        number = Carry(leaf, after, (), start, None)
        left = Store(_sum(build, node), start)
        return OneWay(left, number, Carry(error, after_error, (), None, None), (past, past_error))

    return Followed(
        product,
        Store(product.state, Value(f"{product.state.name}_exit", state.axes, "span", span=span)),
        (state, gradient),
        one_way("entry", product.node, read, written),
        one_way("exit", at_exit, written, read),
    )


def _plus(build: Builder, number: tuple[Node, Node], rows: Node, dtype: str) -> tuple[Node, Node]:
    """A number more what rows add to it, with the square of its error."""
    x, error = number
    squares = _sum(build, build.make("mul", rows, rows))
    rounded = build.make("mul", squares, build.const(ROUNDED[dtype] ** 2))
    return build.make("add", x, _sum(build, rows)), build.make("add", error, rounded)


def mean(build: Builder, one: tuple[Node, Node], other: tuple[Node, Node]) -> Node:
    """Of two numbers with the squares of their errors; 0 where it is no larger than its own error.

    Added up, not one and a part of the difference: that would round a small number as a large one is.
    """
    (x, x_error), (y, y_error) = (
        (number, build.make("minimum", error, build.const(LARGEST)))
        for number, error in (one, other)
    )
    least = build.make("add", x_error, build.const(SMALLEST))
    errors = build.make("add", least, y_error)
    of_x, of_y = build.make("div", y_error, errors), build.make("div", least, errors)
    found = build.make("add", build.make("mul", of_x, x), build.make("mul", of_y, y))
    large = build.make("ge", build.make("mul", found, found), build.make("mul", of_x, x_error))
    return build.make("where", large, found, build.const(0.0))


def _sum(build: Builder, node: Node) -> Node:
    """Over all of its axes."""
    for axis in node.axes:
        node = build.make("sum", node, axis=axis)
    return node
