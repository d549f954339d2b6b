"""The kernels of a backward that stores nothing of chunks: scans of their own write the gradients, in tiles of keys.

Where nothing is solved and no gradient needs <S, d.S>, and else:

    [prepare]  ->  states_keys  ||  [adjoint_spans]  ->  adjoint, adjoint_keys
    prepare    ->  states  ||  [adjoint_spans, adjoint_spans_matrix]  ->  adjoint
               ->  [products]  ->  states_keys  ->  adjoint_keys  ->  [inner_products]  ->  gradients

  states, adjoint            write what the systems solve, row for row; the adjoint leaves d.S where spans start
  products                   if chosen: the factors [t, s] that are known then, and of numbers what needs no state
  states_keys, adjoint_keys  carry S and d.S once more, all spans of a sequence side by side
  inner_products             if gradients of numbers need <S, d.S>: carries that back through each span, from its end
  gradients                  adds up gradients of numbers, and carries <S, d.S> through each span from its start

None where a gradient needs more than that of both carried values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lmoe_compiler.codegen.backward_graph import BackwardGraph, from_spans
from lmoe_compiler.codegen.gradient_scans import Scan, Scans
from lmoe_compiler.codegen.inner_products import Followed, followed, inner_product, mean
from lmoe_compiler.codegen.partition import dependences
from lmoe_compiler.codegen.plan import Call, Carry, Choice, Plan, Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.row_sums import RowSums
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import Node
from lmoe_compiler.lower.program import ChunkAdjoint


def recomputing_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan | None:
    """The plan that stores no states of chunks, or None where a gradient needs one."""
    graph = BackwardGraph.of(adjoint, replace(choice, recompute=True), call)
    shares = _Shares.of(graph)
    if shares is None:
        return None
    part, span = graph.part, graph.kept[0].span
    exits = shares.exit_states(graph)
    if graph.solved_states:
        # It has more registers to spare than states_keys.
        part.add("states", "forward", graph.forward, graph.solved_states, span, ends=exits)
    if shares.starts:
        carries = _after_the_adjoint(graph, shares)
    else:
        carries = []
        _beside_the_adjoint(graph, shares)
    if shares.late:
        part.add("gradients", "forward" if carries else "parallel", carries, shares.late, span)
    return part.plan("backward")


def _beside_the_adjoint(graph: BackwardGraph, shares: _Shares) -> None:
    """Scans by keys that wait for nothing."""
    part, (states_keys, adjoint_keys) = graph.part, shares.by_keys
    if states_keys.stores:
        part.add("states_keys", "forward", graph.forward, states_keys.stores, graph.kept[0].span)
    scan = part.spans("adjoint_spans", "reverse", graph.reverse)
    if shares.by_values.stores:
        part.add("adjoint", "reverse", scan, shares.by_values.stores, part.span(scan))
        scan = [replace(carry, end=None) for carry in scan]
    part.add("adjoint_keys", "reverse", scan, adjoint_keys.stores, part.span(scan))


def _after_the_adjoint(graph: BackwardGraph, shares: _Shares) -> list[Carry]:
    """Scans by keys that read what systems solve; their spans start from what the adjoint leaves. Returns what
    `gradients` carries.
    """
    part, kept, (states_keys, adjoint_keys) = graph.part, graph.kept, shares.by_keys
    kept_too = [Store(c.leaf, v) for c, v in zip(graph.reverse, shares.starts, strict=True)]
    scan = part.spans("adjoint_spans", "reverse", graph.reverse)
    stores = [*kept_too, *graph.solved_adjoints, *shares.by_values.stores]
    part.add("adjoint", "reverse", scan, stores, part.span(scan))
    if part.choice.products:
        nodes = closure([s.node for scan in shares.by_keys for s in scan.stores])
        stores = [*part.factors(nodes, graph.carried, only_pairs=True), *shares.known.stores]
        if stores:
            part.add("products", "parallel", (), stores)
    span = kept[0].span
    exits = [] if graph.solved_states else shares.exit_states(graph)
    if states_keys.stores or exits:
        forward = states_keys.tiled_rows_scaled(part.stored)
        part.add("states_keys", "forward", forward, states_keys.stores, span, ends=exits)
    reverse = from_spans(adjoint_keys.tiled_rows_scaled(part.stored), shares.starts)
    ends, known = _of_spans(graph, shares)
    kernel = part.add(
        "adjoint_keys", "reverse", reverse, adjoint_keys.stores, span, ends=ends, known=known
    )
    left = {s.value.name: s.value for s in kernel.ends}
    for f in shares.followed:
        # Where a span ends, the next one starts.
        entry, exit_ = f.from_entry.start.value.name, f.from_exit.start.value.name
        left.setdefault(exit_, replace(left[entry], of_next=True))
    if shares.followed:
        back = _started([c for f in shares.followed for c in f.from_exit.carries], left)
        stores = [s for f in shares.followed for s in f.late]
        part.add("inner_products", "reverse", back, stores, span)
    return _started([c for f in shares.followed for c in f.from_entry.carries], left)


def _of_spans(graph: BackwardGraph, shares: _Shares) -> tuple[list[Store], dict[Node, Value]]:
    """Inner products that the scan of gradients of states leaves of each span, and states that it knows for that.

    Where the span starts; and where it ends, if that is not where the next one starts: that may be of another section,
    whose values lie elsewhere, and behind a sequence's last there is none.
    """
    states = {c.leaf: v for c, v in zip(graph.forward, graph.kept, strict=True)}
    gradients = {c.leaf: v for c, v in zip(graph.reverse, shares.starts, strict=True)}
    last = {s.node: s.value for s in shares.exit_states(graph)}
    ends, known = [f.from_entry.start for f in shares.followed], dict(states)
    for f in shares.followed:
        state, gradient = f.product.state, f.product.gradient
        value = last.get(state) or replace(states[state], of_next=True)
        known |= dict(zip(f.at_exit, (value, gradients[gradient]), strict=True))
        if state in last or graph.part.choice.section:
            ends.append(f.from_exit.start)
    return ends, known


def _started(carries: Sequence[Carry], left: Mapping[str, Value]) -> list[Carry]:
    """Carries that start from what a kernel left where spans start or end, in as many parts as it has."""
    return [replace(c, start=left[c.start.name]) if c.start else c for c in carries]


@dataclass
class _Shares:
    """Which kernel writes what.

    late      gradients of numbers, added up last from what the scans leave
    starts    gradients of states that the adjoint leaves, if scans by keys have to come after it
    followed  inner products of states and their gradients that gradients of numbers need
    """

    by_values: Scan
    by_keys: tuple[Scan, Scan]
    known: Scan
    late: list[Store]
    starts: tuple[Value, ...]
    followed: list[Followed]

    def exit_states(self, graph: BackwardGraph) -> list[Store]:
        """States where spans end that have to be left for `followed`: the last one's is kept nowhere, and matters where
        a gradient of the final state is given. Others are those that the spans after them start from.
        """
        pairs = zip(graph.forward, graph.part.call.has_final_gradient, strict=True)
        given = {carry.leaf for carry, there in pairs if there}
        return [f.state for f in self.followed if f.product.state in given]

    @classmethod
    def of(cls, graph: BackwardGraph) -> _Shares | None:
        """None where a gradient needs both carried values."""
        solved = {s.node: s.value for s in (*graph.solved_states, *graph.solved_adjoints)}
        stored = {**graph.part.stored, **solved}
        depends = dependences(graph.nodes, graph.carried, stored)
        pairs, used = zip(graph.forward, graph.reverse, strict=True), set(graph.nodes)
        found = [inner_product(graph.build, s, d) for s, d in pairs]
        products = [p for p in found if p is not None and p.node in used]
        names = frozenset(p.past.name for p in products)
        depends |= {p.past: frozenset({p.past.name}) for p in products}
        by_values = Scan(graph.reverse, -1, graph.states | names)
        by_keys = (
            Scan(graph.forward, 0, graph.adjoints | names),
            Scan(graph.reverse, 0, graph.states | names),
        )
        known = Scan((), 0, graph.carried | names)
        after = bool(solved or products)
        left = [replace(v, name=f"d{v.name}", whole=False) for v in graph.kept]
        last = [known] if after and graph.part.choice.products else []
        scans = Scans([by_values, *by_keys, *last], stored, depends)
        rest = scans.share_out(graph.outputs)
        if not all(scans.share_terms(s) for s in rest if s.value.axes):
            return None
        sums = RowSums(graph.build, scans, products)
        late, through = _added_up(graph, sums, [s for s in rest if not s.value.axes])
        carries = [c for f in through for way in (f.from_entry, f.from_exit) for c in way.carries]
        there = {*stored, *(s.node for scan in scans.scans for s in scan.stores)}
        needed = closure([*(s.node for s in late), *(c.following for c in carries)], there)
        if any(c.leaf in needed for c in (*graph.forward, *graph.reverse)):
            return None
        starts = tuple(left) if after else ()
        return cls(by_values, by_keys, known, late, starts, through)


def _added_up(
    graph: BackwardGraph, sums: RowSums, late: Sequence[Store]
) -> tuple[list[Store], list[Followed]]:
    """Gradients of numbers by what scans leave, and the inner products that they need."""
    build, dtype, span = graph.build, graph.part.call.dtype, graph.kept[0].span
    roots = sums.of([*(s.node for s in late), *(x for p in sums.products for x in p.of_rows)])
    rows = iter(roots[len(late) :])
    found = [followed(build, p, next(rows), next(rows), dtype, span) for p in sums.products]
    known = {f.product.past: mean(build, f.from_entry.past, f.from_exit.past) for f in found}
    nodes = _replaced(build, roots[: len(late)], known)
    return [replace(s, node=n) for s, n in zip(late, nodes, strict=True)], found


def _replaced(build: Builder, roots: Sequence[Node], known: Mapping[Node, Node]) -> list[Node]:
    """The roots with other nodes in the place of leaves."""
    done: dict[Node, Node] = {}
    for node in closure(roots):
        args = [done[a] for a in node.args]
        same = all(x is y for x, y in zip(args, node.args, strict=True))
        new = node if same else build.make(node.op, *args, like=node, **dict(node.attrs))
        done[node] = known.get(node, new)
    return [done[root] for root in roots]
