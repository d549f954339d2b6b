"""Which axis of a kernel may be tiled over programs, and which of its values are then sums of parts.

With an axis cut into tiles, a node is
  whole     it has neither the axis nor a contraction over it: the same in every program
  tile      it has the axis: each program holds its part
  part      contracted over the axis: programs hold terms of a sum; only linear operations may follow
A store of a part goes to a buffer with one slice per program: kernels that read it add the slices up in a fixed order.
Where one program loops over the tiles itself, it adds the parts up, and what needs the sum is
  late      computed after the loop
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from lmoe_compiler.ir.nodes import Node

Split = Literal["whole", "tile", "part", "late"]

LINEAR = frozenset(
    "neg rename sum prefix suffix causal pairs level_sum level_gather diagonal diagonal_of between add sub".split()
)


def split(
    nodes: Sequence[Node], axis: str, loaded: Iterable[Node], looped: bool = False
) -> dict[Node, Split] | None:
    """How each of `nodes` (operands first) is split when `axis` is tiled; None where the kernel cannot be.

    `looped`: one program walks all tiles, so that there may be late nodes.
    """
    loaded = set(loaded)
    found: dict[Node, Split] = {}
    for node in nodes:
        own: Split | None
        if axis in node.axes and (node in loaded or not node.args):
            own = "tile"
        elif node in loaded or not node.args:
            own = "whole"
        else:
            args = [found[a] for a in node.args]
            own = None if "late" in args else _split(node, axis, args)
            if own is None and looped and axis not in node.axes and not _uses(node, axis):
                own = "late" if "tile" not in args else None
        if own is None:
            return None
        found[node] = own
    return found


def _split(node: Node, axis: str, args: list[Split]) -> Split | None:
    touched = {
        node[name] for name in ("axis", "old", "new") if any(k == name for k, _ in node.attrs)
    }
    if axis in touched:
        contracted = node.op in ("sum", "dot") and all(a == "tile" for a in args)
        return "part" if contracted else None
    if "part" not in args:
        return "tile" if axis in node.axes else "whole"
    if axis in node.axes:
        return None
    if node.op in ("mul", "dot"):
        return "part" if sorted(args) == ["part", "whole"] else None
    if node.op == "div":
        return "part" if args == ["part", "whole"] else None
    if node.op == "where":
        zero = node.args[2].op == "const" and node.args[2]["value"] == 0.0
        return "part" if args[0] == "whole" and args[1] == "part" and zero else None
    return "part" if node.op in LINEAR else None


def _uses(node: Node, axis: str) -> bool:
    return any(name in ("axis", "old", "new") and value == axis for name, value in node.attrs)
