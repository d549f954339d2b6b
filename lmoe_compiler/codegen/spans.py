"""Cutting a sequence into spans that are scanned side by side, where states decay without mixing.

The map of a span is then x -> factor * x + sum with a factor of the decay's axes: a first kernel carries both through
each span, and every program of the scan starts by carrying its state through the spans before its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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


def span_carries(carries: Sequence[Carry], span: int) -> tuple[list[Carry], list[Carry]] | None:
    """Carries of the first kernel, and those of the scan with their maps; None where a state mixes."""
    first: list[Carry] = []
    second: list[Carry] = []
    for carry in carries:
        factor = factor_of(carry.following, carry.leaf)
        if factor is None:
            return None
        axes = tuple(a for a in carry.axes if a in factor.axes)
        name = carry.leaf.name
        total = Value(f"{name}_sum", carry.axes, "span", "fp32", span=span)
        decay = Value(f"{name}_factor", axes, "span", "fp32", span=span)
        product = input_(f"{name}_decay", axes)
        first.append(replace(carry, start=None, end=total))
        first.append(Carry(product, Node("mul", (product, factor)), axes, None, decay, fill=1.0))
        second.append(replace(carry, through=(decay, total)))
    return first, second


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
