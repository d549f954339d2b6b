"""What gradients need of values and of stored states: the kernel `products` computes it, `gradients` loads it.

A gradient of keys is a sum of terms from other chunks (products with stored states) and from pairs [t, s] of its
own chunk. The values' axis is contracted in both, and nothing else of values is needed:

    dk = scale (y dS') - scale (dy S')  +  pairs' q - pairs k          products: y dS', dy S', do y', dy y', ...

Before: partition.py's scans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lmoe_compiler.codegen.plan import Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.ir.nodes import ROW, Node


def contracted_values(
    roots: Sequence[Node], stored: Mapping[Node, Value], axes: Iterable[str]
) -> list[Store]:
    """What `roots` need of everything that has the values' axes, contracted over them."""
    values = frozenset(axes)
    nodes = closure(roots, stored)
    users = _users(nodes, stored)
    found: dict[Node, None] = {}
    for node in nodes:
        if node in stored or values & set(node.axes):
            continue
        if any(values & set(a.axes) for a in node.args):
            found[_summed(node, users)] = None
    return [Store(n, _value(n, f"product_{i}")) for i, n in enumerate(found)]


def _users(nodes: Sequence[Node], stored: Mapping[Node, Value]) -> dict[Node, list[Node]]:
    users: dict[Node, list[Node]] = {}
    for node in nodes:
        for a in node.args if node not in stored else ():
            users.setdefault(a, []).append(node)
    return users


def _summed(node: Node, users: Mapping[Node, list[Node]]) -> Node:
    """The topmost sum over axes of a product of two states that nothing else uses."""
    while len(users.get(node, ())) == 1 and users[node][0].op == "sum" and ROW not in node.axes:
        (node,) = users[node]
    return node


def _value(node: Node, name: str) -> Value:
    axes = tuple(a for a in node.axes if a != ROW)
    if ROW in node.axes:
        return Value(name, axes, "row", "dot" if axes else "fp32")
    return Value(name, axes, "chunk", "fp32")
