"""Cutting a sequence into spans that are scanned side by side.

A state goes through a span by a map, x -> m x + sum: a first kernel carries the sum through each span from nothing, and
m; every program of the scan starts by carrying its state through the spans before its own. Where states decay without
mixing m is a factor of the decay's axes. Where keys mix (a solve: what is written depends on what is read) it is a
matrix over keys, whose columns go through the chunks as those of the state do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from lmoe_compiler.codegen.plan import Carry, Value
from lmoe_compiler.ir.nodes import Node, input_, make


def factor_of(node: Node, leaf: Node) -> Node | None:
    """f in node = f * leaf + rest with f and rest free of `leaf`, or None."""
    if node is leaf:
        return make("const", value=1.0)
    if not _contains(node, leaf):
        return make("const", value=0.0)
    if node.op in ("add", "sub"):
        first, second = (factor_of(a, leaf) for a in node.args)
        if first is None or second is None:
            return None
        if _is(second, 0.0):
            return first
        return second if _is(first, 0.0) and node.op == "add" else None
    if node.op == "mul":
        inside, outside = node.args if _contains(node.args[0], leaf) else node.args[::-1]
        factor = factor_of(inside, leaf)
        if factor is None or _contains(outside, leaf):
            return None
        return outside if _is(factor, 1.0) else Node("mul", (factor, outside))
    return None


class Nonlinear(Exception):
    """A node is not linear in what is carried, column by column."""


def linear_part(
    node: Node, leaf: Node, columns: Node, values: str, done: dict[Node, Node | None]
) -> Node | None:
    """L(columns) where node = L(leaf) + rest, L acting on each column along `values` alone; None for zero.

    `columns` has another axis in the place of `values`. Raises Nonlinear.
    """
    if node in done:
        return done[node]
    if not _contains(node, leaf):
        return None
    parts = [linear_part(a, leaf, columns, values, done) for a in node.args]
    touched = {value for name, value in node.attrs if name in ("axis", "old", "new")}
    if values in touched:
        raise Nonlinear
    found: Node | None
    if node.op in ("add", "sub"):
        first, second = parts
        if first is not None and second is not None:
            found = Node(node.op, (first, second))
        elif second is not None and node.op == "sub":
            found = Node("neg", (second,))
        else:
            found = second if first is None else first
    elif node.op in ("neg", "rename", "sum"):
        found = Node(node.op, (parts[0],), node.attrs) if parts[0] else None
    elif node.op in ("mul", "dot") and None in parts:
        (other,) = [a for a, part in zip(node.args, parts, strict=True) if part is None]
        if values in other.axes:
            raise Nonlinear
        args = [a if part is None else part for a, part in zip(node.args, parts, strict=True)]
        found = Node(node.op, tuple(args), node.attrs)
    else:
        raise Nonlinear
    done[node] = found
    return found


@dataclass(frozen=True)
class Spans:
    """Carries of the first kernels, which go through every span by itself, and of the scan with their maps.

    columns   a matrix's second axis: its name, and the axis that it is a copy of
    """

    sums: list[Carry]
    matrices: list[Carry]
    scan: list[Carry]
    columns: dict[str, str]


def span_carries(carries: Sequence[Carry], span: int, axes: Collection[str]) -> Spans | None:
    """None where the map of a span is not known. `axes` are those of the call, which matrices' own differ from."""
    found = Spans([], [], [], {})
    for carry in carries:
        if any(_contains(carry.following, c.leaf) for c in carries if c is not carry):
            return None
        name = carry.leaf.name
        total = Value(f"{name}_sum", carry.axes, "span", "fp32", span=span)
        found.sums.append(replace(carry, start=None, end=total))
        factor = factor_of(carry.following, carry.leaf)
        if factor is not None:
            decayed = tuple(a for a in carry.axes if a in factor.axes)
            decay = Value(f"{name}_factor", decayed, "span", "fp32", span=span)
            product = input_(f"{name}_decay", decayed)
            following = Node("mul", (product, factor))
            found.sums.append(Carry(product, following, decayed, None, decay, fill=1.0))
        else:
            matrix = _matrix(carry, span, axes)
            if matrix is None:
                return None
            found.matrices.append(matrix)
            found.columns[matrix.axes[1]] = carry.axes[0]
            assert matrix.end is not None
            decay = matrix.end
        found.scan.append(replace(carry, through=(decay, total)))
    return found


def _matrix(carry: Carry, span: int, taken: Collection[str]) -> Carry | None:
    """The map of a state whose keys mix, from the identity on."""
    if len(carry.axes) != 2:
        return None
    keys, values = carry.axes
    columns = f"{keys}_from"
    while columns in taken:
        columns += "_"
    axes = keys, columns
    leaf = input_(f"{carry.leaf.name}_map", axes)
    try:
        following = linear_part(carry.following, carry.leaf, leaf, values, {carry.leaf: leaf})
    except Nonlinear:
        return None
    end = Value(f"{carry.leaf.name}_matrix", axes, "span", "fp32", span=span)
    return Carry(leaf, following, axes, None, end, identity=True) if following else None


def _is(node: Node, value: float) -> bool:
    return node.op == "const" and node["value"] == value


def _contains(node: Node, leaf: Node) -> bool:
    seen: set[int] = set()
    stack = [node]
    while stack:
        x = stack.pop()
        if x is leaf:
            return True
        if id(x) not in seen:
            seen.add(id(x))
            stack.extend(x.args)
    return False
