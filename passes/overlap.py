"""Runs what does not need a collective's result while it is in flight.

    flight = start(...)          flight = start(...)
    S_in = finish(flight)   ->   independent work
    independent work             S_in = finish(flight)

Every wait, with all that needs it, moves behind the work that needs no wait, up to the next start.
Starts keep their order, which is the order on every rank; values do not change.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lmoe_compiler.passes.match import ENTER, EXIT
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor, layer_of
from lmoe_compiler.runtime import capacity, dispatch, exchange

STARTS = frozenset(
    {exchange.start, dispatch.send, dispatch.compute, capacity.send, capacity.compute}
)
FINISHES = frozenset(
    {exchange.finish, dispatch.compute, dispatch.combine, capacity.compute, capacity.combine}
)


@dataclass(frozen=True)
class Overlap:
    """Delays the finish of every exchange.

    One walk: a finish, and whatever depends on it, is held back until a start depends on it, until
    a node that acts on everything after it (autocast), or to the end.
    """

    name: str = "overlap"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        held: dict[fx.Node, int] = {}
        for node in list(gm.graph.nodes):
            if _is_barrier(node) or (node.target in STARTS and _needs(node, held)):
                _release(held, node, report)
            if node.op == "output":
                break
            if node.target in FINISHES or _needs(node, held):
                held[node] = 0
            elif node.op.startswith("call"):
                for waiting in held:
                    held[waiting] += 1
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _is_barrier(node: fx.Node) -> bool:
    return node.op == "output" or node.target in (ENTER, EXIT) or node.is_impure()


def _needs(node: fx.Node, held: dict[fx.Node, int]) -> bool:
    return any(operand in held for operand in node.all_input_nodes)


def _release(held: dict[fx.Node, int], before: fx.Node, report: Report) -> None:
    """Put the held nodes, in their order, right before `before`; the counts say what they let pass."""
    if any(held.values()):
        for node, passed in held.items():
            before.prepend(node)
            if node.target in FINISHES and passed:
                report.add("waits", f"{layer_of(node)}: {passed} nodes run before {node.name}")
    held.clear()
