"""Which schedule a layer's state exchange takes, and why: the costs of all of them at this layer's
sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmoe_compiler.runtime.topology import SCHEDULES, TOPOLOGIES, Topology


@dataclass(frozen=True)
class Choice:
    """The schedule that is executed; `costs` has (bytes, seconds) of every schedule by name."""

    schedule: str
    forced: bool
    costs: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        def cost(name: str) -> str:
            volume, seconds = self.costs[name]
            return f"{name} {size(volume)}, {seconds * 1e6:.0f} us"

        others = "; ".join(cost(name) for name in self.costs if name != self.schedule)
        why = "asked for" if self.forced else "cheapest that runs"
        return f"{cost(self.schedule)} ({why}; {others})"


def choose(asked: str, ranks: int, state: int, map_: int, topology: Topology) -> Choice:
    """`asked`: "auto" or a schedule. state, map_: bytes of one rank's states and of their maps."""
    costs = {x.name: x.at(topology, ranks, state, map_) for x in SCHEDULES}
    if asked != "auto":
        return Choice(asked, True, costs)
    runs = [x.name for x in SCHEDULES if x.runs]
    return Choice(min(runs, key=lambda name: costs[name][1]), False, costs)


def topology_of(device_type: str) -> Topology:
    """The stated topology of a device: what the planner assumes where nobody says."""
    return TOPOLOGIES["h100" if device_type == "cuda" else "cpu"]


def size(volume: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if volume < 1024:
            return f"{volume:.4g} {unit}"
        volume /= 1024
    return f"{volume:.4g} GiB"
