"""Rewrites of a chunk program for batched execution: what the loop over chunks must do becomes as little as possible.

A carried value X (a state, or its gradient) enters a chunk linearly, so `solve(l, p + c (a' X))` is `u + w' X`
with u and w independent of X: they are computed for all chunks at once, and the loop keeps one product. In:
nodes of chunk.py and adjoint.py. Out: equal nodes. Next: phases.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, input_, topological
from lmoe_compiler.lower import algebra as al
from lmoe_compiler.lower.program import VALID

Rule = Callable[[Node], Node]


def rewritten(roots: Sequence[Node], rule: Rule) -> list[Node]:
    """`roots` with `rule` applied to every node, operands first."""
    done: dict[Node, Node] = {}
    for node in topological(roots):
        done[node] = rule(al.rebuild(node, [done[a] for a in node.args]) if node.args else node)
    return [done[root] for root in roots]


def unpadded(node: Node) -> Node:
    """For chunks that are full: the masks that only guard padding rows go."""
    if node.op == "where" and node.args[0] == input_(VALID, (ROW,)) and ROW in node.args[1].axes:
        return node.args[1]
    return node


def inverted(node: Node) -> Node:
    """A solve becomes a product with the inverse, itself a solve: one substitution serves all right-hand sides."""
    if node.op != "solve" or node.args[1].op == "delta":
        return node
    matrix, right = node.args
    inverse = al.solve(matrix, al.make("delta", a=ROW, b=SOURCE))
    if node["transposed"]:
        return al.rename(al.dot(inverse, right, ROW), SOURCE, ROW)
    return al.dot(inverse, al.as_source(right), SOURCE)


def dependent(roots: Iterable[Node], leaf: Node) -> set[Node]:
    """The nodes at or above `leaf`."""
    found = {leaf}
    for node in topological(roots):
        if any(a in found for a in node.args):
            found.add(node)
    return found


def hoisted(roots: Sequence[Node], leaf: Node, in_loop: bool) -> list[Node]:
    """Equal nodes in which factors independent of `leaf` meet first.

    For what runs `in_loop` everything is hoisted; elsewhere only through inverses, so that the loop and the rest
    share the right-hand sides that were solved before.
    """
    return rewritten(roots, _Hoist(leaf, in_loop))


class _Hoist:
    def __init__(self, leaf: Node, in_loop: bool) -> None:
        self.known = {leaf: True}
        self.in_loop = in_loop

    def depends(self, node: Node) -> bool:
        if node not in self.known:
            for below in topological([node]):
                if below not in self.known:
                    self.known[below] = any(self.known[a] for a in below.args)
        return self.known[node]

    def __call__(self, node: Node) -> Node:
        if not self.depends(node):
            return node
        if node.op == "rename":
            return self.renamed(node.args[0], str(node["old"]), str(node["new"]))
        inverse = node.op == "dot" and any(a.op == "solve" for a in node.args)
        if inverse or (self.in_loop and node.op in ("mul", "dot")):
            x, y = node.args
            if self.depends(x) and self.depends(y):
                return node
            factor, value = (y, x) if self.depends(x) else (x, y)
            if node.op == "mul":
                return self.scaled(factor, value)
            return self.contracted(factor, value, str(node["axis"])) or node
        return node

    def scaled(self, factor: Node, value: Node) -> Node:
        """factor * value, the factor moved into the product that makes the value."""
        if value.op in ("add", "sub"):
            return al.rebuild(value, [self.scaled(factor, a) for a in value.args])
        if value.op == "neg":
            return al.neg(self.scaled(factor, value.args[0]))
        if value.op == "dot" and self.depends(value) and value["axis"] not in factor.axes:
            for i, operand in enumerate(value.args):
                if not self.depends(operand) and set(factor.axes) <= set(operand.axes):
                    return _with_operand(value, i, al.mul(operand, factor))
        return al.mul(factor, value)

    def contracted(self, factor: Node, value: Node, axis: str) -> Node | None:
        """sum over axis of factor * value with the factor taken inside, or None where that gains nothing."""
        if value.op in ("add", "sub"):
            parts = [self.contracted(factor, a, axis) for a in value.args]
            if all(part is None for part in parts):
                return None
            whole = (
                part or al.dot(factor, a, axis) for part, a in zip(parts, value.args, strict=True)
            )
            return al.rebuild(value, list(whole))
        if value.op == "neg":
            inner = self.contracted(factor, value.args[0], axis)
            return None if inner is None else al.neg(inner)
        if not self.depends(value) or value.op not in ("mul", "dot"):
            return None
        for i, operand in enumerate(value.args):
            other = value.args[1 - i]
            if self.depends(operand):
                continue
            if value.op == "mul" and set(operand.axes) <= set(factor.axes):
                factor = al.mul(factor, operand)
                return self.contracted(factor, other, axis) or al.dot(factor, other, axis)
            if value.op == "dot" and axis in operand.axes and axis not in other.axes:
                bound = str(value["axis"])
                fresh = _unused(bound, factor, value)
                operand, other = al.rename(operand, bound, fresh), al.rename(other, bound, fresh)
                return al.dot(al.dot(factor, operand, axis), other, fresh)
        return None

    def renamed(self, value: Node, old: str, new: str) -> Node:
        bound = value.op in ("dot", "sum") and value["axis"] in (old, new)
        if value.op in ("add", "sub", "mul", "neg", "dot") and not bound:
            return al.rebuild(value, [self.renamed(a, old, new) for a in value.args])
        return al.rename(value, old, new)


def _unused(bound: str, factor: Node, value: Node) -> str:
    """A name for the summed axis of `value` that is free in neither."""
    fresh = bound
    while fresh in factor.axes or fresh in value.axes:
        fresh += "'"
    return fresh


def _with_operand(product: Node, i: int, operand: Node) -> Node:
    args = list(product.args)
    args[i] = operand
    return al.rebuild(product, args)
