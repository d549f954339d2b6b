"""Cuts a tile graph into kernels by what each node depends on: the carried state, the carried adjoint, both or neither.

Forward:   [prepare]  ->  scan                       the state stays in registers, o is written
Backward:  [prepare]  ->  states  ->  adjoint  ->  [products]  ->  gradients
  states     walks forward, carries S; stores S at each chunk's entry and the solves' results that depend on S
  adjoint    walks backward, carries d.S; stores d.S at each chunk's exit and the solves' results that depend on it
  products   if chosen: all contractions over the values' axis, so that the next kernel has keys and pairs only
  gradients  parallel over chunks: both carried values are loads, so nothing is ordered and all axes are whole
With `choice.fused` the last two are one reverse scan. `prepare` (parallel over chunks) stores the [C, C] factors
that depend on no state: inverses of triangular systems and decayed products.

A kernel is then the closure of what it stores and carries, cut at what an earlier kernel stored. An axis that no
node of the kernel contracts may be tiled over programs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lmoe_compiler.codegen.plan import (
    Carry,
    Choice,
    Kernel,
    Load,
    Order,
    Passed,
    Plan,
    Store,
    Value,
    kept_states,
    padded,
)
from lmoe_compiler.codegen.products import contracted_values
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.solve_form import solve_form
from lmoe_compiler.codegen.spans import span_carries
from lmoe_compiler.codegen.tile import inside_levels, to_tiles
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.codegen.token import token_graph
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, Var
from lmoe_compiler.lower.program import ChunkAdjoint, ChunkProgram, gradient_name

OUTPUT = "o"


@dataclass(frozen=True)
class Call:
    """What a plan is made for: everything of a call that changes the kernels' text."""

    sizes: tuple[tuple[str, int], ...]
    heads: int
    input_heads: tuple[tuple[str, int], ...]
    dtype: str
    varlen: bool = False
    has_initial: bool = False
    has_final_gradient: tuple[bool, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether sums over rows must keep every digit of fp32."""
        return self.dtype == "fp32"


def near_and_far(kernel: Kernel) -> list[Kernel]:
    """A kernel for chunks whose decays are all near, and one that redoes the others.

    In one kernel the registers of the loop over levels would be taken from every chunk.
    """
    reach = Value(f"{kernel.name}_reach", (), "program", "fp32")
    return [
        replace(kernel, levels="near", reach=reach),
        replace(kernel, name=f"{kernel.name}_far", levels="far", reach=reach),
    ]


def dependences(nodes: Sequence[Node], names: frozenset[str]) -> dict[Node, frozenset[str]]:
    """Which of the leaves `names` each node depends on."""
    found: dict[Node, frozenset[str]] = {}
    for node in nodes:
        if node.op == "input":
            found[node] = names & {node.name}
        else:
            found[node] = frozenset().union(*(found[a] for a in node.args))
    return found


@dataclass
class Partition:
    """Kernels made so far, and what they left in memory."""

    program: Program
    choice: Choice
    call: Call
    kernels: list[Kernel] = field(default_factory=list)
    stored: dict[Node, Value] = field(default_factory=dict)
    passed: tuple[Passed, ...] = ()

    def add(
        self,
        name: str,
        order: Order,
        carries: Sequence[Carry],
        stores: Sequence[Store],
        span: int = 0,
        skip_last: bool = False,
    ) -> None:
        """A kernel that computes `stores` and the carries' next values; its loads follow from what is stored."""
        leaves = {c.leaf for c in carries}
        cut = {n: v for n, v in self.stored.items() if n not in leaves}
        roots = [*(s.node for s in stores), *(c.following for c in carries)]
        nodes = closure(roots, cut)
        loads = tuple(Load(n, cut[n]) for n in nodes if n in cut)
        tuning = self.choice.tuning(name)
        tiles, parts = self.tiles(order, nodes, cut, stores, (tuning.block, tuning.block_second))
        stores = [
            replace(s, value=replace(s.value, parts=parts[s.node], dtype="fp32"))
            if s.node in parts
            else s
            for s in stores
        ]
        inner = (
            self.inner(nodes, cut, [axis for axis, _ in tiles], tuning.inner)
            if order == "parallel"
            else ()
        )
        kernel = Kernel(
            name,
            order,
            tuple(carries),
            loads,
            tuple(stores),
            tiles,
            tuning,
            span,
            inner,
            skip_last,
        )
        sums = [n for n in nodes if n.op == "level_sum" and n not in cut]
        self.kernels += near_and_far(kernel) if order == "parallel" and sums else [kernel]
        # Parts are added up before the next kernel runs.
        kept = [s for s in stores if s.node.op != "const"]
        self.stored.update({s.node: replace(s.value, parts=0) for s in kept})

    def tiles(
        self,
        order: Order,
        nodes: Sequence[Node],
        cut: Mapping[Node, Value],
        stores: Sequence[Store],
        blocks: tuple[int, int],
    ) -> tuple[tuple[tuple[str, int], ...], dict[Node, int]]:
        """Tiled axes with their tiles, and the stores that are sums of parts with their number of parts.

        Values come first. A scan cannot wait for a sum, so its axes are free of contractions; elsewhere row sums
        (one number per token) may be left in parts.
        """
        sizes = dict(self.call.sizes)
        axes = dict.fromkeys(a for var in self.program.states for a in reversed(var.axes))
        tiles: list[tuple[str, int]] = []
        parts: dict[Node, int] = {}
        for axis in axes:
            block = blocks[len(tiles)] if len(tiles) < len(blocks) else 0
            found = split(nodes, axis, cut)
            if not block or padded(sizes[axis]) <= block or found is None or parts:
                continue
            sums = [s for s in stores if found[s.node] == "part"]
            if any(s.value.axes for s in sums) or (
                order != "parallel" and "part" in found.values()
            ):
                continue
            if "tile" in (found[s.node] for s in stores) or order != "parallel":
                tiles.append((axis, block))
                parts |= {s.node: -(-sizes[axis] // block) for s in sums}
        return tuple(tiles), parts

    def inner(
        self, nodes: Sequence[Node], cut: Mapping[Node, Value], tiled: Sequence[str], block: int
    ) -> tuple[tuple[str, int], ...]:
        """The axis that programs walk in tiles: keys first, for products over them are what fills registers."""
        sizes = dict(self.call.sizes)
        axes = dict.fromkeys(a for var in self.program.states for a in var.axes)
        for axis in (a for a in axes if a not in tiled):
            found = split(nodes, axis, cut, looped=True)
            if block and padded(sizes[axis]) > block and found and "part" in found.values():
                return ((axis, block),)
        return ()

    def spans(self, name: str, order: Order, carries: list[Carry]) -> list[Carry]:
        """Carries of a scan whose spans run side by side, after a kernel for their maps; as given where not cut."""
        span = self.choice.span
        parts = span_carries(carries, span) if span else None
        if parts is None:
            return carries
        first, second = parts
        self.add(name, order, first, (), span, skip_last=True)
        return second

    def span(self, carries: Sequence[Carry]) -> int:
        """The span of a scan with these carries."""
        return self.choice.span if any(c.through for c in carries) else 0

    def prepare(self, nodes: Sequence[Node], carried: frozenset[str]) -> None:
        """Stores factors of products that depend on nothing carried: [C, C] blocks and, if chosen, scaled rows.

        An inverse times computed values stays fp32, and multiplies in tf32: where keys repeat those sums cancel.
        """
        depends = dependences(nodes, carried)
        levels, values = inside_levels(nodes), set(_values(self.program))
        factors: dict[Node, Value] = {}
        direct = _meets_loads(nodes)
        for node in nodes:
            if not (depends[node] or values & set(node.axes)) or node in levels:
                continue
            for operand in node.args:
                factor = operand.args[0] if operand.op == "rename" else operand
                if factor in factors or depends[factor]:
                    continue
                value = self.factor(node, factor, f"{len(factors)}")
                if value is not None:
                    solves = factor.op == "inverse" and factor not in direct
                    factors[factor] = replace(value, dtype="fp32") if solves else value
        if factors:
            self.add("prepare", "parallel", (), [Store(f, v) for f, v in factors.items()])

    def factor(self, user: Node, factor: Node, number: str) -> Value | None:
        """The value that keeps `factor`, an operand of `user`, or None where scans compute it themselves."""
        axes = tuple(a for a in factor.axes if a != ROW)
        if user.op == "dot" and user["axis"] in (ROW, SOURCE) and set(factor.axes) == {ROW, SOURCE}:
            return Value(f"{_label(factor)}_{number}", (SOURCE,), "row")
        if factor.op == "input" or not _has_token(factor):
            return None
        if factor.axes in ((ROW,), ()) and user.op != "dot":
            per: Literal["vector", "chunk"] = "vector" if factor.axes else "chunk"
            return Value(f"{per}_{number}", (), per, "fp32")
        if not self.choice.prepare_rows:
            return None
        if user.op == "dot" and ROW in factor.axes and len(axes) == 1 and axes[0] != SOURCE:
            return Value(f"rows_{number}", axes, "row")
        if len(axes) == 1 and ROW not in factor.axes and SOURCE not in factor.axes:
            return Value(f"chunk_{number}", axes, "chunk", "fp32")
        return None

    def plan(self, direction: str) -> Plan:
        return Plan(
            self.program,
            direction,  # type: ignore[arg-type]
            tuple(self.kernels),
            self.choice,
            self.call.sizes,
            self.call.heads,
            self.call.input_heads,
            self.call.dtype,
            self.call.varlen,
            self.passed,
        )


def _meets_loads(nodes: Iterable[Node]) -> set[Node]:
    """The operands of products with a block that is an input of the recurrence."""
    bare = lambda n: n.args[0] if n.op == "rename" else n  # noqa: E731
    pairs = [[bare(a) for a in n.args] for n in nodes if n.op == "dot"]
    return {x for a, b in pairs for x, y in ((a, b), (b, a)) if y.op == "input"}


def _has_token(node: Node) -> bool:
    return any(n.op == "input" and ROW in n.axes for n in closure([node]))


def _label(node: Node) -> str:
    return "inverse" if _has_inverse(node) else "pairs"


def _initial(var: Var, present: bool) -> Value | None:
    return Value(f"{var.name}_start", var.axes, "sequence", "fp32") if present else None


def forward_plan(chunk: ChunkProgram, choice: Choice, call: Call) -> Plan:
    """prepare (if chosen, or if there is a solve) and one fused scan."""
    program, choice = chunk.program, replace(choice, section=0)
    roots = to_tiles(
        [chunk.output, *chunk.next_states], dict(call.sizes), _values(program), call.exact
    )
    names = frozenset(v.name for v in program.states)
    output, *following = solve_form(roots, names) if choice.prepare else roots
    nodes = closure([output, *following])
    part = Partition(program, choice, call)
    if choice.prepare:
        part.prepare(nodes, frozenset(v.name for v in program.states))
    leaves = _leaves(nodes)
    carries = [
        Carry(
            leaves.get(var.name, var.node),
            after,
            var.axes,
            _initial(var, call.has_initial),
            Value(f"{var.name}_end", var.axes, "sequence", "fp32"),
        )
        for var, after in zip(program.states, following, strict=True)
    ]
    carries = part.spans("spans", "forward", carries)
    axes = tuple(a for a in chunk.output.axes if a != ROW)
    stores = [Store(output, Value(OUTPUT, axes, "row", "given"))]
    stores += [Store(c.leaf, v) for c, v in zip(carries, kept_states(program), strict=True)]
    part.add("scan", "forward", carries, stores, part.span(carries))
    return part.plan("forward")


def step_plan(program: Program, choice: Choice, call: Call) -> Plan:
    """One kernel: states in, one token's micro-steps, output and states out."""
    states, output = token_graph(program)
    output, *following = to_tiles([output, *states], dict(call.sizes), _values(program), call.exact)
    leaves = _leaves(closure([output, *following]))
    carries = [
        Carry(
            leaves.get(var.name, var.node),
            after,
            var.axes,
            _initial(var, call.has_initial),
            Value(f"{var.name}_end", var.axes, "sequence", "fp32"),
        )
        for var, after in zip(program.states, following, strict=True)
    ]
    part = Partition(program, choice, call)
    stores = [Store(output, Value(OUTPUT, program.output.axes, "sequence", "given"))]
    part.add("step", "step", carries, stores)
    return part.plan("step")


def _values(program: Program) -> list[str]:
    return [var.axes[-1] for var in program.states if len(var.axes) > 1]


def _leaves(nodes: Iterable[Node]) -> dict[str, Node]:
    return {n.name: n for n in nodes if n.op == "input"}


def backward_plan(adjoint: ChunkAdjoint, choice: Choice, call: Call) -> Plan:
    """prepare, states, adjoint, gradients (the last two fused if chosen)."""
    choice = replace(choice, section=0) if call.varlen else choice
    forward, program = adjoint.forward, adjoint.forward.program
    count = len(program.inputs)
    roots = to_tiles(
        [*adjoint.input_grads, *adjoint.state_grads, *forward.next_states],
        dict(call.sizes),
        _values(program),
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
    leaves = _leaves(nodes)
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
        Store(c.leaf, _per_chunk(f"{var.name}_entry", var))
        for var, c in zip(program.states, carries, strict=True)
        if c.leaf in needed
    ]
    results = [n for n in solves if not depends[n] & adjoints]
    if entries or results:
        part.add("states", "forward", carries, [*entries, *_results(results, "y")], kept[0].span)

    passed = [_passed(var) for var in program.states]
    if choice.section:
        part.passed = tuple(passed)
    backward = [
        carried(
            var,
            gradient_name(var),
            node,
            through.into if choice.section else through.given if given else None,
            through.out if choice.section else through.result if call.has_initial else None,
        )
        for var, node, through, given in zip(
            program.states, before, passed, call.has_final_gradient, strict=True
        )
    ]
    outputs = [
        _gradient(program, var, grad) for var, grad in zip(program.inputs, grads, strict=True)
    ]
    if choice.fused:
        part.add("gradients", "reverse", backward, outputs)
        return part.plan("backward")
    early = [s for s in outputs if _fits_scan(s, backward, {**part.stored}, depends, states)]
    exits = [
        Store(c.leaf, _per_chunk(f"d{var.name}_exit", var))
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
        stores = contracted_values([s.node for s in late], part.stored, _values(program))
        part.add("products", "parallel", (), stores)
    part.add("gradients", "parallel", (), late)
    return part.plan("backward")


def _passed(var: Var) -> Passed:
    """A state's gradient: from the end of the call to its start, or from one section to the one before it."""
    names = ("after", "before", "end", "start")
    return Passed(*(Value(f"d{var.name}_{n}", var.axes, "sequence", "fp32") for n in names))


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


def _per_chunk(name: str, var: Var) -> Value:
    """A state per chunk: matrices in the products' type; vectors are small, and quotients by them cancel."""
    return Value(name, var.axes, "chunk", "dot" if len(var.axes) > 1 else "fp32")


def _is_solve(node: Node) -> bool:
    if node.op in ("rename", "add", "sub", "neg"):
        return all(_is_solve(a) for a in node.args)
    return node.op == "dot" and any(_has_inverse(a) for a in node.args)


def _has_inverse(node: Node) -> bool:
    return node.op == "inverse" or (node.op == "mul" and any(_has_inverse(a) for a in node.args))


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
