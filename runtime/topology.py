"""How fast ranks talk to each other, and what a state exchange costs, as expressions.

Symbols: P ranks, R ranks of one node, s bytes of all states of one rank (fp32), m bytes of their
maps, n = s + m; a, b latency in seconds and bytes per second, inside a node (_in) and across (_x).
Assumptions: one rank sends and receives at full speed at once; an all-to-all across nodes costs 1.5
us more a node; no congestion.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy import Expr, Max, ceiling, log

P, R, s, m = sympy.symbols("P R s m", positive=True)
a_in, b_in, a_x, b_x = sympy.symbols("a_in b_in a_x b_x", positive=True)


@dataclass(frozen=True)
class Topology:
    """Ranks of a node, (latency in s, bytes/s) inside a node and across nodes, and a rank's flops/s in practice."""

    name: str
    ranks_per_node: int
    inside: tuple[float, float]
    across: tuple[float, float]
    flops: float


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
class Schedule:
    """Bytes that a rank receives in one forward exchange, and its time inside one node and across
    nodes.
    """

    name: str
    runs: bool  # whether exchange.py executes it, or it is in the model only
    volume: Expr
    inside: Expr
    across: Expr

    def at(self, topology: Topology, ranks: int, state: int, map_: int) -> tuple[float, float]:
        """(bytes, seconds) for numbers."""
        values = {
            P: ranks,
            R: min(topology.ranks_per_node, ranks),
            s: state,
            m: map_,
            a_in: topology.inside[0],
            b_in: topology.inside[1],
            a_x: topology.across[0],
            b_x: topology.across[1],
        }
        time = self.inside if ranks <= topology.ranks_per_node else self.across
        return float(self.volume.subs(values)), float(time.subs(values))


_n = s + m
_nodes = P / R
_even = (_n + s) * (P - 1) / P
_rounds = 1 + ceiling(log(_nodes, 2))

SCHEDULES = (
    Schedule(
        "all_gather",
        True,
        (P - 1) * _n,
        (P - 1) * (a_in + _n / b_in),
        (_nodes - 1) * (a_x + _n / b_x) + (R - 1) * (a_in + _nodes * _n / b_in),
    ),
    Schedule(
        "transpose",
        True,
        _even,
        2 * 3 * a_in + _even / b_in,
        2 * (a_x + 1.5e-6 * _nodes) + (_n + s) * (P - R) / P / b_x + (_n + s) * (R - 1) / P / b_in,
    ),
    Schedule(
        "ring", False, s, (P - 1) * (a_in + s / b_in), (P - 1) * Max(a_in + s / b_in, a_x + s / b_x)
    ),
    Schedule(
        "hierarchical",
        False,
        (_n + s) * (R - 1) / R + _rounds * _n / R,
        2 * 3 * a_in + _even / b_in,
        2 * 3 * a_in + (_n + s) * (R - 1) / R / b_in + _rounds * (a_x + _n / R / b_x),
    ),
)
