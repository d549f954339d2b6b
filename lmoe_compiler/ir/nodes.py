"""The recurrence IR on one page: named-axis expressions, and a recurrence as an ordered body over them.

Every value is an expression whose axes have names, so there is no transpose, view, unsqueeze or
broadcast: operands meet by axis name. At the recurrence level the axes are the user's dims (`K`, `V`, ...;
a second axis of one dim is written `K'`). A chunk program (lower/program.py) uses the same nodes
with two more axes: `t`, the rows of one chunk, and `s`, the same rows seen as a source.

  op         operands  attributes            axes of the result
  ---------  --------  --------------------  ------------------------------------------------------
  input      -         name, axes            axes                 token, head, state or read, by name
  const      -         value                 ()
  size       -         axis                  ()                   length of an axis, as a number
  delta      -         a, b                  (a, b)               1 where the two indices are equal
  POINTWISE  1..3      -                     union of the operands'
  cast       x         -                     x's                  (marks nothing at run time; kept for lines)
  rename     x         old, new              x's, old replaced by new
  index      x         axis, at              x's without axis     one entry of a static axis
  sum, max   x         axis                  x's without axis
  dot        a, b      axis                  union without axis   sum over axis of a * b
  -- chunk level only; t rows, s source rows of the same chunk --
  prefix     g         inclusive             g's                  running sum over t, of rows <= t (or < t)
  suffix     g         inclusive             g's                  sum over rows >= t (or > t)
  segment    g         exclusive             g's + s              sum of rows in (s, t] (or (s, t)), no -inf subtracted
  causal     x         strict                x's                  x[t, s] where s < t (strict) or s <= t, else 0
  decayed    r, x, g   axis, strict, exclusive   (t, s)           sum_axis r_t x_s exp(segment g), dyadic local sums
  decayed_rows  w, x, g   axis, strict, exclusive  (t, axis)      sum_s w[t, s] x_s exp(segment g)
  decayed_cols  w, r, g   axis, strict, exclusive  (t, axis)      sum_t w[t, s] r_t exp(segment g), as rows t := s
  decayed_gate  w, r, x, g  axis, strict, exclusive  (t, axis)    gradient of decayed to g
  solve      l, b      transposed            b's                  (I - l)^-1 b, l strictly lower; or (I - l)^-T b
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

UNARY = frozenset(
    "neg exp log log1p sigmoid logsigmoid softplus tanh sqrt rsqrt recip abs sign relu sin cos erf isfinite".split()
)
BINARY = frozenset("add sub mul div pow maximum minimum gt ge lt le eq".split())
POINTWISE = UNARY | BINARY | {"where"}
LEAVES = frozenset({"input", "const", "size", "delta"})
REDUCE = frozenset({"sum", "max", "dot"})
CHUNK_ONLY = frozenset(
    "prefix suffix segment causal decayed decayed_rows decayed_cols decayed_gate solve".split()
)
OPS = POINTWISE | LEAVES | REDUCE | CHUNK_ONLY | {"cast", "rename", "index"}

ROW, SOURCE = "t", "s"

Attr = str | int | float | bool | tuple[str, ...]


@dataclass(frozen=True)
class Loc:
    """The user's line: file, 1-based line number and its text."""

    file: str
    line: int
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, eq=False)
class Node:
    """One expression. Equality is structural and ignores `loc`."""

    op: str
    args: tuple[Node, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()
    loc: Loc | None = None
    axes: tuple[str, ...] = field(init=False)
    _key: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", _axes(self))
        object.__setattr__(
            self, "_key", hash((self.op, self.attrs, tuple(a._key for a in self.args)))
        )

    def __hash__(self) -> int:
        return self._key

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Node) or self._key != other._key:
            return False
        return (self.op, self.attrs, self.args) == (other.op, other.attrs, other.args)

    def __getitem__(self, name: str) -> Attr:
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(f"{self.op} has no attribute {name!r}")

    @property
    def name(self) -> str:
        return str(self["name"])


def _axes(node: Node) -> tuple[str, ...]:
    def union(*operands: Node) -> tuple[str, ...]:
        return tuple(dict.fromkeys(axis for operand in operands for axis in operand.axes))

    op, args = node.op, node.args
    if op == "input":
        return tuple(node["axes"])  # type: ignore[arg-type]
    if op in ("const", "size"):
        return ()
    if op == "delta":
        return (str(node["a"]), str(node["b"]))
    if op == "rename":
        return tuple(str(node["new"]) if a == node["old"] else a for a in args[0].axes)
    if op in ("sum", "max", "index", "dot"):
        return tuple(a for a in union(*args) if a != node["axis"])
    if op == "segment":
        return (ROW, SOURCE, *(a for a in args[0].axes if a != ROW))
    if op == "decayed":
        return (ROW, SOURCE)
    if op in ("decayed_rows", "decayed_cols", "decayed_gate"):
        return (ROW, str(node["axis"]))
    if op == "solve":
        return args[1].axes
    return union(*args)


def make(op: str, *args: Node, loc: Loc | None = None, **attrs: Attr) -> Node:
    """The one constructor: `make("dot", a, b, axis="K")`. Python numbers are not accepted; use `const`."""
    assert op in OPS, op
    return Node(op, args, tuple(sorted(attrs.items())), loc)


def input_(name: str, axes: Iterable[str] = (), loc: Loc | None = None) -> Node:
    return make("input", name=name, axes=tuple(axes), loc=loc)


def const(value: float, loc: Loc | None = None) -> Node:
    return make("const", value=float(value), loc=loc)


def topological(roots: Iterable[Node], known: Container[Node] = ()) -> Iterator[Node]:
    """Every node below `roots` once, operands first, not looking below `known` (iterative: adjoints are deep)."""
    seen: set[Node] = set()
    stack = [(root, False) for root in reversed(list(roots))]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            if node not in known:
                stack.extend((arg, False) for arg in reversed(node.args) if arg not in seen)


@dataclass(frozen=True)
class Var:
    """A declared name. `axes` are dim names, in the order of the user's annotation."""

    name: str
    kind: Literal["state", "token", "head"]
    axes: tuple[str, ...]
    loc: Loc | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(self.axes)}]" if self.axes else self.name

    @property
    def node(self) -> Node:
        return input_(self.name, self.axes, self.loc)


@dataclass(frozen=True)
class Decay:
    """S <- factor * S. The factor's axes say the kind: () scalar, (K,) keys, (V,) values, (K, V) elementwise.

    `log` is the logarithm of the factor where it is proved or declared positive (it may be -inf), else None.
    """

    factor: Node
    log: Node | None
    loc: Loc | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Write:
    """S <- S + key (x) value: the product of two expressions that meet in the state's axes."""

    key: Node
    value: Node
    loc: Loc | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Feedback:
    """S <- S + scale * key (x) (read' S): rank one. `read` shares its axis with `key`: K (left) or V (right).

    `point` says whether `read` sees the state before or after this step's decay.
    All writes and feedbacks of one step see the same state.
    """

    key: Node
    scale: Node
    read: Node
    point: Literal["before", "after"]
    loc: Loc | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Step:
    """One micro-step of one state: decays first, then all feedbacks and writes at once."""

    state: str
    decays: tuple[Decay, ...] = ()
    feedbacks: tuple[Feedback, ...] = ()
    writes: tuple[Write, ...] = ()


@dataclass(frozen=True)
class Next:
    """Next values of states with no proved form (coupled, nonlinear, ...), all in terms of the incoming ones."""

    states: tuple[str, ...]
    values: tuple[Node, ...]
    kind: Literal["coupled", "elementwise", "nonlinear"]
    reason: str = ""
    loc: Loc | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Read:
    """name = vector' S, contracted over the vector's axes, of the state as it is at this place of the body.

    `vector` None reads the whole state. Later expressions see the result as `input` of that name.
    """

    name: str
    state: str
    vector: Node | None
    axes: tuple[str, ...]
    loc: Loc | None = field(default=None, compare=False)

    @property
    def node(self) -> Node:
        return input_(self.name, self.axes, self.loc)


@dataclass(frozen=True)
class Bound:
    """What is known of an input: low <= value <= high (declared by the user)."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Program:
    """A recurrence: declarations, the body for one token in execution order, and the token's output.

    Expressions see tokens, heads and earlier reads; those in `Next` also see the incoming states.
    `static` dims have a fixed length, known to the program.
    """

    name: str
    states: tuple[Var, ...]
    inputs: tuple[Var, ...]
    body: tuple[Step | Next | Read, ...]
    output: Node
    bounds: tuple[Bound, ...] = ()
    static: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        """The text of ir/text.py (which imports this module)."""
        from lmoe_compiler.ir.text import print_program

        return print_program(self)

    @property
    def transition(self) -> Transition:
        """How the states move, read off the body's structure (never off names, never stored)."""
        kinds = tuple((var.name, _state_kind(self, var)) for var in self.states)
        return Transition(kinds)


# The rows of DESIGN section 3, best first.
KINDS = (
    "identity",
    "scalar",
    "diagonal",
    "rank_one",
    "product",
    "coupled",
    "elementwise",
    "nonlinear",
)


@dataclass(frozen=True)
class Transition:
    """The kind of every state; the recurrence's own is the lowest row among them."""

    states: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> str:
        return max((kind for _, kind in self.states), key=KINDS.index)


def _state_kind(program: Program, state: Var) -> str:
    for item in program.body:
        if isinstance(item, Next) and state.name in item.states:
            return item.kind
    steps = [s for s in program.body if isinstance(s, Step) and s.state == state.name]
    feedbacks = sum(len(step.feedbacks) for step in steps)
    decayed = {decay.factor.axes for step in steps for decay in step.decays}
    if feedbacks:
        return "rank_one" if feedbacks == 1 and len(steps) == 1 else "product"
    if len({axis for axes in decayed for axis in axes}) > 1 or (
        len(state.axes) == 1 and any(decayed)
    ):
        return "elementwise"
    if any(decayed):
        return "diagonal"
    return "scalar" if decayed else "identity"


def substitute(root: Node, values: Mapping[Node, Node]) -> Node:
    """`root` with nodes replaced; what replaces a node is not looked into."""
    done: dict[Node, Node] = dict(values)
    for node in topological([root]):
        if node not in done:
            args = tuple(done[a] for a in node.args)
            same = all(a is b for a, b in zip(args, node.args, strict=True))
            done[node] = node if same else Node(node.op, args, node.attrs, node.loc)
    return done[root]
