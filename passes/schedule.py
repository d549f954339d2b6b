"""After AOTAutograd, forward and backward: a collective starts as soon as its operand is there, and is
waited for as late as may be. Autograd writes every wait right behind its start.

    d_shared, d_weight = products          start = all_to_all(d_rows)
    start = all_to_all(d_rows)        ->   d_shared, d_weight = products
    d_x = wait(start)                      d_x = wait(start)

What a start needs comes first; what it does not need is kept for the time until the next wait. A
gradient's sum over ranks starts when the gradient is there, hurries nobody, and is waited for at the
end. The order is decided by the graph alone, so it is the same on every rank; values do not change.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from lmoe_compiler.passes.report import Report

_WAIT = torch.ops._c10d_functional.wait_tensor.default
# What a check forbids must not start before it.
_CHECKS = (torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg)


@dataclass(frozen=True)
class RaiseStarts:
    """Reorders a graph of ATen ops between those that change an operand or the random state, or check.

    Algorithm: 1. In the order of starts whose result is used here: what the next one needs, in the
    old order, then it. 2. Before a wait among these: everything ready that came before that wait.
    3. After each node: any other start that has become ready. 4. At the end what is left, waits
    last.
    """

    name: str = "starts"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        if not any(_is_start(node) for node in gm.graph.nodes):
            return report
        order = reordered(gm.graph)
        old = _in_flight(_running(gm.graph))
        for node, count in _in_flight(order).items():
            if count > old[node]:
                report.add("waits", f"{count} nodes instead of {old[node]} run before {node.name}")
        if report.counts:
            output = next(node for node in gm.graph.nodes if node.op == "output")
            for node in order:
                output.prepend(node)
            gm.graph.lint()
            gm.recompile()
        return report


def reordered(graph: fx.Graph) -> list[fx.Node]:
    """The nodes between inputs and output, in the order that RaiseStarts gives them; the graph stays as it is."""
    return [node for part in _between_effects(_running(graph)) for node in _Schedule(part).run()]


def _running(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op not in ("placeholder", "output")]


def _is_start(node: fx.Node) -> bool:
    space = getattr(node.target, "namespace", None)
    return space == "_c10d_functional" and node.target is not _WAIT


def _used_here(start: fx.Node) -> bool:
    """Whether a node of the graph, not only its caller, uses what a start brings."""
    return any(user.op != "output" for wait in start.users for user in wait.users)


def _between_effects(nodes: Iterable[fx.Node]) -> Iterator[list[fx.Node]]:
    """Runs of nodes without an effect, and each of the others alone."""
    part: list[fx.Node] = []
    for node in nodes:
        if _has_effect(node):
            yield from (part, [node])
            part = []
        else:
            part.append(node)
    yield part


def _has_effect(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is _WAIT:
        return False
    if node.target in _CHECKS:
        return True
    seeded = torch.Tag.nondeterministic_seeded in node.target.tags
    return seeded or node.target._schema.is_mutable


def _in_flight(order: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """For each wait, how many nodes of any weight run between its start and it."""
    counted: dict[fx.Node, int] = {}
    calls = [n for n in order if n.op.startswith("call") and n.target is not operator.getitem]
    place = {node: i for i, node in enumerate(calls)}
    for node in calls:
        if node.target is _WAIT:
            (start,) = node.all_input_nodes
            counted[node] = place[node] - place.get(start, place[node] - 1) - 1
    return counted


@dataclass
class _Schedule:
    nodes: list[fx.Node]
    order: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.missing = {
            node: sum(operand in self.place for operand in node.all_input_nodes)
            for node in self.nodes
        }
        self.done: set[fx.Node] = set()
        self.kept: list[fx.Node] = list(self.nodes)

    def run(self) -> list[fx.Node]:
        for start in [node for node in self.nodes if _is_start(node) and _used_here(node)]:
            for node in self._needed(start):
                if node.target is _WAIT:
                    self._fill(self.place[node])
                self._emit(node)
        self._fill(len(self.nodes))
        for node in self.nodes:
            self._emit(node)
        assert len(self.order) == len(self.nodes)
        return self.order

    def _needed(self, start: fx.Node) -> list[fx.Node]:
        """A start and what it still needs, in the old order."""
        seen, ahead = set(), [start]
        while ahead:
            node = ahead.pop()
            if node in self.place and node not in self.done and node not in seen:
                seen.add(node)
                ahead += node.all_input_nodes
        return sorted(seen, key=self.place.__getitem__)

    def _fill(self, before: int) -> None:
        """What can run without another wait, of the nodes that came before that place."""
        self.kept = [node for node in self.kept if node not in self.done]
        for node in self.kept:
            if self.place[node] >= before:
                break
            if node.target is not _WAIT and not self.missing[node]:
                self._emit(node)

    def _emit(self, node: fx.Node) -> None:
        if node in self.done:
            return
        self.done.add(node)
        self.order.append(node)
        ready = []
        for user in node.users:
            if user in self.missing:
                self.missing[user] -= 1
                if not self.missing[user] and _is_start(user):
                    ready.append(user)
        for user in sorted(ready, key=self.place.__getitem__):
            self._emit(user)
