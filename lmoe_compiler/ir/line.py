"""One line of a recurrence's text: its tokens, a cursor, and the grammar of expressions. Used by parse.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from lmoe_compiler.errors import IRSyntaxError
from lmoe_compiler.ir.nodes import OPS, REDUCE, Attr, Loc, Node, const, input_, make

TOKEN = re.compile(
    r"""\s*(?:(?P<number>\d+\.?\d*(?:[eE][+-]?\d+)?|\binf\b|\bnan\b)|(?P<name>[^\W\d][\w.]*)"""
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
