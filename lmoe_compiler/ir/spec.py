"""What must hold of a Program beyond its grammar. `verify` runs between stages and on text given by a user."""

from __future__ import annotations

from collections.abc import Iterable

from lmoe_compiler.errors import InvalidProgram
from lmoe_compiler.ir.nodes import (
    CHUNK_ONLY,
    ROW,
    SOURCE,
    Decay,
    Feedback,
    Next,
    Node,
    Program,
    Read,
    Step,
    Write,
    topological,
)

# Names that a call, or the rows of a chunk, have already.
RESERVED_NAMES = ("initial_state", "return_state", "cu_seqlens", "state", "inplace")
RESERVED_DIMS = {
    "B": "B counts the sequences of a call",
    "T": "T counts the tokens of a call",
    "H": "H counts the heads of a call",
    ROW: f"{ROW} is the token in a chunk",
    SOURCE: f"{SOURCE} is an earlier token in a chunk",
}


def base(axis: str) -> str:
    """The dim of an axis: K of K'."""
    return axis.rstrip("'")


def verify(program: Program) -> Program:
    """The program itself, if names are unique and every expression sees and fills only what it may."""
    declared = [*program.states, *program.inputs]
    names = [var.name for var in declared]
    names += [item.name for item in program.body if isinstance(item, Read)]
    for name in names:
        _require(names.count(name) == 1, f"{name!r} is declared {names.count(name)} times", program)
    _require(bool(program.states), "there is no state", program, "a recurrence carries a state")
    tokens = [v for v in program.inputs if v.kind == "token"]
    _require(bool(tokens), "there is no token input", program, "the sequence comes in by a token")
    for var in declared:
        distinct = len(set(var.axes)) == len(var.axes)
        for axis in map(base, var.axes):
            known = axis not in RESERVED_DIMS
            _require(known, f"a dim is called {axis}", program, RESERVED_DIMS.get(axis, ""))
        free = var.kind == "state" or var.name not in RESERVED_NAMES
        _require(free, f"an input is called {var.name!r}", program, "calls have that of their own")
        _require(distinct, f"{var.name}[{', '.join(var.axes)}] repeats a dim", program)
    for bound in program.bounds:
        known = any(bound.name == var.name for var in program.inputs)
        _require(known, f"bound of {bound.name!r}, which is not an input", program)
        _require(bound.low <= bound.high, f"bound [{bound.low}, {bound.high}] is empty", program)
    _Body(program).check()
    return program


def _require(holds: bool, what: str, program: Program, why: str = "", where: str = "") -> None:
    if not holds:
        raise InvalidProgram(f"{program.name}: {what}", where=where, why=why)


class _Body:
    """Walks the body in execution order with the set of visible leaves."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.state_axes = {var.name: var.axes for var in program.states}
        self.dims = {base(a) for var in (*program.states, *program.inputs) for a in var.axes}
        self.visible = {var.node for var in program.inputs}
        self.incoming = {var.node for var in program.states}

    def check(self) -> None:
        for item in self.program.body:
            if isinstance(item, Step):
                self.step(item)
            elif isinstance(item, Next):
                for state, value in zip(item.states, item.values, strict=True):
                    self.expression([value], self.visible | self.incoming)
                    self.fits(value, self.axes(state), f"next value of {state}")
            else:
                self.read(item)
        self.expression([self.program.output], self.visible)

    def axes(self, state: str) -> tuple[str, ...]:
        self.need(state in self.state_axes, f"{state!r} is not a state")
        return self.state_axes[state]

    def step(self, step: Step) -> None:
        axes = self.axes(step.state)
        parts: list[Decay | Feedback | Write] = [*step.decays, *step.feedbacks, *step.writes]
        for part in parts:
            where = str(part.loc or "")
            if isinstance(part, Decay):
                self.expression([part.factor] + ([] if part.log is None else [part.log]))
                self.fits(part.factor, axes, f"decay of {step.state}", where)
            elif isinstance(part, Write):
                self.expression([part.key, part.value])
                self.fits(part.key, axes, "key", where)
                self.fits(part.value, axes, "value", where)
                filled = {*part.key.axes, *part.value.axes}
                rest = ", ".join(a for a in axes if a not in filled)
                self.need(not rest, f"nothing fills axis {rest} of {step.state} in a write", where)
            else:
                self.feedback(part, axes, where)

    def feedback(self, f: Feedback, axes: tuple[str, ...], where: str) -> None:
        self.expression([f.key, f.scale, f.read])
        single = len(f.key.axes) == 1 and f.key.axes == f.read.axes and f.key.axes[0] in axes
        self.need(
            single, f"key {f.key.axes} and read {f.read.axes} of a feedback share one axis", where
        )
        self.fits(f.scale, (), "scale of a feedback", where)

    def read(self, read: Read) -> None:
        axes = self.axes(read.state)
        contracted: tuple[str, ...] = ()
        if read.vector is not None:
            self.expression([read.vector])
            contracted = read.vector.axes
            self.need(len(contracted) == 1, f"the vector of read {read.name} has one axis")
            self.need(
                contracted[0] in axes, f"{read.name}: {contracted[0]} is no axis of the state"
            )
        rest = tuple(a for a in axes if a not in contracted)
        self.need(set(read.axes) == set(rest), f"read {read.name} has axes {rest}, not {read.axes}")
        self.visible.add(read.node)

    def expression(self, roots: Iterable[Node], visible: set[Node] | None = None) -> None:
        for node in topological(roots):
            where = str(node.loc or "")
            self.need(node.op not in CHUNK_ONLY, f"{node.op} exists in chunk programs only", where)
            if node.op == "input":
                seen = node in (self.visible if visible is None else visible)
                self.need(seen, f"{node.name} is not visible here", where)
            for axis in node.axes:
                self.need(base(axis) in self.dims, f"axis {axis} is no dim of an input", where)

    def fits(self, node: Node, axes: tuple[str, ...], what: str, where: str = "") -> None:
        extra = set(node.axes) - set(axes)
        self.need(not extra, f"{what} has axes {node.axes}, outside {axes}", where)

    def need(self, holds: bool, what: str, where: str = "") -> None:
        _require(holds, what, self.program, where=where)
