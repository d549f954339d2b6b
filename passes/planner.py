"""Which schedule a layer's state exchange takes, and why: the costs of all of them at this layer's sizes.

The time that counts is what is exposed: an exchange is free as far as other work runs meanwhile (cost.py). How much
that is depends on a rank's tokens, and all ranks have to choose alike: where they may hold different numbers, the
fastest is taken, of which no more is exposed than of any other.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmoe_compiler.runtime.topology import SCHEDULES, TOPOLOGIES, Topology


@dataclass(frozen=True)
class Choice:
    """`schedule` is executed; `costs` has (bytes, seconds) of every schedule by name, `hidden` seconds of other work.

    `planned` is what was asked for, or the best of the model; it differs where exchange.py does not execute it yet.
    `padded`: heads, and to how many they are padded.
    """

    schedule: str
    planned: str
    forced: bool
    costs: dict[str, tuple[float, float]]
    hidden: float = 0.0
    padded: tuple[int, int] | None = None

    def exposed(self, name: str) -> float:
        """Seconds of a schedule in which nothing else runs."""
        return max(0.0, self.costs[name][1] - self.hidden)

    def __str__(self) -> str:
        def cost(name: str) -> str:
            volume, seconds = self.costs[name]
            exposed = self.exposed(name)
            return f"{name} {size(volume)}, {seconds * 1e6:.0f} us, {exposed * 1e6:.0f} us exposed"

        others = "; ".join(cost(name) for name in self.costs if name != self.schedule)
        why = "asked for" if self.forced else "cheapest that runs"
        if self.planned != self.schedule:
            what = "asked for" if self.forced else "cheaper"
            why = f"cheapest that runs; {self.planned} is {what}, and only planned so far"
        if self.padded:
            why += "; {} heads are padded to {}".format(*self.padded)
        return f"{cost(self.schedule)} ({why}; {others})"


def choose(
    asked: str,
    ranks: int,
    state: int,
    map_: int,
    topology: Topology,
    *,
    heads: int = 1,
    span: int | None = None,
    hidden: float = 0.0,
    even: bool = True,
) -> Choice:
    """The schedule with the least exposed time, then the fewest bytes.

    asked: "auto" or a schedule. state, map_: bytes of one rank's states and of their maps, of `heads` heads. span: over
    how many ranks a document spans at most (None: all). hidden: seconds of work that can run meanwhile. even:
    whether all ranks hold as many tokens.
    """
    reach = ranks if span is None else min(span, ranks)
    costs = {
        x.name: x.cost.at(topology, ranks, D=reach, H=heads, s=float(state), m=float(map_))
        for x in SCHEDULES
    }

    def merit(name: str) -> tuple[float, float]:
        volume, seconds = costs[name]
        return max(0.0, seconds - hidden) if even else seconds, volume

    executed = [x.name for x in SCHEDULES if x.runs]
    planned = min(costs, key=merit) if asked == "auto" else asked
    schedule = planned if planned in executed else min(executed, key=merit)
    whole = -(-heads // ranks) * ranks
    padded = (heads, whole) if schedule == "transpose" and whole != heads else None
    return Choice(schedule, planned, asked != "auto", costs, hidden, padded)


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
