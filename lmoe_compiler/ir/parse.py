"""Reads the text of a recurrence (ir/text.py) back into a Program. Errors give line and column.

line.py has a line's tokens and expressions; the statements are here.
"""

from __future__ import annotations

from typing import Literal, cast

from lmoe_compiler.ir.line import Line
from lmoe_compiler.ir.nodes import (
    Bound,
    Decay,
    Feedback,
    Next,
    Node,
    Program,
    Read,
    Step,
    Var,
    Write,
)


class _Parser:
    def __init__(self, text: str) -> None:
        self.names: dict[str, Node] = {}
        whole = text.replace(r"\n", "\n")  # of `one_line`
        rows = [
            (i, row) for i, row in enumerate(whole.splitlines(), 1) if row.split("#")[0].strip()
        ]
        self.lines = [Line(i, row, self.names) for i, row in rows]
        if not self.lines:
            self.lines = [Line(1, "", self.names)]
        self.at = 0
        self.states: list[Var] = []
        self.inputs: list[Var] = []
        self.static: list[tuple[str, int]] = []
        self.bounds: list[Bound] = []
        self.body: list[Step | Next | Read] = []
        self.output: Node | None = None

    def program(self) -> Program:
        first = self.lines[0]
        first.expect("recurrence")
        name = first.name()
        first.end()
        self.at = 1
        while self.at < len(self.lines):
            line = self.lines[self.at]
            self.at += 1
            self.statement(line)
            line.end()
        if self.output is None:
            last = self.lines[-1]
            last.fail("the recurrence has no output", last.lexemes[-1])
        return Program(
            name, tuple(self.states), tuple(self.inputs), tuple(self.body), self.output,
            tuple(self.bounds), tuple(self.static),
        )  # fmt: skip

    def statement(self, line: Line) -> None:
        start = line.next
        word = line.name()
        if word in ("state", "token", "head"):
            self.declare(line, cast(Literal["state", "token", "head"], word))
        elif word == "static":
            dim = line.name()
            line.expect("=")
            self.static.append((dim, int(line.number_())))
        elif word == "bound":
            self.bounds.append(self.bound(line))
        elif word == "let":
            name = line.name()
            line.expect("=")
            self.names[name] = line.expression()
        elif word == "step":
            self.body.append(self.step(line))
        elif word == "next":
            self.body.append(self.next_(line))
        elif word == "read":
            self.body.append(self.read(line))
        elif word == "output":
            self.output = line.expression()
        else:
            line.fail(f"unknown statement {word!r}", start)

    def declare(self, line: Line, kind: Literal["state", "token", "head"]) -> None:
        while line.next.kind == "name":
            start = line.next
            var = Var(line.name(), kind, line.axes(), line.loc)
            if var.name in self.names:
                line.fail(f"{var.name!r} is declared twice", start)
            (self.states if kind == "state" else self.inputs).append(var)
            self.names[var.name] = var.node

    def bound(self, line: Line) -> Bound:
        name = line.name()
        line.expect("in")
        line.expect("[")
        low = line.number_()
        line.expect(",")
        high = line.number_()
        line.expect("]")
        return Bound(name, low, high)

    def state(self, line: Line) -> str:
        start, name = line.next, line.name()
        if all(name != state.name for state in self.states):
            line.fail(f"{name!r} is not a state", start)
        return name

    def indented(self, *words: str) -> Line | None:
        """The next line if it starts with one of `words`."""
        if self.at < len(self.lines) and self.lines[self.at].next.text in words:
            self.at += 1
            return self.lines[self.at - 1]
        return None

    def step(self, head: Line) -> Step:
        state = self.state(head)
        decays: list[Decay] = []
        feedbacks: list[Feedback] = []
        writes: list[Write] = []
        while line := self.indented("decay", "update"):
            if line.accept("decay"):
                decays.append(self.decay(line))
            else:
                line.take()
                update = self.update(line, state)
                (feedbacks if isinstance(update, Feedback) else writes).append(update)  # type: ignore[arg-type]
            line.end()
        return Step(state, tuple(decays), tuple(feedbacks), tuple(writes))

    def decay(self, line: Line) -> Decay:
        if line.next.text == "log" and line.lexemes[line.at + 1].text != "(":
            line.take()
            log = line.expression()
            return Decay(line.make("exp", log), log, line.loc)
        factor, log_ = line.expression(), None
        if line.accept(","):
            line.expect("log")
            log_ = line.expression()
        return Decay(factor, log_, line.loc)

    def update(self, line: Line, state: str) -> Write | Feedback:
        key = line.expression()
        line.expect("(x)")
        if all(
            lexeme.text != "'" or self._is_axis_prime(line, i)
            for i, lexeme in enumerate(line.lexemes)
        ):
            return Write(key, line.expression(), line.loc)
        scale = line.unary()
        line.expect("*")
        line.expect("(")
        read = line.postfix()
        line.expect("'")
        line.expect(state)
        line.expect(")")
        point: Literal["before", "after"] = "before" if line.accept("before") else "after"
        return Feedback(key, scale, read, point, line.loc)

    def _is_axis_prime(self, line: Line, at: int) -> bool:
        """A prime inside brackets belongs to an axis (K'); the others read a state (k' S)."""
        before = [lexeme.text for lexeme in line.lexemes[:at]]
        return before.count("[") > before.count("]")

    def next_(self, line: Line) -> Next:
        states = [self.state(line)]
        while line.accept(","):
            states.append(self.state(line))
        kind = line.name()
        if kind not in ("coupled", "elementwise", "nonlinear"):
            line.fail(
                f"{kind!r} is none of coupled, elementwise, nonlinear", line.lexemes[line.at - 1]
            )
        reason = line.take().text.strip('"') if line.next.kind == "string" else ""
        values = []
        for state in states:
            value = self.indented(state)
            if value is None:
                line.fail(f"`next` needs a line `{state} = ...` here")
            value.take()
            value.expect("=")
            values.append(value.expression())
            value.end()
        return Next(tuple(states), tuple(values), kind, reason, line.loc)  # type: ignore[arg-type]

    def read(self, line: Line) -> Read:
        start = line.next
        name, axes = line.name(), line.axes()
        if name in self.names:
            line.fail(f"{name!r} is declared twice", start)
        line.expect("=")
        vector = None
        if line.lexemes[line.at + 1].kind != "end":
            vector = line.postfix()
            line.expect("'")
        read = Read(name, self.state(line), vector, axes, line.loc)
        self.names[name] = read.node
        return read


def parse(text: str) -> Program:
    """The Program that `text` describes (printed by `ir.text.print_program`, or written by hand)."""
    return _Parser(text).program()
