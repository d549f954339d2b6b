"""Index polynomials back to expressions, canonically; values of states become reads on the way.

A sum of three or more terms that the user wrote as one expression (a square, a product of sums) is taken over as
written: expanding it would lose digits. Everything else is built anew, so spellings end in one program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Protocol

from lmoe_compiler.analysis.algebra import (
    INDICATORS,
    ONE,
    add,
    apply,
    close_atom,
    level_of,
    mul,
    open_atom,
    product_with,
    reduced,
    relabel,
    scale,
    single,
    the_function,
)
from lmoe_compiler.analysis.classify import content
from lmoe_compiler.analysis.poly import (
    Atom,
    Factor,
    Monomial,
    Poly,
    atom,
    components,
    dim,
    is_bound,
    is_free,
    labels_of,
)
from lmoe_compiler.ir.nodes import Loc, Node, Var, const, make, topological
from lmoe_compiler.operations import Context, another
from lmoe_compiler.operations import relabel as rename_axes

AS_WRITTEN = 3


class ReadMaker(Protocol):
    """Places reads in the body of the program."""

    def __call__(self, state: str, version: int, vector: Poly | None, axis: str) -> str:
        """The name of the read of `state` by `vector` over `axis` (None: of the whole state)."""

    def is_last(self, state: str, version: int) -> bool:
        """Whether the state has no further micro-step, so that a read of it can wait for other reads."""


class Emitter:
    """Builds expressions. `inputs`: declared axes by name; `written`: the user's expressions, by polynomial."""

    def __init__(
        self,
        inputs: Iterable[Var],
        states: Iterable[Var],
        opaque: Mapping[str, Node],
        read: ReadMaker,
    ) -> None:
        self.inputs = {v.name: v.node for v in inputs}
        self.state_axes = {v.name: v.axes for v in states}
        self.opaque = opaque
        self.read = read
        # An expression as the user wrote it, with reads in the place of states (analyse.py).
        self.express: Callable[[Node], Node] = lambda node: node
        self.written: dict[str, tuple[Node, tuple[str, ...]]] = {}
        self.lines: dict[str, Loc] = {}
        self.loc: Loc | None = None
        self.known: dict[str, Node] = {}

    def remember(self, polynomials: Mapping[Node, Poly]) -> None:
        """Take note of what the user wrote, for `AS_WRITTEN` sums and for source lines."""
        for node, p in polynomials.items():
            if node.loc is not None and node.op not in ("input", "const"):
                self.lines.setdefault(p.key, node.loc)
            # What is the same along an axis is written with it, and has it no more.
            same = set(node.axes) == set(p.free)
            if same and len(p) >= AS_WRITTEN and not p.states and not self.mentions_state(node):
                name, labels = _signature(p)
                self.written.setdefault(name, (node, labels))

    def mentions_state(self, node: Node) -> bool:
        """Whether a state stands in the expression, even if its value does not depend on it (0 * S)."""
        return any(n.op == "input" and n.name in self.state_axes for n in topological([node]))

    def line_of(self, p: Poly) -> Loc | None:
        return self.lines.get(p.key, self.loc)

    def node(self, p: Poly) -> Node:
        """An expression of the value of `p`; its axes are p's free labels."""
        if p.states:
            return self.node(self.without_states(p))
        if p.key not in self.known:
            outer, self.loc = self.loc, self.line_of(p)
            self.known[p.key] = self._node(p)
            self.loc = outer
        return self.known[p.key]

    def make(self, op: str, *args: Node, **attrs: str | int) -> Node:
        return make(op, *args, loc=self.loc, **attrs)

    def _node(self, p: Poly) -> Node:
        if len(p) >= AS_WRITTEN:
            name, labels = _signature(p)
            if name in self.written:
                node, own = self.written[name]
                return rename_axes(Context(self.loc, ()), node, dict(zip(own, labels, strict=True)))
        if len(p) <= 1:
            return self._term(*next(iter(p.items()))) if p else const(0, self.loc)
        inner = the_function(add(ONE, scale(p, -1)), "sigmoid")
        if inner is not None:
            return self.make("sigmoid", self.node(scale(inner, -1)))
        common, rest = _common(p)
        if common:
            return self.make("mul", self._term(common, Fraction(1)), self.node(rest))
        return self._sum(p)

    def _sum(self, p: Poly) -> Node:
        terms = sorted(p.ordered(), key=lambda term: term[1] < 0)
        total = self._term(*terms[0])
        for mono, c in terms[1:]:
            op = "sub" if c < 0 else "add"
            total = self.make(op, total, self._term(mono, abs(c)))
        return total

    def _term(self, mono: Monomial, c: Fraction) -> Node:
        """c times a product; factors under a fraction bar are divided by."""
        above: list[Node] = []
        below: list[Node] = []
        for group in components(mono):
            inverse = self._inverse(group)
            (below if inverse is not None else above).append(inverse or self._contract(group))
        above.sort(key=lambda n: len(n.axes))
        if abs(c) != 1 or not above:
            above.insert(0, const(float(c), self.loc))
        elif c < 0:
            above[0] = self.make("neg", above[0])
        return self._quotient(above, below)

    def _quotient(self, above: list[Node], below: list[Node]) -> Node:
        node = above[0]
        for factor in above[1:]:
            node = self.make("mul", node, factor)
        for factor in below:
            node = self.make("div", node, factor)
        return node

    def _inverse(self, group: list[Factor]) -> Node | None:
        if len(group) == 1 and group[0][0].name == "pow -1" and not any(map(is_bound, group[0][1])):
            return self.node(open_atom(*group[0])[0])
        return None

    def _contract(self, group: list[Factor]) -> Node:
        """The product of factors connected by bound labels, summed over them."""
        free = {x for x in labels_of(group) if is_free(x)}
        names: dict[str, str] = {}
        for label in sorted(x for x in labels_of(group) if is_bound(x)):
            names[label] = another(dim(label), [*free, *names.values()])
        parts = [
            (self._factor(a, tuple(names.get(x, x) for x in labels)), set(labels))
            for a, labels in group
        ]
        for label, axis in names.items():
            holding = [part for part in parts if label in part[1]]
            parts = [part for part in parts if label not in part[1]]
            node = holding[0][0]
            for factor, _ in holding[1:-1]:
                node = self.make("mul", node, factor)
            if len(holding) == 1:
                node = self.make("sum", node, axis=axis)
            else:
                node = self.make("dot", node, holding[-1][0], axis=axis)
            parts.append((node, set().union(*(x for _, x in holding)) - {label}))
        return self._quotient([node for node, _ in parts], [])

    def _factor(self, a: Atom, labels: tuple[str, ...]) -> Node:
        if a.kind == "delta":
            return self.make("delta", a=labels[0], b=labels[1])
        if a.kind == "size":
            return self.make("size", axis=a.name)
        if a.kind == "const":
            return const(float(a.name), self.loc)
        if a.kind == "fn":
            return self._function(a, labels)
        if a.kind in ("opaque", "written"):
            stands = self.opaque[a.name]
            # What it is expressed by may have its axes in another order.
            return self._placed(self.express(stands), stands.axes, labels)
        return self._placed(self.inputs[a.name], self.inputs[a.name].axes, labels)

    def _placed(self, node: Node, axes: tuple[str, ...], labels: tuple[str, ...]) -> Node:
        """`node` with its `axes` named by `labels`; `N=2` takes an entry, a repeated label the diagonal."""
        names: dict[str, str] = {}
        for axis, label in zip(axes, labels, strict=True):
            if "=" in label:
                node = self.make("index", node, axis=axis, at=int(label.split("=")[1]))
            elif label in names.values():
                twin = another(label, [*node.axes, *names.values()])
                node = rename_axes(Context(self.loc, ()), node, {axis: twin})
                first = next(old for old, new in names.items() if new == label)
                node = self.make("dot", node, self.make("delta", a=first, b=twin), axis=twin)
            else:
                names[axis] = label
        return rename_axes(Context(self.loc, ()), node, names)

    def _function(self, a: Atom, labels: tuple[str, ...]) -> Node:
        args = open_atom(a, labels)
        name = a.name
        if name.startswith("pow "):
            return self._power(self.node(args[0]), Fraction(name[4:]))
        if name == "log" and args[0].get(()) == 1 and len(args[0]) > 1:
            return self.make("log1p", self.node(Poly({m: c for m, c in args[0].items() if m})))
        if name in INDICATORS:
            return self.make(name[:2], self.node(args[0]), const(0, self.loc))
        if name == "log" and (inside := the_indicator(args[0])) is not None:
            condition = self._factor(*inside)
            return self.make("where", condition, const(0, self.loc), const(-math.inf, self.loc))
        if own := reduced(name):
            labels_ = {x for mono in args[0] for x in labels_of(mono)}
            inner = next(x for x in labels_ if x.count("@") == own)
            axis = another(dim(inner), args[0].free)
            return self.make("max", self.node(relabel(args[0], {inner: axis})), axis=axis)
        return self.make(name, *(self.node(x) for x in args))

    def _power(self, base: Node, e: Fraction) -> Node:
        plain = {Fraction(1, 2): "sqrt", Fraction(-1, 2): "rsqrt", Fraction(-1): "recip"}
        if e in plain:
            return self.make(plain[e], base)
        return self.make("pow", base, const(float(e), self.loc))

    def without_states(self, p: Poly) -> Poly:
        """p with every value of a state replaced by a read."""
        grouped: dict[tuple[Factor, Monomial], Poly] = {}
        total = Poly()
        for mono, c in p.items():
            group = next((g for g in components(mono) if self._reads_by_vector(g)), None)
            if group is None:
                total = add(total, scale(self._product_without_states(mono), c))
                continue
            state = next(f for f in group if f[0].kind == "state")
            label = next(x for x in state[1] if is_bound(x))
            axis = self.state_axes[state[0].name][state[1].index(label)]
            vector = tuple(
                (a, tuple(axis if x == label else x for x in ls))
                for a, ls in group
                if (a, ls) != state
            )
            rest = tuple(f for f in mono if f not in group)
            place = (state[0], tuple("~" if x == label else x for x in state[1]))
            into = grouped.setdefault((place, rest), Poly())
            into[vector] = into.get(vector, Fraction(0)) + c
        for ((a, labels), rest), vector_ in grouped.items():
            if "~" in labels and self.state_axes[a.name][labels.index("~")] not in vector_.free:
                total = add(total, mul(vector_, self._summed_state(a, labels, rest)))
                continue
            factor, by = content(vector_)
            name = self.read(a.name, a.version, by, self.state_axes[a.name][labels.index("~")])
            read = atom("input", name, tuple(x for x in labels if x != "~"))
            total = add(total, mul(mul(factor, read), self._product_without_states(rest)))
        return total

    def _summed_state(self, a: Atom, labels: tuple[str, ...], rest: Monomial) -> Poly:
        """A state summed over an axis with nothing else there: no vector, so the whole state is read."""
        axis = self.state_axes[a.name][labels.index("~")]
        place = tuple(f"{dim(axis)}~99" if x == "~" else x for x in labels)
        return self._product_without_states(((a, place), *rest))

    def _reads_by_vector(self, group: list[Factor]) -> bool:
        """Whether this is w[K~0] S[K~0, V], where nothing but one bound axis touches the state: a vector that differs
        along an axis of the tensor, or along one that a maximum is taken of, is none.
        """
        states = [f for f in group if f[0].kind == "state"]
        others = [f for f in group if f not in states]
        if len(states) != 1:
            return False
        if any(f[0].states for f in others) and not self.read.is_last(
            states[0][0].name, states[0][0].version
        ):
            return False
        bound = [x for x in states[0][1] if is_bound(x)]
        apart = any(is_free(x) or "@" in x for x in labels_of(others))
        return len(bound) == 1 and not apart

    def _product_without_states(self, mono: Monomial) -> Poly:
        plain = [f for f in mono if not f[0].states]
        level = level_of(mono)
        product = Poly({(): Fraction(1)})
        for a, labels in (f for f in mono if f[0].states):
            if a.kind == "state":
                plain.append((Atom("input", self.read(a.name, a.version, None, "")), labels))
            elif a.kind == "fn":
                args = tuple(self.without_states(x) for x in open_atom(a, labels, level))
                product = mul(product, apply(a.name, args))
            else:
                plain.append((Atom("written", a.name), labels))
        return product_with(plain, product, level, mono)


def the_indicator(p: Poly) -> Factor | None:
    """The factor if p is one indicator: its log is 0 or -inf, and has no gradient."""
    term = single(p)
    if term is None or len(term[0]) != 1:
        return None
    atom_, labels = term[0][0]
    alone = atom_.name in INDICATORS and not any(map(is_bound, labels))
    return term[0][0] if alone else None


def _signature(p: Poly) -> tuple[str, tuple[str, ...]]:
    """The polynomial up to the names of its axes, and these names."""
    (factor,) = next(iter(close_atom("fn", "", (p,))))
    return factor[0].key, factor[1]


def _common(p: Poly) -> tuple[Monomial, Poly]:
    """Factors common to all terms, and the rest."""
    terms = list(p.items())
    common = [f for f in terms[0][0] if not any(is_bound(x) for x in f[1])]
    for mono, _ in terms[1:]:
        pool = list(mono)
        kept = []
        for f in common:
            if f in pool:
                pool.remove(f)
                kept.append(f)
        common = kept
    rest = Poly()
    for mono, c in terms:
        pool = list(mono)
        for f in common:
            pool.remove(f)
        rest[tuple(pool)] = c
    return tuple(common), rest
