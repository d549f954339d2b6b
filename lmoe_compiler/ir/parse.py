"""Reads the text of a recurrence (ir/text.py) back into a Program. Errors give line and column."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NoReturn, TypeVar, cast

from lmoe_compiler.errors import IRSyntaxError
from lmoe_compiler.ir.nodes import (
    OPS,
    REDUCE,
    Attr,
    Bound,
    Decay,
    Feedback,
    Loc,
    Next,
    Node,
    Program,
    Read,
    Step,
    Var,
    Write,
    const,
    input_,
    make,
)

TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\binf\b|\bnan\b)|(?P<name>[A-Za-z_][\w.]*)"""
    r"""|(?P<string>"[^"]*")|(?P<outer>(?<=\s)\(x\)(?=\s))|(?P<sign>->|[-+*/()\[\]{},='])|(?P<bad>\S))"""
)
LOC = re.compile(r"\s*#\s*(?P<file>\S.*):(?P<line>\d+)\s*$")
EXAMPLE = """recurrence linear_attention
  state S[K, V]
  token q[K] k[K] v[V]
  step S
    update k (x) v
  read r[V] = q' S
  output r"""

T = TypeVar("T")


@dataclass(frozen=True)
class Lexeme:
    kind: str
    text: str
    column: int


@dataclass
class Line:
    """The tokens of one statement and a cursor; all of the grammar below a statement."""

    number: int
    source: str
    names: dict[str, Node]
    loc: Loc | None = None
    lexemes: list[Lexeme] = field(default_factory=list)
    at: int = 0

    def __post_init__(self) -> None:
        text = self.source
        if found := LOC.search(text):
            self.loc = Loc(found["file"], int(found["line"]))
            text = text[: found.start()]
        text = text.split("#")[0].rstrip()
        position = 0
        while position < len(text):
            match = TOKEN.match(text, position)
            assert match is not None
            assert match.lastgroup is not None
            kind = match.lastgroup
            self.lexemes.append(Lexeme(kind, match[kind], match.start(kind) + 1))
            position = match.end()
        for lexeme in self.lexemes:
            if lexeme.kind == "bad":
                self.fail(f"unexpected character {lexeme.text!r}", lexeme)
        self.lexemes.append(Lexeme("end", "end of line", len(text) + 1))

    def fail(self, what: str, lexeme: Lexeme | None = None, example: str = "") -> NoReturn:
        column = (lexeme or self.lexemes[self.at]).column
        raise IRSyntaxError(
            what=f"IR syntax error: {what}",
            where=f"line {self.number}, column {column}\n{self.source}\n{' ' * (column - 1)}^",
            why="the text of a recurrence has one statement a line (the grammar opens lmoe_compiler/ir/text.py)",
            try_=example or EXAMPLE,
        )

    @property
    def next(self) -> Lexeme:
        return self.lexemes[self.at]

    def take(self) -> Lexeme:
        self.at += 1
        return self.lexemes[self.at - 1]

    def accept(self, text: str) -> bool:
        if self.next.kind != "string" and self.next.text == text:
            self.at += 1
            return True
        return False

    def expect(self, text: str) -> None:
        if not self.accept(text):
            self.fail(f"expected {text!r}, found {self.next.text!r}")

    def name(self) -> str:
        if self.next.kind != "name":
            self.fail(f"expected a name, found {self.next.text!r}")
        return self.take().text

    def axis(self) -> str:
        axis = self.name()
        while self.accept("'"):
            axis += "'"
        return axis

    def list_of(self, item: Callable[[], T], close: str) -> tuple[T, ...]:
        items = [] if self.next.text == close else [item()]
        while self.accept(","):
            items.append(item())
        self.expect(close)
        return tuple(items)

    def axes(self) -> tuple[str, ...]:
        return self.list_of(self.axis, "]") if self.accept("[") else ()

    def number_(self) -> float:
        negative = self.accept("-")
        if self.next.kind != "number":
            self.fail(f"expected a number, found {self.next.text!r}")
        value = float(self.take().text)
        return -value if negative else value

    def end(self) -> None:
        if self.next.kind != "end":
            self.fail(f"unexpected {self.next.text!r} after the end of the statement")

    def make(self, op: str, *args: Node, **attrs: Attr) -> Node:
        return make(op, *args, loc=self.loc, **attrs)

    def expression(self) -> Node:
        node = self.term()
        while self.next.text in ("+", "-"):
            op = "add" if self.take().text == "+" else "sub"
            node = self.make(op, node, self.term())
        return node

    def term(self) -> Node:
        node = self.unary()
        while self.next.text in ("*", "/"):
            op = "mul" if self.take().text == "*" else "div"
            node = self.make(op, node, self.unary())
        return node

    def unary(self) -> Node:
        if self.next.text == "-":
            if self.lexemes[self.at + 1].kind == "number":
                return const(self.number_(), self.loc)
            self.take()
            return self.make("neg", self.unary())
        return self.postfix()

    def postfix(self) -> Node:
        node = self.primary()
        while self.accept("["):
            axis = self.axis()
            if self.accept("->"):
                node = self.make("rename", node, old=axis, new=self.axis())
            else:
                self.expect("=")
                node = self.make("index", node, axis=axis, at=int(self.number_()))
            self.expect("]")
        return node

    def primary(self) -> Node:
        if self.next.kind == "number":
            return const(self.number_(), self.loc)
        if self.accept("("):
            node = self.expression()
            self.expect(")")
            return node
        start, after = self.next, self.lexemes[min(self.at + 1, len(self.lexemes) - 1)].text
        name = self.name()
        if name in self.names and not (after == "(" or self._is_attributed_op()):
            return self.names[name]
        if after == "{":
            self.take()
            return input_(name, self.list_of(self.axis, "}"), self.loc)
        if name not in OPS or name in ("input", "const", "rename", "index"):
            known = ", ".join(sorted(self.names)) or "none yet"
            self.fail(f"{name!r} is neither declared nor an op (declared: {known})", start)
        return self._operation(name)

    def _is_attributed_op(self) -> bool:
        """Whether the `[...]` at the cursor belongs to an op (`sum[K](x)`, `size[K]`) and not to a rename or index."""
        if self.next.text != "[":
            return False
        depth = self.at
        while self.lexemes[depth].text not in ("]", "end of line"):
            if self.lexemes[depth].text in ("->", "="):
                return self.lexemes[depth].text == "=" and self._closes_before_call(depth)
            depth += 1
        return True

    def _closes_before_call(self, start: int) -> bool:
        while self.lexemes[start].text not in ("]", "end of line"):
            start += 1
        return self.lexemes[min(start + 1, len(self.lexemes) - 1)].text == "("

    def _operation(self, op: str) -> Node:
        if op in ("size", "delta"):
            axes = self.axes()
            if len(axes) != (1 if op == "size" else 2):
                self.fail(f"{op} takes {'one axis' if op == 'size' else 'two axes'}")
            return (
                self.make(op, axis=axes[0]) if op == "size" else self.make(op, a=axes[0], b=axes[1])
            )
        attrs: dict[str, Attr] = {}
        if op in REDUCE:
            self.expect("[")
            attrs["axis"] = self.axis()
            self.expect("]")
        elif self.accept("["):
            attrs = dict(self.list_of(self._attr, "]"))
        opening = self.next
        self.expect("(")
        args = self.list_of(self.expression, ")")
        if not args:
            self.fail(f"{op} needs operands", opening)
        return self.make(op, *args, **attrs)

    def _attr(self) -> tuple[str, Attr]:
        key = self.name()
        self.expect("=")
        if self.next.kind == "number" or self.next.text == "-":
            return key, int(self.number_())
        value = self.axis()
        return key, {"true": True, "false": False}.get(value, value)


class _Parser:
    def __init__(self, text: str) -> None:
        self.names: dict[str, Node] = {}
        rows = [(i, row) for i, row in enumerate(text.splitlines(), 1) if row.split("#")[0].strip()]
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
