"""What every plan of a backward begins with: its tile graph, its scans, its gradients, and what systems solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lmoe_compiler.codegen.partition import Partition, dependences, has_inverse, named, value_axes
from lmoe_compiler.codegen.plan import (
    OUTPUT,
    Call,
    Carry,
    Choice,
    Store,
    Value,
    kept_states,
    state_value,
)
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.solve_form import solve_form
from lmoe_compiler.codegen.tile import Builder, to_tiles
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, Var
from lmoe_compiler.lower.program import ChunkAdjoint, gradient_name


@dataclass
class BackwardGraph:
    """A backward that is yet to be cut into kernels, all but `prepare`.

    build              makes nodes like those of the graph, which then are those
    forward, reverse   carries of the scans of states and of their gradients
    outputs            gradients of the inputs
    states, adjoints   names of what these scans carry
    solved_states      results of triangular systems that depend on states only
    solved_adjoints    the others
    """

    program: Program
    part: Partition
    build: Builder
    nodes: list[Node]
    forward: list[Carry]
    reverse: list[Carry]
    outputs: list[Store]
    states: frozenset[str]
    adjoints: frozenset[str]
    solved_states: list[Store]
    solved_adjoints: list[Store]

    @classmethod
    def of(cls, adjoint: ChunkAdjoint, choice: Choice, call: Call) -> BackwardGraph:
        chunk, program = adjoint.forward, adjoint.forward.program
        build, values = Builder(), value_axes(program)
        roots = to_tiles(
            [*adjoint.input_grads, *adjoint.state_grads, *chunk.next_states],
            dict(call.sizes),
            values,
            call.exact,
        )
        states = frozenset(v.name for v in program.states)
        adjoints = frozenset(gradient_name(v) for v in program.states)
        if choice.prepare:
            roots = solve_form(roots, states | adjoints, build)
        nodes, count = closure(roots), len(program.inputs)
        grads, carried = roots[:count], roots[count:]
        before, after = carried[: len(program.states)], carried[len(program.states) :]
        part = Partition(program, choice, call)
        if choice.prepare:
            later = set() if choice.recompute else {gradient_name(OUTPUT)}
            part.prepare(nodes, states | adjoints | later)
        depends = dependences(nodes, states | adjoints)
        solves = _solves([n for n in closure(grads) if depends[n]])
        leaves = named(nodes)
        forward, reverse = _carries(program, leaves, before, after, call, part)
        return cls(
            program,
            part,
            build,
            nodes,
            forward,
            reverse,
            [_gradient(program, v, grad) for v, grad in zip(program.inputs, grads, strict=True)],
            states,
            adjoints,
            _results([n for n in solves if not depends[n] & adjoints], "y"),
            _results([n for n in solves if depends[n] & adjoints], "dy"),
        )

    @property
    def carried(self) -> frozenset[str]:
        return self.states | self.adjoints

    @property
    def kept(self) -> tuple[Value, ...]:
        """States that the forward left."""
        return kept_states(self.program)

    def of_chunks(self, needed: Sequence[Node]) -> tuple[list[Store], list[Store]]:
        """States at the entry of each chunk, and gradients of states at its exit, of those that are `needed`."""
        entries, exits = (
            [
                Store(c.leaf, state_value(f"{name}{var.name}_{at}", var, "chunk"))
                for var, c in zip(self.program.states, scan, strict=True)
                if c.leaf in needed
            ]
            for scan, name, at in ((self.forward, "", "entry"), (self.reverse, "d", "exit"))
        )
        return entries, exits


def _carries(
    program: Program,
    leaves: dict[str, Node],
    before: Sequence[Node],
    after: Sequence[Node],
    call: Call,
    part: Partition,
) -> tuple[list[Carry], list[Carry]]:
    """The states from those that the forward kept on, and their gradients from those of the final states."""

    def carried(var: Var, name: str, node: Node, start: Value | None, end: Value | None) -> Carry:
        leaf = leaves.get(name) or Var(name, "state", var.axes).node
        return Carry(leaf, node, var.axes, start, end)

    starts = call.has_initial or part.choice.section
    kept = kept_states(program)
    forward = [
        carried(var, var.name, node, start, None)
        for var, node, start in zip(program.states, after, kept, strict=True)
    ]
    reverse = [
        carried(
            var,
            gradient_name(var),
            node,
            _gradient_of_state(var, "end") if given else None,
            _gradient_of_state(var, "start") if starts else None,
        )
        for var, node, given in zip(program.states, before, call.has_final_gradient, strict=True)
    ]
    return forward, part.passing(reverse) if part.choice.section else reverse


def from_spans(carries: Sequence[Carry], starts: Sequence[Value]) -> list[Carry]:
    """The same scans, each of whose spans starts from what lies in memory."""
    return [
        replace(carry, start=start, end=None) for carry, start in zip(carries, starts, strict=True)
    ]


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
