"""From a traced step to a proved Program.

1. Every expression becomes an index polynomial (evaluate.py); states form a graph by who mentions whom.
2. Its strongly connected parts are taken in order. A state alone, linear in itself, is cut into micro-steps at the
   state-shaped values that every path from S to its next value passes (dominators); each jump goes to the farthest
   cut whose polynomial is one step of at most rank one. What has no such form stays as the user wrote it (`Next`).
3. Coefficients and output are emitted from the polynomials (emit.py); values of states become reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

from lmoe_compiler.analysis import algebra
from lmoe_compiler.analysis.algebra import relabel
from lmoe_compiler.analysis.classify import RankOne, Refused, Terms, classify
from lmoe_compiler.analysis.emit import Emitter
from lmoe_compiler.analysis.evaluate import Evaluator
from lmoe_compiler.analysis.intervals import range_of
from lmoe_compiler.analysis.poly import Atom, Poly, atom
from lmoe_compiler.ir.nodes import (
    Bound,
    Decay,
    Feedback,
    Loc,
    Next,
    Node,
    Program,
    Read,
    Step,
    Write,
    const,
    make,
    topological,
)
from lmoe_compiler.ir.spec import base
from lmoe_compiler.operations import another
from lmoe_compiler.trace import Traced

PATIENCE = 2
WORDS = {
    "mul": "a product of two values", "dot": "a product of two values", "div": "a division by a value",
    "where": "a condition on a value",
}  # fmt: skip
LINEAR = {"add", "sub", "mul", "div", "neg", "dot", "sum", "rename", "index", "cast", "where"}


@dataclass
class _Reads:
    """The reads of one program and where they stand: before a micro-step, or where they are first needed."""

    states: Mapping[str, tuple[str, ...]]
    taken: set[str]
    last: dict[str, int] = field(default_factory=dict)
    known: dict[tuple[str, int, str], Read] = field(default_factory=dict)
    early: dict[tuple[str, int], list[Read]] = field(default_factory=dict)
    emitter: Emitter | None = None
    body: list[Step | Next | Read | tuple[str, int]] = field(default_factory=list)

    def __call__(self, state: str, version: int, vector: Poly | None, axis: str) -> str:
        assert self.emitter is not None
        key = (state, version, vector.key if vector is not None else "")
        if key not in self.known:
            node = None if vector is None else self.emitter.node(vector)
            axes = tuple(a for a in self.states[state] if vector is None or a != axis)
            read = Read(self._name(), state, node, axes, self.emitter.loc)
            self.known[key] = read
            self.emitter.inputs[read.name] = read.node
            if self.is_last(state, version):
                self.body.append(read)
            else:
                self.early.setdefault((state, version), []).append(read)
        return self.known[key].name

    def is_last(self, state: str, version: int) -> bool:
        return version == self.last.get(state, -1)

    def _name(self) -> str:
        name, i = "r", 1
        while name in self.taken:
            i += 1
            name = f"r{i}"
        self.taken.add(name)
        return name

    def ordered(self) -> tuple[Step | Next | Read, ...]:
        """The body with early reads put before the micro-step that ends their version."""
        out: list[Step | Next | Read] = []
        for item in self.body:
            if isinstance(item, tuple):
                out.extend(self.early.pop(item, []))
            else:
                out.append(item)
        assert not self.early, self.early
        return tuple(out)


def analyse(traced: Traced, bounds: Sequence[Bound]) -> Program:
    """The program of a traced step."""
    return _Analysis(traced, bounds).program()


class _Analysis:
    def __init__(self, traced: Traced, bounds: Sequence[Bound]) -> None:
        self.traced, self.bounds = traced, tuple(bounds)
        self.vars = {v.name: v for v in traced.states}
        self.next = dict(zip(self.vars, traced.next_states, strict=True))
        self.evaluator = Evaluator(self.vars, dict(traced.static))
        self.values = self.evaluator.evaluate([*traced.next_states, traced.output])
        self.reads = _Reads(
            {v.name: v.axes for v in traced.states},
            {v.name for v in (*traced.states, *traced.inputs)},
        )
        self.emit = Emitter(traced.inputs, traced.states, self.evaluator.opaque_nodes, self.reads)
        self.reads.emitter = self.emit
        self.emit.express = self.express
        self.emit.remember(self.values)
        self.cuts: dict[Node, Poly] = {}

    def program(self) -> Program:
        t = self.traced
        for states in self.parts():
            found = self.linear(states[0]) if len(states) == 1 else None
            if isinstance(found, list):
                self.emit_steps(states[0], found)
            else:
                self.emit_next(states, found)
        output = self.output()
        return Program(
            t.name, t.states, t.inputs, self.reads.ordered(), output, self.bounds, t.static
        )

    def parts(self) -> list[list[str]]:
        """Strongly connected parts of the state graph, in an order in which each uses earlier ones only."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.vars)
        for name, node in self.next.items():
            graph.add_edges_from((other, name) for other in self.values[node].states)
        condensed = nx.condensation(graph)
        order = list(self.vars)
        first = {i: min(map(order.index, condensed.nodes[i]["members"])) for i in condensed}
        parts = nx.lexicographical_topological_sort(condensed, key=lambda i: first[i])
        return [sorted(condensed.nodes[i]["members"], key=order.index) for i in parts]

    def linear(self, state: str) -> list[tuple[Node, Terms]] | Refused:
        """Micro-steps (the value each ends in, its terms), or why there are none."""
        chain = [self.vars[state].node, *self.chain(state)]
        steps: list[tuple[Node, Terms]] = []
        at = 0
        while at < len(chain) - 1:
            jump = self.jump(state, chain, at)
            if isinstance(jump, Refused):
                return jump
            at = jump[0]
            steps.append((chain[at], jump[1]))
        return steps

    def jump(self, state: str, chain: list[Node], start: int) -> tuple[int, Terms] | Refused:
        """The farthest cut from `start` that is one step of rank one at most; failing that, of least rank.

        Looks past at most PATIENCE cuts that are none: their polynomials grow exponentially.
        """
        best: tuple[int, Terms] | None = None
        refusal: Refused | None = None
        misses = 0
        for stop in range(start + 1, len(chain)):
            try:
                terms = self.step_between(state, chain[start], chain[stop])
            except Refused as error:
                refusal, misses = error, misses + 1
            else:
                rank = len(terms.feedbacks)
                if best is None or rank <= max(1, len(best[1].feedbacks)):
                    best = stop, terms
                misses = 0 if rank <= 1 else misses + 1
            if misses > PATIENCE:
                break
        if best is None:
            assert refusal is not None
            return refusal
        return best

    def step_between(self, state: str, start: Node, stop: Node) -> Terms:
        cuts = dict(self.cuts)
        if start is not self.vars[state].node:
            cuts[start] = self.unknown(state, start, 0)
        values = self.evaluator.evaluate([stop], cuts)
        self.emit.remember({n: p for n, p in values.items() if n not in cuts})
        axes = self.vars[state].axes
        p = relabel(values[stop], self.places(state, stop))
        return classify(p, state, axes)

    def places(self, state: str, node: Node) -> dict[str, str]:
        """The state's axis that each axis of a state-shaped value is."""
        axes = self.vars[state].axes
        if set(node.axes) <= set(axes):
            return {}
        return {a: next(x for x in axes if base(x) == base(a)) for a in node.axes}

    def unknown(self, state: str, node: Node, version: int) -> Poly:
        names = self.places(state, node)
        own = {names.get(a, a): a for a in node.axes}
        return atom("state", state, tuple(own[a] for a in self.vars[state].axes), version)

    def chain(self, state: str) -> list[Node]:
        """State-shaped values on every path from the state to its next value, the last of them the next value."""
        start, stop = self.vars[state].node, self.next[state]
        graph = nx.DiGraph(
            (a, n) for n in topological([stop]) if n not in self.cuts for a in n.args
        )
        if start == stop:
            return []
        if start not in graph or not nx.has_path(graph, start, stop):
            return [stop]
        above = nx.immediate_dominators(graph, start)
        found, node = [], stop
        while node != start:
            found.append(node)
            node = above[node]
        dims = sorted(self.vars[state].axes)
        distinct = len({base(a) for a in dims}) == len(dims)
        inner = [
            n for n in reversed(found[1:]) if sorted(map(base, n.axes)) == dims and n.op != "rename"
        ]
        return [*(inner if distinct else []), stop]

    def emit_steps(self, state: str, steps: list[tuple[Node, Terms]]) -> None:
        for version, (node, terms) in enumerate(steps):
            self.emit.loc = node.loc
            step = self.step(state, terms)
            self.reads.body += [(state, version), step]
            if node.op != "input" and set(map(base, node.axes)) == set(
                map(base, self.vars[state].axes)
            ):
                self.cuts[node] = self.unknown(state, node, version + 1)
        self.reads.last[state] = len(steps)

    def step(self, state: str, terms: Terms) -> Step:
        decays = tuple(self.decay(p) for p in terms.decays)
        feedbacks = tuple(self.feedback(f) for f in terms.feedbacks)
        writes = []
        for key, value in terms.writes:
            loc = self.emit.line_of(algebra.mul(key, value))
            left, right = self.emit.node(key), self.emit.node(value)
            missing = [a for a in self.vars[state].axes if a not in (*left.axes, *right.axes)]
            writes.append(Write(_along(missing, left), right, loc))
        return Step(state, decays, feedbacks, tuple(writes))

    def decay(self, p: Poly) -> Decay:
        loc = self.emit.line_of(p)
        if not p:
            return Decay(const(0), const(float("-inf")), loc)
        low, _ = range_of(p, self.bounds)
        log = self.emit.node(algebra.log(p)) if low >= 0 else None
        return Decay(self.emit.node(p), log, loc)

    def feedback(self, f: RankOne) -> Feedback:
        loc = self.emit.loc
        key, scale, read = (self.emit.node(p) for p in (f.key, f.scale, f.read))
        key, read = (_along([f.axis], x) for x in (key, read))
        return Feedback(key, scale, read, f.point, loc)

    def emit_next(self, states: list[str], refusal: Refused | None) -> None:
        coupled = refusal is None and self.is_coupled(states)
        why, loc = self.reason(states, refusal)
        values = tuple(self.next[s] for s in states)
        kind = "coupled" if coupled else "nonlinear"
        self.reads.body += [*((s, 0) for s in states)]
        self.reads.body.append(Next(tuple(states), values, kind, why, loc))  # type: ignore[arg-type]
        for state, node in zip(states, values, strict=True):
            self.reads.last[state] = 1
            shaped = set(map(base, node.axes)) == set(map(base, self.vars[state].axes))
            if node.op != "input" and shaped:
                self.cuts[node] = self.unknown(state, node, 1)

    def is_coupled(self, states: list[str]) -> bool:
        """Linear in all of the states together."""
        for state in states:
            for mono in self.values[self.next[state]]:
                own = [a for a, _ in mono if a.kind == "state" and a.name in states]
                if len(own) > 1 or any(
                    a.states & set(states) for a, _ in mono if a.kind != "state"
                ):
                    return False
        return True

    def reason(self, states: list[str], refusal: Refused | None) -> tuple[str, Loc | None]:
        """Why there is no better form, and the line that prevents it."""
        first = self.first_nonlinear(states)
        if first is not None:
            names = " and ".join(sorted(self.values[first].states & set(states)))
            return f"{WORDS.get(first.op, first.op + ' of a value')} of {names}", first.loc
        if refusal is None:
            return f"{' and '.join(states)} use each other", self.next[states[0]].loc
        return refusal.why, self.line_with(states[0], refusal)

    def first_nonlinear(self, states: list[str]) -> Node | None:
        """The first node that is not linear in the states and reaches one of their next values."""
        mine = set(states)
        for node in topological([self.next[s] for s in states]):
            inside = [a for a in node.args if self.values[a].states & mine]
            if not inside:
                continue
            divides = node.op == "div" and node.args[1] in inside
            condition = node.op == "where" and node.args[0] in inside
            product = node.op in ("mul", "dot") and len(inside) > 1
            if node.op not in LINEAR or divides or condition or product:
                return node
        return None

    def line_with(self, state: str, refusal: Refused) -> Loc | None:
        """The first line at which the refused factor meets the state."""
        stop = self.next[state]
        for node in topological([stop]):
            p = self.values[node]
            if refusal.factor is not None and state in p.states and node.op != "input":
                for mono in p:
                    if any(a.name == state for a, _ in mono) and any(
                        a == refusal.factor[0] for a, _ in mono
                    ):
                        return node.loc
        return stop.loc

    def output(self) -> Node:
        output = self.traced.output
        values = self.evaluator.evaluate([output], self.cuts)
        self.emit.remember({n: p for n, p in values.items() if n not in self.cuts})
        node = self.express(output)
        axes = self.traced.output_axes
        if node.axes != axes and len(axes) > 1:
            node = make("mul", _along(axes[::-1], const(1)), node, loc=output.loc)
        return node

    def express(self, node: Node) -> Node:
        """The user's expression with reads in the place of states.

        Sums of reads are built anew; functions of reads stay as written.
        """
        values = self.evaluator.evaluate([node], self.cuts)

        def expressed(node: Node) -> Node:
            p = values[node]
            if not self.emit.mentions_state(node):
                return node
            self.emit.loc = node.loc
            if node in self.cuts or node.op == "input":
                return self.emit.node(p)
            # An atom that stands for the node would be expressed by the node.
            standing = [self.evaluator.opaque_nodes[a.name] for a in _opaque(p)]
            product = node.op in ("dot", "mul") and len(p) == 1 and not standing
            if product or (_is_sum_of_reads(p) and node not in standing):
                return self.emit.node(p)
            return Node(node.op, tuple(expressed(a) for a in node.args), node.attrs, node.loc)

        return expressed(node)


def _is_sum_of_reads(p: Poly) -> bool:
    """At most one state in each term, and not inside a function."""
    inside = [[a for a, _ in mono if a.states] for mono in p]
    return all(len(atoms) <= 1 and all(a.kind == "state" for a in atoms) for atoms in inside)


def _opaque(p: Poly) -> list[Atom]:
    return [a for mono in p for a, _ in mono if a.kind == "opaque"]


def _along(axes: Sequence[str], node: Node) -> Node:
    """`node` with at least these axes, constant along those that it lacks."""
    for axis in axes:
        if axis not in node.axes:
            twin = another(axis, [*axes, *node.axes])
            ones = make("sum", make("delta", a=axis, b=twin), axis=twin)
            node = ones if node == const(1) else make("mul", ones, node)
    return node
