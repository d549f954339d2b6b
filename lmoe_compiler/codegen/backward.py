"""The kernels of a backward.

    [prepare]  ->  states  ->  [adjoint_spans]  ->  adjoint  ->  [products]  ->  gradients

  states     walks forward, carries S; stores S at each chunk's entry and the solves' results that depend on S
  adjoint    walks backward, carries d.S; stores d.S at each chunk's exit and the solves' results that depend on it
  products   if chosen: all contractions over the values' axis, so that the next kernel has keys and pairs only
  gradients  parallel over chunks: both carried values are loads, so nothing is ordered and all axes are whole
With `choice.section` all of it runs section by section, from the last to the first, so that states of one section are
in memory at a time. With `choice.recompute` gradients are written by scans of their own, in tiles of keys, and
nothing is stored of chunks (gradient_scans.py). Without solves, and with them:

    [prepare]  ->  states_keys         [adjoint_spans]  ->  adjoint, adjoint_keys
    prepare    ->  states, [adjoint_spans, adjoint_spans_matrix]  ->  adjoint  ->  states_keys  ->  adjoint_keys
               ->  gradients (sums of what is left in parts)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmoe_compiler.codegen.gradient_scans import Scan, shared_out
from lmoe_compiler.codegen.partition import (
    Partition,
    dependences,
    has_inverse,
    named,
    value_axes,
)
from lmoe_compiler.codegen.plan import (
    OUTPUT,
    Call,
    Carry,
    Choice,
    Plan,
    Store,
    Value,
    kept_states,
    state_value,
)
from lmoe_compiler.codegen.products import contracted_values
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.solve_form import solve_form
from lmoe_compiler.codegen.tile import to_tiles
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, Var
from lmoe_compiler.lower.program import ChunkAdjoint, gradient_name


def backward_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan:
    """prepare, states, adjoint, products, gradients as chosen, without `recompute` where a gradient forbids it."""
    choice = replace(choice, section=0) if call.varlen else choice
    plan = recomputing_plan(adjoint, choice, call) if choice.recompute else None
    plan = plan or _plan(adjoint, replace(choice, recompute=False), call)
    assert plan is not None
    return plan


def recomputing_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan | None:
    """The plan that stores no states of chunks, or None where a gradient needs one."""
    return _plan(adjoint, replace(choice, products=False, recompute=True), call)


def _plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan | None:
    forward, program = adjoint.forward, adjoint.forward.program
    count = len(program.inputs)
    roots = to_tiles(
        [*adjoint.input_grads, *adjoint.state_grads, *forward.next_states],
        dict(call.sizes),
        value_axes(program),
        call.exact,
    )
    states = frozenset(v.name for v in program.states)
    adjoints = frozenset(gradient_name(v) for v in program.states)
    if choice.prepare:
        roots = solve_form(roots, states | adjoints)
    grads, before, after = (
        roots[:count],
        roots[count : count + len(program.states)],
        roots[-len(program.states) :],
    )
    nodes = closure(roots)
    leaves = named(nodes)
    part = Partition(program, choice, call)
    if choice.prepare:
        later = set() if choice.recompute else {gradient_name(OUTPUT)}
        part.prepare(nodes, states | adjoints | later)

    depends = dependences(nodes, states | adjoints)
    solves = _solves([n for n in closure(grads) if depends[n]])
    solved_states = _results([n for n in solves if not depends[n] & adjoints], "y")
    solved_adjoints = _results([n for n in solves if depends[n] & adjoints], "dy")
    outputs = [
        _gradient(program, var, grad) for var, grad in zip(program.inputs, grads, strict=True)
    ]

    def carried(
        var: Var, leaf: str, following: Node, start: Value | None, end: Value | None
    ) -> Carry:
        node = leaves.get(leaf) or Var(leaf, "state", var.axes).node
        return Carry(node, following, var.axes, start, end)

    kept = kept_states(program)
    forward_scan = [
        carried(var, var.name, node, start, None)
        for var, node, start in zip(program.states, after, kept, strict=True)
    ]
    reverse_scan = [
        carried(
            var,
            gradient_name(var),
            node,
            _gradient_of_state(var, "end") if given else None,
            _gradient_of_state(var, "start") if call.has_initial or choice.section else None,
        )
        for var, node, given in zip(program.states, before, call.has_final_gradient, strict=True)
    ]
    if choice.section:
        reverse_scan = part.passing(reverse_scan)

    by_values = Scan(reverse_scan, -1, states)
    by_keys = [Scan(forward_scan, 0, adjoints), Scan(reverse_scan, 0, states)]
    solved = {**part.stored, **{s.node: s.value for s in solved_states}}
    if choice.recompute:
        solved |= {s.node: s.value for s in solved_adjoints}
        depends = dependences(nodes, states | adjoints, solved)
    scans = [by_values, *by_keys] if choice.recompute else [by_values]
    late = shared_out(outputs, scans, solved, depends, in_terms=choice.recompute)
    left = {s.node for scan in scans for s in scan.stores} if choice.recompute else set()
    needed = closure([s.node for s in late], left | {*solved} if left else ())
    entries, exits = (
        [
            Store(c.leaf, state_value(f"{name}{var.name}_{at}", var, "chunk"))
            for var, c in zip(program.states, scan, strict=True)
            if c.leaf in needed
        ]
        for scan, name, at in ((forward_scan, "", "entry"), (reverse_scan, "d", "exit"))
    )
    if choice.recompute and (entries or exits):
        return None
    if entries or solved_states:
        part.add("states", "forward", forward_scan, [*entries, *solved_states], kept[0].span)
    of_states, of_adjoints = (scan.stores for scan in by_keys)
    if of_states and not solves:
        part.add("states_keys", "forward", forward_scan, of_states, kept[0].span)
    # With solves the adjoint comes first, and leaves what the scan by keys starts from: its spans run side by side.
    starts = tuple(replace(v, name=f"d{v.name}") for v in kept) if solves and of_adjoints else ()
    if starts:
        exits += [Store(c.leaf, v) for c, v in zip(reverse_scan, starts, strict=True)]
    adjoint_scan = part.spans("adjoint_spans", "reverse", reverse_scan)
    span = part.span(adjoint_scan)
    stores = [*exits, *solved_adjoints, *by_values.stores]
    if stores or not of_adjoints:
        part.add("adjoint", "reverse", adjoint_scan, stores, span)
        adjoint_scan = [replace(carry, end=None) for carry in adjoint_scan]
    if of_states and solves:
        part.add("states_keys", "forward", forward_scan, of_states, kept[0].span)
    if starts:
        span = starts[0].span
        pairs = zip(reverse_scan, starts, strict=True)
        adjoint_scan = [replace(carry, start=start, end=None) for carry, start in pairs]
    if of_adjoints:
        part.add("adjoint_keys", "reverse", adjoint_scan, of_adjoints, span)
    if choice.products and late:
        contracted = contracted_values([s.node for s in late], part.stored, value_axes(program))
        part.add("products", "parallel", (), contracted)
    if late:
        part.add("gradients", "parallel", (), late)
    return part.plan("backward")


def _gradient_of_state(var: Var, at: str) -> Value:
    return Value(f"d{var.name}_{at}", var.axes, "sequence", "fp32")


def _solves(nodes: Sequence[Node]) -> list[Node]:
    """Results of triangular systems: products with an inverse, and sums of such products (solve_form.py)."""
    found = [n for n in nodes if _is_solve(n)]
    terms = {a for n in found if n.op in ("add", "sub", "neg") for a in n.args}
    return [n for n in found if n not in terms]


def _is_solve(node: Node) -> bool:
    if node.op in ("rename", "add", "sub", "neg"):
        return all(_is_solve(a) for a in node.args)
    return node.op == "dot" and any(has_inverse(a) for a in node.args)


def _results(nodes: Sequence[Node], name: str) -> list[Store]:
    return [
        Store(n, Value(f"{name}_{i}", tuple(a for a in n.axes if a != ROW), "row"))
        for i, n in enumerate(nodes)
        if SOURCE not in n.axes
    ]


def _gradient(program: Program, var: Var, node: Node) -> Store:
    """Token gradients have a row per token; those of head parameters are one partial sum per chunk."""
    if var.kind == "token":
        return Store(node, Value(f"d{var.name}", var.axes, "row", "given", whole=True))
    return Store(node, Value(f"d{var.name}", var.axes, "chunk", "fp32", whole=True))
