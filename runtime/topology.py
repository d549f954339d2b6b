"""How fast ranks talk to each other, and what collectives and state exchanges cost, as expressions.

Symbols: P ranks of the axis, R of them in one node, D ranks over which a document spans at most; w bytes of a
collective's operand; s bytes of all states of one rank (fp32), m bytes of their maps, n = s + m, of H heads; a, b
latency in seconds and bytes per second, inside a node (_in) and across (_x).
Assumptions: one rank sends and receives at full speed at once; rings for gathers, rings or trees for all-reduce; an
all-to-all costs three latencies inside a node and 1.5 us more a node across; no congestion, no other traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import sympy
from sympy import Expr, Max, Min, ceiling, log

P, R, D, H, w, s, m = sympy.symbols("P R D H w s m", positive=True)
a_in, b_in, a_x, b_x = sympy.symbols("a_in b_in a_x b_x", positive=True)
n = s + m
nodes = P / R


@dataclass(frozen=True)
class Topology:
    """Ranks of a node, (latency in s, bytes/s) inside a node and across nodes, and a rank's flops/s in practice."""

    name: str
    ranks_per_node: int
    inside: tuple[float, float]
    across: tuple[float, float]
    flops: float

    def __str__(self) -> str:
        def link(latency: float, speed: float) -> str:
            return f"{latency * 1e6:.3g} us and {speed / 1e9:.3g} GB/s"

        return (
            f"{self.name}: {self.ranks_per_node} ranks a node, {link(*self.inside)} inside, "
            f"{link(*self.across)} across, {self.flops / 1e12:.3g} Tflop/s"
        )


TOPOLOGIES = {
    topology.name: topology
    for topology in (
        # NVLink and InfiniBand NDR, 400 Gbit/s a GPU: usual figures, not measured by us.
        Topology("h100", 8, (4e-6, 400e9), (12e-6, 45e9), 400e12),
        Topology("nvl72", 72, (4e-6, 700e9), (12e-6, 45e9), 900e12),
        # gloo over the loopback device.
        Topology("cpu", 1024, (100e-6, 1e9), (100e-6, 1e9), 50e9),
    )
}


@dataclass(frozen=True)
class Cost:
    """Bytes that a rank receives, and its time inside one node and across nodes."""

    volume: Expr
    inside: Expr
    across: Expr

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.volume + other.volume, self.inside + other.inside, self.across + other.across
        )

    def of(self, operand: Expr) -> Cost:
        """With another operand than w."""
        return Cost(*(x.subs(w, operand) for x in (self.volume, self.inside, self.across)))

    def at(
        self, topology: Topology, ranks: int, *, stride: int = 1, **values: float
    ) -> tuple[float, float]:
        """(bytes, seconds) for numbers. `stride`: the distance of neighbours on the axis, in ranks."""
        in_node = max(1, min(topology.ranks_per_node // stride, ranks))
        volume, seconds = _numbers(self, in_node == ranks)
        links = (*topology.inside, *topology.across)
        given = [float(values.get(str(x), 0.0)) for x in (D, H, w, s, m)]
        numbers = (ranks, in_node, *given, *links)
        return float(volume(*numbers)), float(seconds(*numbers))


@cache
def _numbers(cost: Cost, inside: bool) -> tuple[Callable[..., float], ...]:
    """Volume and time as Python functions: substituting into expressions takes milliseconds."""
    symbols = (P, R, D, H, w, s, m, a_in, b_in, a_x, b_x)
    time = cost.inside if inside else cost.across
    return tuple(sympy.lambdify(symbols, x, "math") for x in (cost.volume, time))


_gather = Cost(
    (P - 1) * w,
    (P - 1) * (a_in + w / b_in),
    (nodes - 1) * (a_x + w / b_x) + (R - 1) * (a_in + nodes * w / b_in),
)
_rings = _gather.of(w / P) + _gather.of(w / P)
_tree = ceiling(log(nodes, 2)) * (a_x + w / b_x) + ceiling(log(R, 2)) * (a_in + w / b_in)

COLLECTIVES = {
    # w: what one rank gives
    "all_gather": _gather,
    # w: what one rank keeps
    "reduce_scatter": _gather,
    # w: what one rank holds, 1/P of it for each rank
    "all_to_all": Cost(
        w * (P - 1) / P,
        3 * a_in + w * (P - 1) / P / b_in,
        a_x + sympy.Float(1.5e-6) * nodes + w * (P - R) / P / b_x + w * (R - 1) / P / b_in,
    ),
    # w: what one rank sends to the next
    "neighbour": Cost(w, a_in + w / b_in, a_x + w / b_x),
    # w: what every rank holds
    "all_reduce": Cost(
        2 * (P - 1) / P * w,
        Min(_rings.inside, 2 * ceiling(log(P, 2)) * (a_in + w / b_in)),
        Min(_rings.across, 2 * _tree),
    ),
}


@dataclass(frozen=True)
class Schedule:
    """A way to exchange states, and its cost in s, m, H, P, R and D."""

    name: str
    runs: bool  # whether exchange.py executes it, or it is in the model only
    cost: Cost


_even, _hops = COLLECTIVES["all_to_all"], Min(P, D) - 1
# Heads are padded to a multiple of the ranks that fold them.
_over_P, _over_R = P * ceiling(H / P) / H, R * ceiling(H / R) / H
# A shift and a logarithmic scan, where there is more than one node.
_rounds = ceiling(Min(1, nodes - 1)) * (1 + ceiling(log(nodes, 2)))
_inside = Cost(
    _over_R * (n + s) * (R - 1) / R,
    2 * 3 * a_in + _over_R * (n + s) * (R - 1) / R / b_in,
    2 * 3 * a_in + _over_R * (n + s) * (R - 1) / R / b_in,
)

SCHEDULES = (
    # Everybody gets all maps and folds them (LASP-2).
    Schedule("all_gather", True, COLLECTIVES["all_gather"].of(n)),
    # Maps to the rank that folds their heads, states back.
    Schedule("transpose", True, _even.of(_over_P * n) + _even.of(_over_P * s)),
    # Each rank waits for the one before it (LASP-1). A document that spans D ranks needs D - 1 hops.
    Schedule(
        "ring",
        False,
        Cost(s, _hops * (a_in + s / b_in), _hops * Max(a_in + s / b_in, a_x + s / b_x)),
    ),
    # Heads over the ranks of a node, then a logarithmic scan over nodes, and back.
    Schedule(
        "hierarchical",
        False,
        _inside
        + Cost(
            _rounds * _over_R * n / R,
            sympy.Integer(0),
            _rounds * (a_x + _over_R * n / R / b_x),
        ),
    ),
)
