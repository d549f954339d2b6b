"""Expressions (named axes) to index polynomials. What has no rule becomes an atom of its own; nothing is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

from lmoe_compiler.analysis import algebra as f
from lmoe_compiler.analysis.algebra import add, close_atom, mul, relabel, scale, sum_over
from lmoe_compiler.analysis.poly import (
    MOST_MONOMIALS,
    Atom,
    Poly,
    TooLarge,
    atom,
    constant,
    delta,
    rational,
)
from lmoe_compiler.ir.nodes import Node
from lmoe_compiler.ir.spec import base

COMPARISONS = {
    "gt": f.greater,
    "lt": lambda p, q: f.greater(q, p),
    "ge": lambda p, q: f.complement(f.greater(q, p)),
    "le": lambda p, q: f.complement(f.greater(p, q)),
    "eq": f.equal,
}
SYMMETRIC = {"maximum", "minimum"}


class Evaluator:
    """Polynomials of expressions. `states`: which inputs are states; `static`: lengths of static dims.

    Values that depend on no state are kept between calls of `evaluate`, whatever the cuts.
    """

    def __init__(self, states: Iterable[str], static: Mapping[str, int]) -> None:
        self.states = frozenset(states)
        self.static = static
        self.constant: dict[Node, Poly] = {}
        self.opaque_nodes: dict[str, Node] = {}

    def evaluate(
        self, roots: Iterable[Node], cuts: Mapping[Node, Poly] | None = None
    ) -> dict[Node, Poly]:
        """The polynomial of every node below `roots`; `cuts` are nodes taken as unknowns."""
        roots = list(roots)
        values: dict[Node, Poly] = dict(cuts or {})
        stack = _topological_until(roots, values)
        for node in stack:
            known = self.constant.get(node)
            if known is None:
                known = self._node(node, [values[a] for a in node.args])
                if not known.states:
                    self.constant[node] = known
            values[node] = known
        return values

    def polynomial(self, node: Node, cuts: Mapping[Node, Poly] | None = None) -> Poly:
        return self.evaluate([node], cuts)[node]

    def _node(self, node: Node, args: list[Poly]) -> Poly:
        try:
            p = self._rule(node, args)
        except TooLarge:
            return self.opaque(node, args)
        return p if len(p) <= MOST_MONOMIALS else self.opaque(node, args)

    def opaque(self, node: Node, args: list[Poly]) -> Poly:
        """An atom that stands for the value of this very expression (equal expressions are one atom)."""
        hidden = tuple(
            atom("state", s) for s in sorted(frozenset().union(*(p.states for p in args)))
        )
        name = f"{node.op} {hash(node)}"
        self.opaque_nodes[name] = node
        return Poly({((Atom("opaque", name, hidden), node.axes),): Fraction(1)})

    def _rule(self, node: Node, args: list[Poly]) -> Poly:
        op = node.op
        if op == "input":
            return atom("state" if node.name in self.states else "input", node.name, node.axes)
        if op == "const":
            value = float(node["value"])  # type: ignore[arg-type]
            finite = abs(value) < float("inf")
            return constant(rational(value)) if finite else atom("const", str(value))
        if op == "size":
            length = self.static.get(str(node["axis"]))
            return atom("size", str(node["axis"])) if length is None else constant(length)
        if op == "delta":
            return delta(*node.axes)
        if op in ("add", "sub"):
            return add(args[0], args[1] if op == "add" else scale(args[1], -1))
        if op == "mul":
            return mul(*args)
        if op == "div":
            return mul(args[0], f.recip(args[1]))
        if op == "cast":
            return args[0]
        if op == "rename":
            return relabel(args[0], {str(node["old"]): str(node["new"])})
        if op == "index":
            return relabel(args[0], {str(node["axis"]): f"{base(str(node['axis']))}={node['at']}"})
        if op in ("sum", "dot"):
            return self.summed(mul(*args) if op == "dot" else args[0], str(node["axis"]))
        if op == "max":
            return f.maximum_over(args[0], str(node["axis"]))
        return self._function(node, args)

    def summed(self, p: Poly, axis: str) -> Poly:
        """The sum over an axis; over a static one, entry by entry."""
        length = self.static.get(base(axis))
        if length is None:
            return sum_over(p, axis)
        return add(*(relabel(p, {axis: f"{base(axis)}={i}"}) for i in range(length)))

    def _function(self, node: Node, args: list[Poly]) -> Poly:
        op = node.op
        if op in f.UNARY:
            return f.UNARY[op](args[0])
        if op in COMPARISONS:
            return COMPARISONS[op](*args)
        if op == "pow":
            return self._power(args[0], args[1])
        if op == "where":
            c, x, y = args
            if (x.states or y.states) and not c.states:
                return add(mul(c, x), mul(f.complement(c), y))
        if op in SYMMETRIC:
            args = sorted(args, key=lambda p: p.key)
        return close_atom("fn", op, tuple(args))

    def _power(self, p: Poly, exponent: Poly) -> Poly:
        term = f.single(exponent) if exponent else ((), Fraction(0))
        if term is not None and not term[0]:
            return f.power(p, term[1])
        number = f.single(p)
        if number is not None and not number[0] and number[1] > 0:
            return f.exp(mul(exponent, f.plain("log", p)))
        if f.the_function(p, "exp") is not None or f.the_function(p, "sigmoid") is not None:
            return f.exp(mul(exponent, f.log(p)))
        return close_atom("fn", "pow", (p, exponent))


def _topological_until(roots: list[Node], known: Mapping[Node, Poly]) -> list[Node]:
    """Nodes below `roots`, operands first, not looking below `known` ones."""
    order: list[Node] = []
    seen: set[Node] = set(known)
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args) if a not in seen)
    return order
