"""From the body of one token to the body of one chunk: the generic builder of chunk programs.

Per state, with S0 the state at the chunk's entry, a the feedback's read vector, and write groups j of key x_j,
value p_j and feedback scale sigma_j (reference/analysis.md section 5.3):

  U   = (I - sum_j A(a, x_j) sigma_j)^-1 (in(a) S0 + sum_j A(a, x_j) p_j)      what the feedback reads
  Y_j = p_j + sigma_j U                                                         what is written at x_j
  r   = in(q) S0 + sum_j P(q, x_j) Y_j                                          a read by q
  S1  = exp(total) S0 + sum_j out(x_j)' Y_j

A and P are products over the keys' axis, decayed from the write to the read and masked causally; `in` decays
from the chunk's entry, `out` to its exit. Without feedback there is no solve; with one group the solve runs on Y
itself. A scalar decay scales rows, so that the operands of products stay the inputs.
The next file is adjoint.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lmoe_compiler.analysis import interval
from lmoe_compiler.ir.nodes import (
    ROW,
    SOURCE,
    Feedback,
    Next,
    Node,
    Program,
    Read,
    Step,
    Var,
    input_,
    topological,
)
from lmoe_compiler.lower import algebra as al
from lmoe_compiler.lower.program import VALID, ChunkProgram

# Functions with a pole, or that are none for what lies below it.
SINGULAR = {
    "div": 0.0,
    "recip": 0.0,
    "log": 0.0,
    "sqrt": 0.0,
    "rsqrt": 0.0,
    "pow": 0.0,
    "log1p": -1.0,
}
# What stands for the keys' axis of a state that only decays by a scalar.
NO_AXIS = ""


class NoChunkForm(Exception):
    """Why a program is run token by token."""


@dataclass(frozen=True)
class MicroStep:
    """All steps of one state in one, and where each read stands.

    A read sees the state before the decays, between decays and writes, or after the writes.
    """

    step: Step
    points: dict[str, str]


@dataclass(frozen=True)
class Group:
    """Everything written at one key: key (x) (value + scale U)."""

    key: Node
    value: Node
    scale: Node


@dataclass(frozen=True)
class StateForm:
    """One state's coefficients over the rows of a chunk. `axis` is the keys'; `log` the decay's, () or (axis,).

    `written` are keys, with a number for each row and a value: number and value stay apart, so that products take an
    input as it is.
    """

    var: Var
    axis: str
    log: Node
    written: tuple[tuple[Node, Node, Node], ...]

    @property
    def entry(self) -> Node:
        return al.interned(self.var.node)

    @property
    def diagonal(self) -> bool:
        return self.axis in self.log.axes

    def scores(self, rows: Node, sources: Node, strict: bool, exclusive: bool) -> Node:
        """[t, s]: what the row reads of one unit written by the source."""
        if self.diagonal:
            return al.make(
                "decayed", rows, sources, self.log,
                axis=self.axis, strict=strict, exclusive=exclusive,
            )  # fmt: skip
        product = al.dot(rows, al.as_source(sources), self.axis)
        if self.log is not al.ZERO:
            product = al.mul(al.exp(al.make("segment", self.log, exclusive=exclusive)), product)
        return al.causal(product, strict)

    def entry_read(self, rows: Node, exclusive: bool) -> Node:
        """[t, ...]: what the rows read of the entry state."""
        factor = al.exp(al.prefix(self.log, inclusive=not exclusive))
        if self.diagonal:
            return al.dot(al.mul(rows, factor), self.entry, self.axis)
        return al.mul(factor, al.dot(rows, self.entry, self.axis))

    def exit(self) -> Node:
        """The state after the chunk."""
        left = al.suffix(self.log, inclusive=False)
        whole = (
            al.mul(al.exp(al.sum_over(self.log, ROW)), self.entry) if self.decays else self.entry
        )
        for key, scale, value in self.written:
            if self.diagonal:
                whole = al.add(whole, al.dot(al.mul(key, al.exp(left)), al.mul(scale, value), ROW))
            else:
                factor = al.scaled(al.exp(left), scale)
                whole = al.add(whole, al.dot(key, al.mul(factor, value), ROW))
        return whole

    @property
    def decays(self) -> bool:
        return self.log is not al.ZERO


def build(program: Program) -> ChunkProgram | None:
    """The chunk program, or None where some state has no chunk form (`chunk_program` says why)."""
    try:
        return chunk_program(program)
    except NoChunkForm:
        return None


def chunk_program(program: Program) -> ChunkProgram:
    """The chunk program; raises NoChunkForm with the reason."""
    return _Builder(program).result()


class _Builder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.valid = al.interned(input_(VALID, (ROW,)))
        self.reads = {item.name: item for item in program.body if isinstance(item, Read)}
        self.micro = {var.name: merge_steps(program, var) for var in program.states}
        self.states = {var.name: var for var in program.states}
        self.lowered: dict[Node, Node] = {}
        self.forms: dict[str, StateForm] = {}
        self.pending: set[str] = set()
        self.roles: dict[str, Node] = {}
        for var in program.inputs:
            rows = (ROW, *var.axes) if var.kind == "token" else var.axes
            self.lowered[var.node] = al.interned(input_(var.name, rows, var.loc))

    def result(self) -> ChunkProgram:
        exits = tuple(self.form(var.name).exit() for var in self.program.states)
        output = self.expression(self.program.output)
        return ChunkProgram(self.program, exits, output, self.roles)

    def expression(self, root: Node) -> Node:
        """A token's expression over the rows of a chunk; reads are inlined."""
        for node in topological([root]):
            if node not in self.lowered:
                if node.op == "input":
                    self.lowered[node] = self.read(self.reads[node.name])
                else:
                    self.lowered[node] = al.rebuild(node, self.operands(node))
        return self.lowered[root]

    def operands(self, node: Node) -> list[Node]:
        """Its arguments. What may have no finite value at 0 gets 1 in rows past the end.

        Those rows are read as zeros, and what they give is multiplied by zero, there and in every gradient.
        """
        args = [self.lowered[a] for a in node.args]
        if node.op in SINGULAR:
            at = 1 if node.op == "div" else 0
            low, high = interval(node.args[at], (), dict(self.program.static))
            beyond = high < SINGULAR[node.op] and node.op in ("div", "recip")
            if ROW in args[at].axes and low <= SINGULAR[node.op] and not beyond:
                args[at] = al.where(self.valid, args[at], al.ONE)
        return args

    def masked(self, x: Node) -> Node:
        """Rows after the end read as zero (and a value that is the same in every row gets the row axis)."""
        return al.where(self.valid, x, al.ZERO)

    def by_row(self, x: Node) -> Node:
        return x if ROW in x.axes else self.masked(x)

    def read(self, read: Read) -> Node:
        form = self.form(read.state)
        assert read.vector is not None
        scale, vector = split_scale(self.expression(read.vector), form.axis)
        vector = self.by_row(vector)
        point = self.micro[read.state].points[read.name]
        exclusive, strict = point == "before", point != "after"
        result = form.entry_read(vector, exclusive)
        for j, (key, weight, value) in enumerate(form.written):
            scores = al.scaled(form.scores(vector, key, strict, exclusive), al.as_source(weight))
            self.roles[f"scores {read.name} {j}"] = scores
            result = al.add(result, al.dot(scores, al.as_source(value), SOURCE))
        return al.mul(scale, result)

    def form(self, state: str) -> StateForm:
        if state not in self.forms:
            if state in self.pending:
                raise NoChunkForm(f"the update of {state} uses what it reads of itself")
            self.pending.add(state)
            self.forms[state] = self.new_form(self.states[state])
            self.pending.remove(state)
        return self.forms[state]

    def new_form(self, var: Var) -> StateForm:
        step = self.micro[var.name].step
        reads = [read for read in self.reads.values() if read.state == var.name]
        axis = key_axis(var, step, reads)
        logs = [self.expression(decay.log) for decay in step.decays if decay.log is not None]
        log = self.masked(al.total(logs))
        groups = [self.write_group(var, axis, w.key, w.value) for w in step.writes]
        read = self.feedback_read(step.feedbacks, axis, groups)
        groups = merge_groups(groups)
        written = tuple((g.key, *split_numbers(g.value)) for g in groups)
        form = StateForm(var, axis, log, written)
        if read is None:
            return form
        solved = self.solve(form, read, step.feedbacks[0].point == "before", groups)
        return StateForm(var, axis, log, tuple((key, al.ONE, value) for key, value in solved))

    def write_group(self, var: Var, axis: str, key: Node, value: Node) -> Group:
        key, value = self.expression(key), self.expression(value)
        if axis in value.axes:
            key, value = value, key
        scale, key = split_scale(key, axis)
        if set(key.axes) - {ROW} != {axis} or axis in value.axes:
            raise NoChunkForm(f"a write to {var.name} does not split at {axis}")
        return Group(self.masked(key), self.by_row(al.mul(scale, value)), al.ZERO)

    def feedback_read(
        self, feedbacks: Iterable[Feedback], axis: str, groups: list[Group]
    ) -> Node | None:
        """The one vector that all feedbacks read by; their keys join the groups."""
        vectors = set()
        for f in feedbacks:
            of_key, key = split_scale(self.expression(f.key), axis)
            of_read, vector = split_scale(self.expression(f.read), axis)
            scale = self.by_row(al.mul(self.expression(f.scale), al.mul(of_key, of_read)))
            if set(scale.axes) != {ROW}:
                raise NoChunkForm("a feedback scaled value by value has a solve for each of them")
            groups.append(Group(self.masked(key), al.ZERO, scale))
            vectors.add((self.by_row(vector), f.point))
        if len(vectors) > 1:
            raise NoChunkForm("feedbacks that read by different vectors have no shared solve")
        return vectors.pop()[0] if vectors else None

    def solve(
        self, form: StateForm, read: Node, exclusive: bool, groups: list[Group]
    ) -> tuple[tuple[Node, Node], ...]:
        """(key, Y) of every group, from the unit triangular system of the feedback."""
        name = form.var.name
        entry = form.entry_read(read, exclusive)
        products = [form.scores(read, g.key, True, exclusive) for g in groups]
        if len(groups) == 1:
            (group,) = groups
            matrix = al.mul(group.scale, products[0])
            right = al.add(group.value, al.mul(group.scale, entry))
        else:
            columns = (
                al.mul(product, al.as_source(g.scale))
                for product, g in zip(products, groups, strict=True)
            )
            matrix = al.total(columns)
            right = entry
            for product, g in zip(products, groups, strict=True):
                right = al.add(right, al.dot(product, al.as_source(g.value), SOURCE))
        solution = al.solve(matrix, right)
        self.roles |= {f"matrix {name}": matrix, f"rhs {name}": right, f"solution {name}": solution}
        if len(groups) == 1:
            return ((groups[0].key, solution),)
        return tuple((g.key, al.add(g.value, al.scaled(solution, g.scale))) for g in groups)


def split_scale(x: Node, axis: str) -> tuple[Node, Node]:
    """(c, y) with x = c y and c without `axis`: scalars leave keys, so that equal keys meet and stay raw."""
    if x.op == "neg":
        scale, rest = split_scale(x.args[0], axis)
        return al.neg(scale), rest
    if x.op in ("mul", "div") and axis not in x.args[1].axes:
        scale, rest = split_scale(x.args[0], axis)
        return al.rebuild(x, [scale, x.args[1]]), rest
    if x.op == "mul" and axis not in x.args[0].axes:
        scale, rest = split_scale(x.args[1], axis)
        return al.mul(x.args[0], scale), rest
    return al.ONE, x


def split_numbers(value: Node) -> tuple[Node, Node]:
    """(c, y) with value = c y, c one number for each row; (1, value) where no other axis tells them apart."""
    others = [axis for axis in value.axes if axis != ROW]
    scale, rest = split_scale(value, others[0]) if len(others) == 1 else (al.ONE, value)
    return (scale, rest) if ROW in rest.axes else (al.ONE, value)


def merge_groups(groups: Iterable[Group]) -> list[Group]:
    """One group for every key."""
    merged: dict[Node, Group] = {}
    for g in groups:
        old = merged.get(g.key, Group(g.key, al.ZERO, al.ZERO))
        merged[g.key] = Group(g.key, al.add(old.value, g.value), al.add(old.scale, g.scale))
    return list(merged.values())


def key_axis(var: Var, step: Step, reads: Iterable[Read]) -> str:
    """The axis of the state that is contracted by reads and decayed: its keys, whichever way it is written."""
    vectors = [read.vector for read in reads]
    if any(vector is None for vector in vectors):
        raise NoChunkForm(f"{var.name} is read whole")
    contracted = [vector.axes for vector in vectors if vector is not None]
    contracted += [f.read.axes for f in step.feedbacks]
    decayed = {axis for decay in step.decays for axis in decay.factor.axes}
    for axis in (*var.axes, NO_AXIS):
        if all(axes == (axis,) for axes in contracted) and decayed <= {axis}:
            return axis
    raise NoChunkForm(f"no one axis of {var.name} carries its decay, feedback and reads")


def merge_steps(program: Program, var: Var) -> MicroStep:
    """A state's steps in one: decays first, then one set of feedbacks, then writes that nothing reads between."""
    merged, points = Step(var.name), dict[str, str]()
    for item in program.body:
        if isinstance(item, Next):
            if var.name in item.states:
                raise NoChunkForm(f"{var.name} is {item.kind}: {item.reason}".rstrip(": "))
        elif item.state == var.name and isinstance(item, Read):
            written = merged.feedbacks or merged.writes
            points[item.name] = "after" if written else "between" if merged.decays else "before"
        elif item.state == var.name and isinstance(item, Step):
            merged = _followed_by(merged, item, set(points.values()))
    if any(decay.log is None for decay in merged.decays):
        raise NoChunkForm(f"a decay of {var.name} is not proved positive")
    return MicroStep(merged, points)


def _followed_by(first: Step, then: Step, seen: set[str]) -> Step:
    """Two steps of one state as one, where no read (at the points `seen`) tells them apart."""
    started = bool(first.feedbacks or first.writes)
    if (started and (then.decays or then.feedbacks)) or (started and "after" in seen):
        raise NoChunkForm(f"{then.state} takes several steps per token")
    if "between" in seen and then.decays:
        raise NoChunkForm(f"{then.state} is read between two decays")
    feedbacks = then.feedbacks
    if first.decays and any(f.point == "before" for f in feedbacks):
        if then.decays:
            raise NoChunkForm(f"a feedback of {then.state} reads between two decays")
        feedbacks = tuple(Feedback(f.key, f.scale, f.read, "after", f.loc) for f in feedbacks)
    return Step(
        then.state,
        first.decays + then.decays,
        first.feedbacks + feedbacks,
        first.writes + then.writes,
    )
