"""Runs the compiled graphs in time: what a rank computes, what travels meanwhile, and what it waits for.

One lane computes, in the graph's order, at the topology's rate; elementwise work takes no time. Each traffic class has
a lane of its own, in which collectives queue. A wait holds the computing lane until its collective has arrived: that
is the exposed time. A layer kind was compiled once and stands for every layer of that kind (unroll.py).

Gradients of replicated weights are reduced layer by layer while the backward goes on, as DDP and FSDP2 do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from lmoe_compiler.dry_run.capture import Compiled
from lmoe_compiler.dry_run.sizes import Sizes
from lmoe_compiler.dry_run.unroll import AFTER, BEFORE, Step
from lmoe_compiler.passes.traffic import WAIT, Collective, collectives
from lmoe_compiler.runtime.topology import COLLECTIVES, SCHEDULES

COMPUTE, WEIGHTS = "compute", "weights"


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
    count = compiled.setting.tokens if tokens is None else tokens
    sizes = Sizes(compiled.token, count, (compiled.forward, compiled.backward))
    clock = _Clock(compiled, sizes)
    clock.run(compiled.steps(backward=False), False)
    clock.run(compiled.steps(backward=True), True)
    clock.finish()
    return Replay(clock.events, clock.now)


@dataclass
class _Clock:
    compiled: Compiled
    sizes: Sizes
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    _free: dict[str, float] = field(default_factory=dict)
    _started: dict[fx.Node, Event] = field(default_factory=dict)
    _seen: dict[fx.Node, float] = field(default_factory=dict)
    _forced_state: dict[int, tuple[float, float]] = field(default_factory=dict)

    def run(self, steps: Sequence[Step], backward: bool) -> None:
        """One graph. Computing in one layer, between two waits, is one event."""
        talks = {c.node: c for c in collectives(step.node for step in steps)}
        self._forced_state = self._states(steps, talks)
        missing = Counter(step.layer for step in steps)
        begun, layer = self.now, BEFORE
        for step in steps:
            node = step.node
            if step.layer != layer:
                self._computed(begun, layer, backward)
                begun, layer = self.now, step.layer
            if node in talks:
                event = self._price(talks[node], layer, backward)
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
                self.now += self._work(step.compiled)
            missing[layer] -= 1
            if backward and not missing[layer]:
                self._computed(begun, layer, backward)
                begun = self.now
                self.reduce(layer)
        self._computed(begun, layer, backward)

    def reduce(self, layer: int) -> None:
        """All-reduce of the gradients of a layer's weights: of experts over the ranks that hold the same ones."""
        setting = self.compiled.setting
        outside = {BEFORE: ("embed.",), AFTER: ("norm.", "lm_head.")}
        prefixes = outside.get(layer) or (
            f"layers.{setting.kinds.index(setting.config.letters[layer])}.",
        )
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

    def _price(self, talk: Collective, layer: int, backward: bool) -> Event:
        lane, ranks = self.compiled.lanes[talk.group]
        if lane == "state" and self._forced_state:
            volume, seconds = self._forced_state[layer]
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

    def _states(
        self, steps: Sequence[Step], talks: Mapping[fx.Node, Collective]
    ) -> dict[int, tuple[float, float]]:
        """(bytes, seconds) of each of a layer's state collectives, where they stand for another schedule's."""
        if not self._forced():
            return {}
        own = [s for s in steps if s.node in talks and self._lane(talks[s.node]) == "state"]
        counts = Counter(step.layer for step in own)
        found = {}
        for step in own:
            choice = self.compiled.choices[talks[step.node].layer]
            volume, seconds = choice.costs[choice.planned]
            found[step.layer] = volume / counts[step.layer], seconds / counts[step.layer]
        return found

    def _lane(self, talk: Collective) -> str:
        return self.compiled.lanes[talk.group][0]
