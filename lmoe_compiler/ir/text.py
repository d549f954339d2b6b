"""A Program as text. parse.py reads it back: `parse(print_program(p)) == p`.

  recurrence gated_delta_rule
    state S[K, V]
    token q[K] k[K] v[V] g beta
    bound g in [-5, 0]
    step S
      decay log g                              # model.py:9
      update k (x) beta * v                    a write: key (x) value
      update k (x) -beta * (k' S)              a feedback: key (x) scale * (read' S); `before` the decay if so
    read r[V] = q' S                           or `read r[K, V] = S`: the whole state
    output r

Further lines: `head u[K]`, `static N = 3`, `decay f` (factor, no log proved), `decay f, log g`, `let x1 = expression`
(a shared expression), and `next S, M coupled "why not better"` followed by one `S = expression` each.
A trailing `# file:line` is the user's line. Expressions are infix; ops with attributes are written
`dot[K](a, b)`, `sum[K](x)`, `max[K](x)`, `x[K -> K']` (rename), `x[N = 0]` (index), `size[K]`, `delta[K, K']`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from lmoe_compiler.ir.nodes import (
    REDUCE,
    Decay,
    Feedback,
    Loc,
    Next,
    Node,
    Program,
    Read,
    Step,
    Var,
    make,
    topological,
)

INFIX = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2)}
SIGN, ATOM = 3, 4
LINE_OF_USER = 44


def number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)


def print_expression(node: Node, names: Mapping[Node, str] | None = None, level: int = 0) -> str:
    """Infix text of one expression. `names`: declared inputs and `let` names; other inputs show their axes."""
    names = names or {}
    if node in names:
        return names[node]

    def sub(x: Node, need: int = 0) -> str:
        return print_expression(x, names, need)

    op, args = node.op, node.args
    if op in INFIX:
        sign, here = INFIX[op]
        text = f"{sub(args[0], here)} {sign} {sub(args[1], here + 1)}"
    elif op == "neg":
        here = SIGN
        text = f"-({sub(args[0])})" if args[0].op == "const" else f"-{sub(args[0], SIGN)}"
    elif op == "const":
        text = number(node["value"])  # type: ignore[arg-type]
        here = SIGN if text.startswith("-") else ATOM
    else:
        here, text = ATOM, _primary(node, sub)
    return f"({text})" if here < level else text


def _primary(node: Node, sub: object) -> str:
    assert callable(sub)
    op, args = node.op, node.args
    if op == "input":
        return f"{node.name}{{{', '.join(node.axes)}}}"
    if op == "size":
        return f"size[{node['axis']}]"
    if op == "delta":
        return f"delta[{node['a']}, {node['b']}]"
    if op == "rename":
        return f"{sub(args[0], ATOM)}[{node['old']} -> {node['new']}]"
    if op == "index":
        return f"{sub(args[0], ATOM)}[{node['axis']} = {node['at']}]"
    operands = ", ".join(sub(x) for x in args)
    if op in REDUCE:
        return f"{op}[{node['axis']}]({operands})"
    attrs = ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in node.attrs)
    return f"{op}[{attrs}]({operands})" if attrs else f"{op}({operands})"


def print_program(program: Program, lines: bool = True) -> str:
    """The whole recurrence as text; `lines` adds the user's file and line to each statement."""
    return "\n".join(_Printer(program, lines).text()) + "\n"


def one_line(text: str) -> str:
    r"""`text` with `\n` written as two characters, which `parse` takes too.

    Inductor prints the arguments of ops into comments of its kernels, one line each.
    """
    return text.rstrip("\n").replace("\n", r"\n")


class _Printer:
    def __init__(self, program: Program, lines: bool) -> None:
        self.program, self.lines = program, lines
        declared: list[Var | Read] = [*program.states, *program.inputs, *_reads(program)]
        self.names: dict[Node, str] = {var.node: var.name for var in declared}
        self.shared = _shared(program)
        taken = {var.name for var in declared}
        self.fresh = (name for i in range(1, 10**6) if (name := f"x{i}") not in taken)

    def text(self) -> Iterator[str]:
        p = self.program
        yield f"recurrence {p.name}"
        for var in p.states:
            yield self.line("  state " + str(var), var.loc)
        for kind, group in groupby(p.inputs, key=lambda var: var.kind):
            yield f"  {kind} " + " ".join(str(var) for var in group)
        for dim, size in p.static:
            yield f"  static {dim} = {size}"
        for bound in p.bounds:
            yield f"  bound {bound.name} in [{number(bound.low)}, {number(bound.high)}]"
        for item in p.body:
            yield from self.item(item)
        yield from self.lets([p.output])
        yield self.line(f"  output {self.expr(p.output)}", p.output.loc)

    def item(self, item: Step | Next | Read) -> Iterator[str]:
        yield from self.lets(_roots(item))
        if isinstance(item, Read):
            yield self.line(f"  read {_read(item)} = {self.vector(item)}{item.state}", item.loc)
        elif isinstance(item, Next):
            reason = " " + '"' + item.reason.replace('"', "'") + '"' if item.reason else ""
            yield self.line(f"  next {', '.join(item.states)} {item.kind}{reason}", item.loc)
            for state, value in zip(item.states, item.values, strict=True):
                yield self.line(f"    {state} = {self.expr(value)}", value.loc)
        else:
            yield f"  step {item.state}"
            for decay in item.decays:
                yield self.line(f"    decay {self.decay(decay)}", decay.loc)
            for feedback in item.feedbacks:
                yield self.line(f"    update {self.feedback(feedback, item.state)}", feedback.loc)
            for write in item.writes:
                text = f"    update {self.expr(write.key)} (x) {self.expr(write.value)}"
                yield self.line(text, write.loc)

    def vector(self, read: Read) -> str:
        return "" if read.vector is None else self.expr(read.vector, ATOM) + "' "

    def decay(self, decay: Decay) -> str:
        if decay.log is None:
            return self.expr(decay.factor)
        if decay.factor == make("exp", decay.log):
            return f"log {self.expr(decay.log)}"
        return f"{self.expr(decay.factor)}, log {self.expr(decay.log)}"

    def feedback(self, f: Feedback, state: str) -> str:
        when = " before" if f.point == "before" else ""
        read = f"({self.expr(f.read, ATOM)}' {state})"
        return f"{self.expr(f.key)} (x) {self.expr(f.scale, SIGN)} * {read}{when}"

    def expr(self, node: Node, level: int = 0) -> str:
        return print_expression(node, self.names, level)

    def lets(self, roots: Iterable[Node]) -> Iterator[str]:
        """A `let` line for every shared expression below `roots` that has no name yet."""
        for node in topological(roots):
            if node in self.shared and node not in self.names:
                text = self.expr(node)
                self.names[node] = next(self.fresh)
                yield self.line(f"  let {self.names[node]} = {text}", node.loc)

    def line(self, text: str, loc: Loc | None) -> str:
        return f"{text:<{LINE_OF_USER}}  # {loc}" if loc and self.lines else text


def _read(read: Read) -> str:
    return f"{read.name}[{', '.join(read.axes)}]" if read.axes else read.name


def _reads(program: Program) -> list[Read]:
    return [item for item in program.body if isinstance(item, Read)]


def _roots(item: Step | Next | Read) -> list[Node]:
    if isinstance(item, Read):
        return [] if item.vector is None else [item.vector]
    if isinstance(item, Next):
        return list(item.values)
    roots = [x for d in item.decays for x in ([d.factor] if d.log is None else [d.factor, d.log])]
    roots += [x for f in item.feedbacks for x in (f.key, f.scale, f.read)]
    return roots + [x for w in item.writes for x in (w.key, w.value)]


def _shared(program: Program) -> set[Node]:
    """Expressions worth a name: used by two others, and more than one op deep."""
    roots = [root for item in program.body for root in _roots(item)] + [program.output]
    uses: Counter[Node] = Counter(roots)
    for node in topological(roots):
        uses.update(node.args)
    return {
        node
        for node, count in uses.items()
        if count > 1 and any(arg.op not in ("input", "const", "size") for arg in node.args)
    }
