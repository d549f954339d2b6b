"""The collectives of a graph after AOTAutograd: what each is, whose it is, and the bytes of its operand.

Notation: w is the operand as runtime/topology.py counts it, so `COLLECTIVES[kind]` gives bytes received and time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lmoe_compiler.passes.splice import known_size, layer_of
from lmoe_compiler.runtime.failures import group_of

KINDS: dict[object, str] = {
    torch.ops._c10d_functional.all_gather_into_tensor.default: "all_gather",
    torch.ops._c10d_functional.reduce_scatter_tensor.default: "reduce_scatter",
    torch.ops._c10d_functional.all_reduce.default: "all_reduce",
    torch.ops._c10d_functional.all_to_all_single.default: "all_to_all",
}
WAIT = torch.ops._c10d_functional.wait_tensor.default


@dataclass(frozen=True)
class Collective:
    """One started collective. `group`: name of its process group. `operand`: bytes w, see topology.COLLECTIVES."""

    node: fx.Node
    kind: str
    group: str
    operand: float

    @property
    def layer(self) -> str:
        return layer_of(self.node)


def collectives(nodes: Iterable[fx.Node]) -> Iterator[Collective]:
    """Those among the nodes, in order."""
    for node in nodes:
        kind = kind_of(node.target, node.args)
        if kind:
            args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            operand = operand_of(kind, args, node.meta["val"])
            yield Collective(node, kind, group_of(str(node.args[-1])), operand)


def kind_of(target: object, args: Any) -> str:
    """The kind of a call, "" for no collective. An uneven all-to-all with one neighbour is of kind "neighbour"."""
    kind = KINDS.get(target, "")
    return "neighbour" if kind == "all_to_all" and _one_neighbour(args[1]) else kind


def operand_of(kind: str, args: Any, out: Any) -> float:
    """w in bytes; 0 where only the data knows."""
    return num_bytes(out if kind == "reduce_scatter" else args[0]) or 0.0


def num_bytes(value: Tensor) -> float | None:
    """Size with the lengths of this compilation in place of symbols; None where only the data knows."""
    count = 1
    for length in value.shape:
        if isinstance(length, torch.SymInt) and free_unbacked_symbols(length):
            return None
        count *= known_size(length)
    return float(count * value.element_size())


def splits(node: fx.Node) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """(rows from each rank, rows to each rank) of an all-to-all."""
    out, in_ = node.args[1:3]
    assert isinstance(out, tuple | list)
    assert isinstance(in_, tuple | list)
    return tuple(out), tuple(in_)


def _one_neighbour(out: object) -> bool:
    assert isinstance(out, tuple | list)
    numbers = [x for x in out if isinstance(x, int)]
    return len(numbers) == len(out) > 1 and sum(x != 0 for x in numbers) == 1


def depends_on(graph: fx.Graph, prefix: str) -> set[fx.Node]:
    """Nodes that an input of that name ("tangents") reaches."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        starts = node.op == "placeholder" and node.name.startswith(prefix)
        if starts or any(operand in found for operand in node.all_input_nodes):
            found.add(node)
    return found
