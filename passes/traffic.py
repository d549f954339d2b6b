"""The collectives of a graph after AOTAutograd: what each is, whose it is, and the bytes of its operand.

Notation: w is the operand as runtime/topology.py counts it, so `COLLECTIVES[kind]` gives bytes received and time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lmoe_compiler.passes.splice import known_size, layer_of

KINDS = {
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
    """Those among the nodes, in order. An uneven all-to-all with one neighbour is of kind "neighbour"."""
    rows: dict[object, int] = {}
    for node in nodes:
        if node.target not in KINDS:
            continue
        kind, given = KINDS[node.target], node.args[0]
        assert isinstance(given, fx.Node)
        value = (node if kind == "reduce_scatter" else given).meta["val"]
        operand = num_bytes(value)
        if kind == "all_to_all" and operand is not None:
            # To experts. As many rows come back, and in the mean as many go through this rank's experts.
            rows |= dict.fromkeys(splits(node), known_size(value.shape[0]))
        elif kind == "all_to_all":
            operand = rows.get(splits(node)[1], 0) * (num_bytes(value[0]) or 0.0)
        if kind == "all_to_all" and _one_neighbour(node.args[1]):
            kind = "neighbour"
        yield Collective(node, kind, str(node.args[-1]), operand or 0.0)


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
