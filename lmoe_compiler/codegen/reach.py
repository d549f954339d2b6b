"""Walks down a tile graph to what a kernel loads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from lmoe_compiler.ir.nodes import Node


class Cut(Protocol):
    """Where a walk down the graph stops."""

    def __contains__(self, node: Any, /) -> bool: ...


def closure(
    roots: Iterable[Node], cut: Cut = (), last: Callable[[Node], bool] | None = None
) -> list[Node]:
    """Nodes needed for `roots`, operands first (the `last` ones after others), not looking below values that can be
    loaded.
    """
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            if node not in cut:
                args = sorted(node.args, key=last) if last else node.args
                stack.extend((a, False) for a in reversed(args) if id(a) not in seen)
    return order
