"""The graph of a whole model from that of its kinds of layers: each compiled layer again and again, in the model's
order, and then what passes/schedule.py does to it.

What a layer takes from the one before it is the stream: of everything that the segment before leaves to others and
that has tokens, the last. The rest of its operands are its own, inputs, or what is there once (counts, offsets).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import sympy
from torch import Tensor, fx

from lmoe_compiler.passes.schedule import reordered
from lmoe_compiler.passes.splice import layer_of
from lmoe_compiler.passes.token_axis import axes_with

BEFORE, AFTER = -1, -2  # segments of a graph that belong to no layer: embedding; head and loss


@dataclass(frozen=True)
class Step:
    """A node of the whole model: what it is a copy of, and the layer (a number among all, or BEFORE or AFTER) whose."""

    node: fx.Node
    compiled: fx.Node
    layer: int


def unroll(
    graph: fx.Graph, letters: str, kinds: str, token: sympy.Symbol, backward: bool
) -> list[Step]:
    """All calls of the model, in the order in which they run; `graph` has a layer of each of `kinds`."""
    parts = segments(graph, backward)
    layers = [(layer, kinds.index(letter)) for layer, letter in enumerate(letters)]
    order = [(BEFORE, BEFORE), *layers, (AFTER, AFTER)]
    whole = _Whole(parts, token)
    for layer, place in reversed(order) if backward else order:
        whole.append(layer, place)
    whole.graph.output(())
    return [whole.steps[node] for node in reordered(whole.graph) if node in whole.steps]


@dataclass
class _Whole:
    parts: dict[int, list[fx.Node]]
    token: sympy.Symbol
    graph: fx.Graph = field(default_factory=fx.Graph)
    steps: dict[fx.Node, Step] = field(default_factory=dict)
    copies: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    stream: fx.Node | None = None
    previous: int | None = None

    def __post_init__(self) -> None:
        self.home = {node: place for place, nodes in self.parts.items() for node in nodes}

    def append(self, layer: int, place: int) -> None:
        """A segment's nodes once more."""
        left = self.stream
        for node in self.parts.get(place, []):
            taken = {x: self._operand(x, place) for x in node.all_input_nodes}
            copy = self.graph.node_copy(node, taken.__getitem__)
            if layer < 0:
                # What is outside of layers has something of each of them.
                every = [c for x in taken for c in self.copies.get(x, []) if c is not taken[x]]
                copy.kwargs = {**copy.kwargs, **({"others": every} if every else {})}
            self.copies.setdefault(node, []).append(copy)
            self.steps[copy] = Step(copy, node, layer)
            if self._is_stream(node) and any(self._elsewhere(x, place) for x in node.users):
                left = copy
        self.stream, self.previous = left, place

    def _operand(self, x: fx.Node, place: int) -> fx.Node:
        """The newest copy, or the stream: instead of what came from a layer that is not the one before here."""
        if not x.op.startswith("call") and x not in self.copies:
            self.copies[x] = [self.graph.node_copy(x)]
        foreign = self._elsewhere(x, place) and self.home[x] != self.previous
        if self.stream and foreign and (self._is_stream(x) or x not in self.copies):
            return self.stream
        return self.copies[x][-1]

    def _elsewhere(self, x: fx.Node, place: int) -> bool:
        return self.home.get(x, place) != place

    def _is_stream(self, node: fx.Node) -> bool:
        return _has_tokens(node, self.token)


def _has_tokens(node: fx.Node, token: sympy.Symbol) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and bool(axes_with(value, token))


def segments(graph: fx.Graph, backward: bool) -> dict[int, list[fx.Node]]:
    """Nodes of each compiled layer, of what comes before and after; a node without a name goes with the one before."""
    first, last = (AFTER, BEFORE) if backward else (BEFORE, AFTER)
    current, found, behind = first, dict[int, list[fx.Node]](), set[fx.Node]()
    for node in graph.nodes:
        if not node.op.startswith("call"):
            continue
        named = "nn_module_stack" in node.meta or "fwd_nn_module_stack" in node.meta
        number = re.search(r"\blayers\.(\d+)\b", layer_of(node))
        follows = any(x in behind for x in node.all_input_nodes)
        if number:
            current = int(number[1])
        elif named:
            # Autograd may put the head's last between those of layers, which need it.
            current = last if (follows if backward else behind) else first
        if number or follows:
            behind.add(node)
        found.setdefault(current, []).append(node)
    return found
