"""Peak memory of one rank in a training step, from the graphs: an upper bound.

Weights and gradients in the model's type, AdamW's moments and a master copy in float32, none of them cut over ranks;
all that the forward keeps for the backward; and the most that is alive besides, in either graph as autograd makes them
and schedule.py orders them (Inductor fuses, and keeps less).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lmoe_compiler.dry_run.capture import Compiled
from lmoe_compiler.dry_run.sizes import Sizes
from lmoe_compiler.dry_run.unroll import AFTER, BEFORE, segments
from lmoe_compiler.passes.schedule import reordered

ADAM = 12  # bytes a parameter: two moments and a master copy


@dataclass(frozen=True)
class Memory:
    """Bytes. `kept`: of every layer kind, what one layer keeps for its backward (BEFORE, AFTER: outside of layers)."""

    weights: float
    gradients: float
    optimiser: float
    kept: dict[int, float]
    kept_in_all: float
    working: float

    @property
    def peak(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.kept_in_all + self.working


def memory(compiled: Compiled, tokens: int | None = None) -> Memory:
    setting = compiled.setting
    count = setting.tokens if tokens is None else tokens
    sizes = Sizes(compiled.token, count, (compiled.forward, compiled.backward))
    times = _times(compiled)
    number = weights = 0.0
    for name, parameter in compiled.parameters.items():
        numel = parameter.numel() * times[_kind(name)]
        number, weights = number + numel, weights + numel * parameter.element_size()
    kept: dict[int, float] = {}
    places = {
        node: place
        for place, nodes in segments(compiled.forward.graph, backward=False).items()
        for node in nodes
    }
    saved = set(_saved(compiled))
    for node in saved:
        place = places.get(node, BEFORE)
        kept[place] = kept.get(place, 0.0) + sizes.num_bytes(node.meta["val"])
    working = max(
        _working(graph.graph, sizes, saved) for graph in (compiled.forward, compiled.backward)
    )
    total = sum(size * times[place] for place, size in kept.items())
    return Memory(weights, weights, number * ADAM, kept, total, working)


def _times(compiled: Compiled) -> dict[int, int]:
    """How many layers a compiled one stands for."""
    letters = compiled.setting.config.letters
    counts = {i: letters.count(c) for i, c in enumerate(compiled.setting.kinds)}
    return {BEFORE: 1, AFTER: 1, **counts}


def _kind(name: str) -> int:
    words = name.split(".")
    return int(words[1]) if words[0] == "layers" else BEFORE


def _saved(compiled: Compiled) -> Iterator[fx.Node]:
    """What holds the memory of the values that the forward hands to the backward, each once."""
    (output,) = (n for n in compiled.forward.graph.nodes if n.op == "output")
    owners = _owners(compiled.forward.graph)
    values = [x for x in output.args[0][compiled.num_outputs :] if isinstance(x, fx.Node)]
    for node in dict.fromkeys(owners[x] for x in values):
        if node.op != "placeholder" and isinstance(node.meta.get("val"), Tensor):
            yield node


def _owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the one that made its memory: a view's is its operand's."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        owners[node] = owners[node.all_input_nodes[0]] if _is_view(node) else node
    return owners


def _is_view(node: fx.Node) -> bool:
    if not node.all_input_nodes:
        return False
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None


def _working(graph: fx.Graph, sizes: Sizes, kept: set[fx.Node]) -> float:
    """The most bytes that are alive at one node, without inputs and what is kept."""
    owners = _owners(graph)
    (output,) = (n for n in graph.nodes if n.op == "output")
    order = [*reordered(graph), output]
    last = {owners[operand]: node for node in order for operand in node.all_input_nodes}
    ends: dict[fx.Node, list[fx.Node]] = {}
    for owner, node in last.items():
        ends.setdefault(node, []).append(owner)
    alive = most = 0.0
    held: dict[fx.Node, float] = {}
    for node in order:
        if node.op.startswith("call") and owners[node] is node and node not in kept:
            held[node] = sum(sizes.num_bytes(x) for x in _tensors(node.meta.get("val")))
            alive += held[node]
            most = max(most, alive)
        for owner in ends.get(node, []):
            alive -= held.pop(owner, 0.0)
    return most


def _tensors(value: object) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [x for x in values if isinstance(x, Tensor)]
