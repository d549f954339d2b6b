"""Runs what does not need a collective's result while it is in flight.

    flight = start(...)          flight = start(...)
    S_in = finish(flight)   ->   independent work
    independent work             S_in = finish(flight)

Every wait, with all that needs it, moves behind the work that needs no wait, up to the next start.
What waits and starts again (experts: rows there, products, rows back) moves into the middle of that
work, so that both ways are covered:

    sent = send(x)                                sent = send(x)
    back = compute(sent)                          first half of the shared expert
    y = combine(back)                        ->   back = compute(sent)
    shared expert                                 second half
                                                  y = combine(back)

The order is decided by the graph alone, so it is the same on every rank; values do not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from lmoe_compiler.passes.cost import counted
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
        waiting = _Waiting()
        for node in list(gm.graph.nodes):
            if _is_barrier(node) or (node.target in STARTS and waiting.needed_by(node)):
                waiting.release(node, report)
                waiting = _Waiting()
            if node.op == "output":
                break
            if node.target in FINISHES or waiting.needed_by(node):
                waiting.held[node] = len(waiting.passed)
            elif node.op.startswith("call") and waiting.held:
                waiting.passed.append(node)
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _is_barrier(node: fx.Node) -> bool:
    return node.op == "output" or node.target in (ENTER, EXIT) or node.is_impure()


@dataclass
class _Waiting:
    """Held nodes in their order, with how many of the passed nodes came before them; and those."""

    held: dict[fx.Node, int] = field(default_factory=dict)
    passed: list[fx.Node] = field(default_factory=list)

    def needed_by(self, node: fx.Node) -> bool:
        return any(operand in self.held for operand in node.all_input_nodes)

    def release(self, before: fx.Node, report: Report) -> None:
        """Put the held nodes back, as late as possible before `before`; the report says what they
        let pass.
        """
        if len(self.passed) <= min(self.held.values(), default=0):
            return
        places = self._places()
        for node, origin in self.held.items():
            place = places[node]
            target = self.passed[place] if place < len(self.passed) else before
            target.prepend(node)
            if node.target in FINISHES and place > origin:
                report.add(
                    "waits", f"{layer_of(node)}: {place - origin} nodes run before {node.name}"
                )

    def _places(self) -> dict[fx.Node, int]:
        """Before which passed node each held one goes: starts share the products that passed."""
        starts = [node for node in self.held if node.target in STARTS]
        products = [i for i, node in enumerate(self.passed) if starts and _multiplies(node)]
        places: dict[fx.Node, int] = {}
        begun, earliest = 0, 0
        for node, origin in self.held.items():
            earliest = max(earliest, origin, *(self._after(n) for n in node.all_input_nodes))
            if begun < len(starts):
                share = -(-len(products) * (begun + 1) // (len(starts) + 1))
                middle = products[share - 1] + 1 if share else len(self.passed)
                # A start stays before those that came after it.
                next_start = next(
                    (i for i in range(earliest, len(self.passed)) if self._starts(i)),
                    len(self.passed),
                )
                earliest = max(earliest, min(middle, next_start))
                begun += node.target in STARTS
            else:
                earliest = len(self.passed)
            places[node] = earliest
        return places

    def _after(self, node: fx.Node) -> int:
        return self.passed.index(node) + 1 if node in self.passed else 0

    def _starts(self, index: int) -> bool:
        return self.passed[index].target in STARTS


def _multiplies(node: fx.Node) -> bool:
    """Whether a node has floating point operations to speak of: products of matrices."""
    gm = node.graph.owning_module
    assert gm is not None
    return counted(gm, node) > 0
