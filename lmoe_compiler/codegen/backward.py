"""The kernels of a backward.

    [prepare]  ->  states  ->  [adjoint_spans]  ->  adjoint  ->  [products]  ->  gradients

  states     walks forward, carries S; stores S at each chunk's entry and the solves' results that depend on S
  adjoint    walks backward, carries d.S; stores d.S at each chunk's exit and the solves' results that depend on it
  products   if chosen: all contractions over the values' axis, so that the next kernel has keys and pairs only
  gradients  parallel over chunks: both carried values are loads, so nothing is ordered and all axes are whole
With `choice.fused` the last two are one reverse scan. With `choice.section` all of it runs section by section, from the
last to the first, so that states of one section are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, Var
from lmoe_compiler.lower.program import ChunkAdjoint, gradient_name


def backward_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan:
    """prepare, states, adjoint, gradients (the last two fused if chosen)."""
    choice = replace(choice, section=0) if call.varlen else choice
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
        part.prepare(nodes, states | adjoints | {gradient_name(OUTPUT)})

    needed = closure([*grads, *(before if choice.fused else [])])
    depends = dependences(nodes, states | adjoints)
    solves = _solves([n for n in needed if depends[n]])

    def carried(
        var: Var, leaf: str, following: Node, start: Value | None, end: Value | None
    ) -> Carry:
        node = leaves.get(leaf) or Var(leaf, "state", var.axes).node
        return Carry(node, following, var.axes, start, end)

    kept = kept_states(program)
    carries = [
        carried(var, var.name, node, start, None)
        for var, node, start in zip(program.states, after, kept, strict=True)
    ]
    entries = [
        Store(c.leaf, state_value(f"{var.name}_entry", var, "chunk"))
        for var, c in zip(program.states, carries, strict=True)
        if c.leaf in needed
    ]
    results = [n for n in solves if not depends[n] & adjoints]
    if entries or results:
        part.add("states", "forward", carries, [*entries, *_results(results, "y")], kept[0].span)

    backward = [
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
        backward = part.passing(backward)
    outputs = [
        _gradient(program, var, grad) for var, grad in zip(program.inputs, grads, strict=True)
    ]
    if choice.fused:
        part.add("gradients", "reverse", backward, outputs)
        return part.plan("backward")
    early = [s for s in outputs if _fits_scan(s, backward, {**part.stored}, depends, states)]
    exits = [
        Store(c.leaf, state_value(f"d{var.name}_exit", var, "chunk"))
        for var, c in zip(program.states, backward, strict=True)
        if c.leaf in needed
    ]
    results = [n for n in solves if depends[n] & adjoints]
    backward = part.spans("adjoint_spans", "reverse", backward)
    part.add(
        "adjoint",
        "reverse",
        backward,
        [*exits, *_results(results, "dy"), *early],
        part.span(backward),
    )
    late = [s for s in outputs if s not in early]
    if choice.products:
        stores = contracted_values([s.node for s in late], part.stored, value_axes(program))
        part.add("products", "parallel", (), stores)
    part.add("gradients", "parallel", (), late)
    return part.plan("backward")


def _gradient_of_state(var: Var, at: str) -> Value:
    return Value(f"d{var.name}_{at}", var.axes, "sequence", "fp32")


def _fits_scan(
    store: Store,
    carries: Sequence[Carry],
    stored: Mapping[Node, Value],
    depends: Mapping[Node, frozenset[str]],
    states: frozenset[str],
) -> bool:
    """Whether the adjoint scan can write this gradient: no forward state, and tiled as the carried values are."""
    if depends[store.node] & states:
        return False
    axes = [carry.axes[-1] for carry in carries if carry.axes]
    scan = closure([carry.following for carry in carries], stored)
    axes = [a for a in axes if (found := split(scan, a, stored)) and "part" not in found.values()]
    own = closure([store.node], stored)
    return bool(axes) and all(
        axis in store.value.axes
        and (found := split(own, axis, stored))
        and "part" not in found.values()
        for axis in axes
    )


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
