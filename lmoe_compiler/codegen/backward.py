"""The kernels of a backward.

    [prepare]  ->  states  ->  [adjoint_spans]  ->  adjoint  ->  [products]  ->  gradients

  states     walks forward, carries S; stores S at each chunk's entry and the solves' results that depend on S
  adjoint    walks backward, carries d.S; stores d.S at each chunk's exit and the solves' results that depend on it
  products   if chosen: all contractions over the values' axis, so that the next kernel has keys and pairs only
  gradients  parallel over chunks: both carried values are loads, so nothing is ordered and all axes are whole
With `choice.section` all of it runs section by section, from the last to the first, so that states of one section are
in memory at a time. With `choice.recompute` nothing is stored of chunks: recomputing.py.
"""

from __future__ import annotations

from dataclasses import replace

from lmoe_compiler.codegen.backward_graph import BackwardGraph
from lmoe_compiler.codegen.gradient_scans import Scan, Scans
from lmoe_compiler.codegen.partition import dependences, value_axes
from lmoe_compiler.codegen.plan import Call, Choice, Plan
from lmoe_compiler.codegen.products import contracted_values
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.recomputing import recomputing_plan
from lmoe_compiler.lower.program import ChunkAdjoint


def backward_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan:
    """prepare, states, adjoint, products, gradients as chosen, without `recompute` where a gradient forbids it."""
    choice = replace(choice, section=0) if call.varlen else choice
    plan = recomputing_plan(adjoint, choice, call) if choice.recompute else None
    return plan or _storing_plan(adjoint, replace(choice, recompute=False), call)


def _storing_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan:
    graph = BackwardGraph.of(adjoint, choice, call)
    part, states, adjoints = graph.part, graph.solved_states, graph.solved_adjoints
    depends = dependences(graph.nodes, graph.carried)
    solved = {**part.stored, **{s.node: s.value for s in states}}
    by_values = Scan(graph.reverse, -1, graph.states)
    late = Scans([by_values], solved, depends).share_out(graph.outputs)
    entries, exits = graph.of_chunks(closure([s.node for s in late]))
    if entries or states:
        part.add("states", "forward", graph.forward, [*entries, *states], graph.kept[0].span)
    adjoint_scan = part.spans("adjoint_spans", "reverse", graph.reverse)
    stores = [*exits, *adjoints, *by_values.stores]
    part.add("adjoint", "reverse", adjoint_scan, stores, part.span(adjoint_scan))
    if choice.products and late:
        contracted = contracted_values(
            [s.node for s in late], part.stored, value_axes(graph.program)
        )
        part.add("products", "parallel", (), contracted)
    if late:
        part.add("gradients", "parallel", (), late)
    return part.plan("backward")
