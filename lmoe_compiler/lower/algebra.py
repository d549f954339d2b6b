"""Constructors of chunk-level expressions: equal expressions are one object, trivial ones are never built.

An operand may lack an axis of the result: its value is then the same along that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, reduce

from lmoe_compiler.ir.nodes import ROW, SOURCE, Attr, Node
from lmoe_compiler.ir.nodes import const as _const


@cache
def interned(node: Node) -> Node:
    """The one object for this expression: comparing graphs that share it is then comparing identities."""
    return node


def make(op: str, *args: Node, **attrs: Attr) -> Node:
    return interned(Node(op, args, tuple(sorted(attrs.items()))))


def const(value: float) -> Node:
    return interned(_const(value))


ZERO, ONE = const(0.0), const(1.0)


def value_of(node: Node) -> float | None:
    return float(node["value"]) if node.op == "const" else None  # type: ignore[arg-type]


def neg(x: Node) -> Node:
    if x.op == "neg":
        return x.args[0]
    known = value_of(x)
    return make("neg", x) if known is None else const(-known)


def add(x: Node, y: Node) -> Node:
    a, b = value_of(x), value_of(y)
    if a == 0:
        return y
    if b == 0:
        return x
    if a is not None and b is not None:
        return const(a + b)
    if y.op == "neg":
        return make("sub", x, y.args[0])
    return make("add", x, y)


def total(terms: Iterable[Node]) -> Node:
    return reduce(add, terms, ZERO)


def sub(x: Node, y: Node) -> Node:
    if x is y:
        return ZERO
    return neg(y) if value_of(x) == 0 else add(x, neg(y))


def mul(x: Node, y: Node) -> Node:
    a, b = value_of(x), value_of(y)
    if a is not None and b is not None:
        return const(a * b)
    if a is not None:
        return mul(y, x)
    if b == 0:
        return ZERO
    if b == 1:
        return x
    if b == -1:
        return neg(x)
    if x.op == "neg":
        return neg(mul(x.args[0], y))
    if y.op == "neg":
        return neg(mul(x, y.args[0]))
    if of_pairs(x) and of_pairs(y):
        return _product_of_pairs(x, y)
    return make("mul", x, y)


def scaled(x: Node, number: Node) -> Node:
    """x times a number for each row, which keeps its sign: what products of x are added to, they start from, while a
    difference needs registers for both.
    """
    signed = number.op == "neg" and x.op != "const"
    return make("mul", x, number) if signed else mul(x, number)


def of_pairs(x: Node) -> bool:
    """Whether a value is one for each row and source."""
    return ROW in x.axes and SOURCE in x.axes


def _product_of_pairs(x: Node, y: Node) -> Node:
    """Factors one after another, masks on the first and numbers of rows last: gradients then share what they start
    with, ((gradient of the scores, masked) * decay) * scores.
    """
    if x.op == "mul" and not of_pairs(x.args[1]):
        pairs, number = x.args
        return mul(mul(pairs, y), number)
    if y.op == "mul" and not of_pairs(y.args[1]):
        pairs, number = y.args
        return mul(mul(x, pairs), number)
    if y.op == "causal":
        return mul(causal(x, bool(y["strict"])), y.args[0])
    if y.op == "mul" and of_pairs(y.args[0]):
        return mul(mul(x, y.args[0]), y.args[1])
    return make("mul", x, y)


def div(x: Node, y: Node) -> Node:
    if value_of(y) == 1 or value_of(x) == 0:
        return x
    return make("div", x, y)


def exp(x: Node) -> Node:
    return ONE if value_of(x) == 0 else make("exp", x)


def where(condition: Node, x: Node, y: Node) -> Node:
    known = value_of(condition)
    if known is not None:
        return x if known else y
    if x is y:
        return x
    return make("where", condition, x, y)


def size(axis: str) -> Node:
    return make("size", axis=ROW if axis == SOURCE else axis.rstrip("'"))


def sum_over(x: Node, axis: str) -> Node:
    if axis not in x.axes:
        return mul(x, size(axis))
    return neg(sum_over(x.args[0], axis)) if x.op == "neg" else make("sum", x, axis=axis)


def sum_to(x: Node, whole: Sequence[str], axes: Sequence[str]) -> Node:
    """`x`, a value over the axes `whole`, summed down to `axes`."""
    return reduce(sum_over, [a for a in whole if a not in axes], x)


def rename(x: Node, old: str, new: str) -> Node:
    """`x` with an axis renamed; only the parts that have the axis change, so coefficients still unify."""
    if old not in x.axes:
        return x
    if x.op == "rename" and x["new"] == old and x["old"] == new:
        return x.args[0]
    return (
        neg(rename(x.args[0], old, new)) if x.op == "neg" else make("rename", x, old=old, new=new)
    )


def as_source(x: Node) -> Node:
    """Rows of the chunk seen as sources."""
    return rename(x, ROW, SOURCE)


def dot(x: Node, y: Node, axis: str) -> Node:
    """Sum over `axis` of x * y."""
    if x is ZERO or y is ZERO:
        return ZERO
    if x.op == "neg":
        return neg(dot(x.args[0], y, axis))
    if y.op == "neg":
        return neg(dot(x, y.args[0], axis))
    if axis not in x.axes:
        return mul(x, sum_over(y, axis))
    if axis not in y.axes:
        return mul(sum_over(x, axis), y)
    return make("dot", x, y, axis=axis)


def contract(x: Node, y: Node, axes: Sequence[str]) -> Node:
    """Sum over all `axes` of x * y; with no axes the plain product."""
    if not axes:
        return mul(x, y)
    return reduce(sum_over, axes[1:], dot(x, y, axes[0]))


def is_causal(x: Node, strict: bool) -> bool:
    """Whether the entries that `causal` would clear are zero by construction."""
    if x.op in ("mul", "neg"):
        return any(is_causal(a, strict) for a in x.args)
    return x.op == "causal" and bool(x["strict"] or not strict)


def causal(x: Node, strict: bool) -> Node:
    if x is ZERO or is_causal(x, strict):
        return x
    if x.op == "mul" and of_pairs(x.args[0]):
        return mul(causal(x.args[0], strict), x.args[1])
    return neg(causal(x.args[0], strict)) if x.op == "neg" else make("causal", x, strict=strict)


def prefix(g: Node, inclusive: bool) -> Node:
    return ZERO if g is ZERO else make("prefix", g, inclusive=inclusive)


def suffix(g: Node, inclusive: bool) -> Node:
    return ZERO if g is ZERO else make("suffix", g, inclusive=inclusive)


def solve(matrix: Node, rhs: Node, transposed: bool = False) -> Node:
    if matrix is ZERO or rhs is ZERO:
        return rhs
    if rhs.op == "neg":
        return neg(solve(matrix, rhs.args[0], transposed))
    return make("solve", matrix, rhs, transposed=transposed)


_SIMPLIFIED: dict[str, Callable[..., Node]] = {
    "neg": neg, "add": add, "sub": sub, "mul": mul, "div": div, "exp": exp, "where": where,
}  # fmt: skip


def rebuild(node: Node, args: Sequence[Node]) -> Node:
    """`node` on other operands, simplified."""
    op = node.op
    if op in _SIMPLIFIED:
        return _SIMPLIFIED[op](*args)
    if op == "dot":
        return dot(args[0], args[1], str(node["axis"]))
    if op == "sum":
        return sum_over(args[0], str(node["axis"]))
    if op == "solve":
        return solve(args[0], args[1], bool(node["transposed"]))
    if op == "rename":
        return rename(args[0], str(node["old"]), str(node["new"]))
    if op == "causal":
        return causal(args[0], bool(node["strict"]))
    return interned(Node(op, tuple(args), node.attrs, node.loc))
