"""Runs the compiled graphs in time: what a rank computes, what travels meanwhile, and what it waits for.

One lane computes, in the graph's order, at the topology's rate; elementwise work takes no time. Each traffic class has
a lane of its own, in which collectives queue. A wait holds the computing lane until its collective has arrived: that
is the exposed time. A layer kind was compiled once and is replayed for every layer of that kind.

Gradients of replicated weights are reduced layer by layer while the backward goes on, as DDP and FSDP2 do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import fx

from lmoe_compiler.dry_run.capture import Compiled
from lmoe_compiler.dry_run.sizes import Sizes
from lmoe_compiler.passes.splice import layer_of
from lmoe_compiler.passes.traffic import WAIT, Collective, collectives
from lmoe_compiler.runtime.topology import COLLECTIVES, SCHEDULES

COMPUTE, WEIGHTS = "compute", "weights"
BEFORE, AFTER = -1, -2  # segments of a graph that belong to no layer: embedding; head and loss


@dataclass
class Event:
    """A stretch of one lane, in seconds from the start of the step. `volume`: bytes received.

    `layer` is a number among all layers, or BEFORE or AFTER. `exposed`: seconds that computing waited for it.
    """

    layer: int
    lane: str
    what: str
    backward: bool
    volume: float
    start: float
    seconds: float
    exposed: float = 0.0


@dataclass
class Replay:
    """All events of one training step, and when it ends."""

    events: list[Event]
    seconds: float

    def of(self, **fields: object) -> list[Event]:
        """Events with these values."""
        return [e for e in self.events if all(getattr(e, k) == v for k, v in fields.items())]


def replay(compiled: Compiled, tokens: int | None = None) -> Replay:
    """One forward and backward. `tokens` on each rank, if other than what was compiled for."""
    setting = compiled.setting
    count = setting.tokens if tokens is None else tokens
    sizes = Sizes(compiled.token, count, (compiled.forward, compiled.backward))
    clock = _Clock(compiled, sizes)
    letters, kinds = setting.config.letters, setting.kinds
    parts = segments(compiled.forward.graph, backward=False)
    clock.run(parts.get(BEFORE, []), BEFORE, False)
    for layer, letter in enumerate(letters):
        clock.run(parts[kinds.index(letter)], layer, False)
    clock.run(parts.get(AFTER, []), AFTER, False)
    parts = segments(compiled.backward.graph, backward=True)
    clock.run(parts.get(AFTER, []), AFTER, True)
    clock.reduce(AFTER, ("norm.", "lm_head."))
    for layer, letter in reversed(list(enumerate(letters))):
        kind = kinds.index(letter)
        clock.run(parts[kind], layer, True)
        clock.reduce(layer, (f"layers.{kind}.",))
    clock.run(parts.get(BEFORE, []), BEFORE, True)
    clock.reduce(BEFORE, ("embed.",))
    clock.finish()
    return Replay(clock.events, clock.now)


def segments(graph: fx.Graph, backward: bool) -> dict[int, list[fx.Node]]:
    """Nodes of each compiled layer, of what comes before and after; a node without a name goes with the one before."""
    first, last = (AFTER, BEFORE) if backward else (BEFORE, AFTER)
    current, found, seen = first, dict[int, list[fx.Node]](), False
    for node in graph.nodes:
        if not node.op.startswith("call"):
            continue
        named = "nn_module_stack" in node.meta or "fwd_nn_module_stack" in node.meta
        number = re.search(r"\blayers\.(\d+)\b", layer_of(node))
        if number:
            current, seen = int(number[1]), True
        elif named:
            current = last if seen else first
        found.setdefault(current, []).append(node)
    return found


@dataclass
class _Clock:
    compiled: Compiled
    sizes: Sizes
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    _free: dict[str, float] = field(default_factory=dict)
    _started: dict[fx.Node, Event] = field(default_factory=dict)
    _seen: dict[fx.Node, float] = field(default_factory=dict)

    def run(self, nodes: list[fx.Node], layer: int, backward: bool) -> None:
        """One segment. Computing between two waits is one event."""
        begun = self.now
        talks = {c.node: c for c in collectives(nodes)}
        state = self._state(list(talks.values()))
        for node in nodes:
            if node in talks:
                event = self._price(talks[node], layer, backward, state)
                self._send(event)
                self._started[node] = event
            elif node.target == WAIT:
                event = self._started[node.args[0]]  # type: ignore[index]
                arrived = event.start + event.seconds
                if arrived > self.now:
                    self._computed(begun, layer, backward)
                    event.exposed += arrived - self.now
                    begun = self.now = arrived
            else:
                self.now += self._work(node)
        self._computed(begun, layer, backward)

    def reduce(self, layer: int, prefixes: tuple[str, ...]) -> None:
        """All-reduce of the gradients of a layer's weights: of experts over the ranks that hold the same ones."""
        setting = self.compiled.setting
        dense = experts = 0.0
        for name, parameter in self.compiled.parameters.items():
            if name.startswith(prefixes):
                size = self.sizes.num_bytes(parameter)
                if parameter.dim() == 3 and setting.expert_ranks > 1:
                    experts += size
                else:
                    dense += size
        share = setting.expert_ranks
        for operand, ranks, stride in (
            (dense, setting.ranks, 1),
            (experts, setting.ranks // share, share),
        ):
            if operand and ranks > 1:
                cost = COLLECTIVES["all_reduce"]
                volume, seconds = cost.at(setting.topology, ranks, stride=stride, w=operand)
                self._send(Event(layer, WEIGHTS, "gradients", True, volume, self.now, seconds))

    def finish(self) -> None:
        """The optimiser waits for the gradients."""
        last = [e for e in self.events if e.lane == WEIGHTS][-1:]
        for event in last:
            event.exposed = max(0.0, event.start + event.seconds - self.now)
            self.now += event.exposed

    def _work(self, node: fx.Node) -> float:
        if node not in self._seen:
            self._seen[node] = self.sizes.flops(node) / self.compiled.setting.topology.flops
        return self._seen[node]

    def _computed(self, begun: float, layer: int, backward: bool) -> None:
        if self.now > begun:
            event = Event(layer, COMPUTE, COMPUTE, backward, 0.0, begun, self.now - begun)
            self.events.append(event)

    def _send(self, event: Event) -> None:
        event.start = max(self.now, self._free.get(event.lane, 0.0))
        self._free[event.lane] = event.start + event.seconds
        self.events.append(event)

    def _price(
        self, talk: Collective, layer: int, backward: bool, state: tuple[float, float] | None
    ) -> Event:
        lane, ranks = self.compiled.lanes[talk.group]
        if lane == "state" and state:
            volume, seconds = state
        else:
            operand = self._operand(talk)
            cost = COLLECTIVES[talk.kind]
            volume, seconds = cost.at(self.compiled.setting.topology, ranks, w=operand)
        return Event(layer, lane, self._what(talk, lane), backward, volume, 0.0, seconds)

    def _operand(self, talk: Collective) -> float:
        given = talk.node if talk.kind == "reduce_scatter" else talk.node.args[0]
        return self.sizes.num_bytes(given.meta["val"])  # type: ignore[union-attr]

    def _what(self, talk: Collective, lane: str) -> str:
        if lane == "state":
            choice = self.compiled.choices[talk.layer]
            return choice.planned if self._forced() else choice.schedule
        if lane == "tokens":
            return {"neighbour": "halo", "all_to_all": "heads"}.get(talk.kind, "keys, values")
        if lane == "experts":
            return "rows" if talk.node.meta["val"].is_floating_point() else "counts"
        return "statistics"

    def _forced(self) -> bool:
        """Whether a schedule was asked for that exchange.py does not execute: the model of it takes its place."""
        return any(x.name == self.compiled.setting.schedule and not x.runs for x in SCHEDULES)

    def _state(self, talks: list[Collective]) -> tuple[float, float] | None:
        """(bytes, seconds) of each of a layer's state collectives, where they stand for another schedule's."""
        own = [t for t in talks if self.compiled.lanes[t.group][0] == "state"]
        if not own or not self._forced():
            return None
        choice = self.compiled.choices[own[0].layer]
        volume, seconds = choice.costs[choice.planned]
        return volume / len(own), seconds / len(own)
