"""The kernels of a forward, and of one decode step.

[prepare]  ->  [spans, spans_matrix]  ->  scan        the state stays in registers, o is written
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lmoe_compiler.codegen.partition import Partition, named, value_axes
from lmoe_compiler.codegen.plan import OUTPUT, Call, Carry, Choice, Plan, Store, Value, kept_states
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.solve_form import solve_form
from lmoe_compiler.codegen.tile import to_tiles
from lmoe_compiler.codegen.token import token_graph
from lmoe_compiler.ir.nodes import ROW, Node, Program
from lmoe_compiler.lower.program import ChunkProgram


def forward_plan(chunk: ChunkProgram, choice: Choice, call: Call) -> Plan:
    """prepare and spans, if chosen, and one scan that writes the output."""
    program, choice = chunk.program, replace(choice, section=0)
    roots = to_tiles(
        [chunk.output, *chunk.next_states], dict(call.sizes), value_axes(program), call.exact
    )
    names = frozenset(v.name for v in program.states)
    output, *following = solve_form(roots, names) if choice.prepare else roots
    nodes = closure([output, *following])
    part = Partition(program, choice, call)
    if choice.prepare:
        part.prepare(nodes, frozenset(v.name for v in program.states))
    carries = part.spans("spans", "forward", _carries(program, nodes, following, call))
    axes = tuple(a for a in chunk.output.axes if a != ROW)
    stores = [Store(output, Value(OUTPUT, axes, "row", "given"))]
    stores += [Store(c.leaf, v) for c, v in zip(carries, kept_states(program), strict=True)]
    part.add("scan", "forward", carries, stores, part.span(carries))
    return part.plan("forward")


def step_plan(program: Program, choice: Choice, call: Call) -> Plan:
    """One kernel: states in, one token's micro-steps, output and states out."""
    states, output = token_graph(program)
    output, *following = to_tiles(
        [output, *states], dict(call.sizes), value_axes(program), call.exact
    )
    carries = _carries(program, closure([output, *following]), following, call)
    part = Partition(program, choice, call)
    stores = [Store(output, Value(OUTPUT, program.output.axes, "sequence", "given"))]
    part.add("step", "step", carries, stores)
    return part.plan("step")


def _carries(
    program: Program, nodes: Sequence[Node], following: Sequence[Node], call: Call
) -> list[Carry]:
    """The states of a sequence from its start to its end; `nodes` are all that the kernel computes."""
    leaves = named(nodes)
    return [
        Carry(
            leaves.get(var.name, var.node),
            after,
            var.axes,
            Value(f"{var.name}_start", var.axes, "sequence", "fp32") if call.has_initial else None,
            Value(f"{var.name}_end", var.axes, "sequence", "fp32"),
        )
        for var, after in zip(program.states, following, strict=True)
    ]
