"""Index polynomials: the normal form in which two spellings of one tensor cannot differ.

A tensor is a sum of monomials; a monomial is a rational coefficient times a product of factors; a factor is an atom
with one label for each of its axes: `k[K] S[K~0, V] w[K~0]`. Labels are strings that start with their dim:
    K   K'     a free label: an axis of the tensor
    K~0        bound: summed over
    K#0        a slot: the place of an argument's axis inside a function atom
    K^0        a bound label of the enclosing monomial, while a function atom is being opened
    K@         the axis that a `max` atom reduces
    N=2        the entry 2 of a static axis
Transposition, broadcasting, outer, einsum, matmul and diag are all: multiply, relabel, sum over a label.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import permutations, product

MOST_MONOMIALS = 256


class TooLarge(Exception):
    """A polynomial grew past MOST_MONOMIALS; its value is used as it is, unexpanded."""


@dataclass(frozen=True, eq=False)
class Atom:
    """What a factor is made of.

    kind: input | state | delta | size | fn | opaque.  name: the input, the function, ...
    args: of a function, polynomials over slots.  version: of a state, how many micro-steps it has seen.
    """

    kind: str
    name: str = ""
    args: tuple[Poly, ...] = ()
    version: int = 0
    key: str = field(init=False)
    states: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        inner = "; ".join(p.key for p in self.args)
        version = f"@{self.version}" if self.version else ""
        object.__setattr__(self, "key", f"{self.kind}:{self.name}{version}({inner})")
        own = frozenset({self.name} if self.kind == "state" else ())
        object.__setattr__(self, "states", own.union(*(p.states for p in self.args)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Atom) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


Factor = tuple[Atom, tuple[str, ...]]
Monomial = tuple[Factor, ...]
DELTA = Atom("delta")


class Poly(dict[Monomial, Fraction]):
    """Monomial -> coefficient, never zero. Treated as immutable once built."""

    @cached_property
    def key(self) -> str:
        return " + ".join(sorted(f"{c} {_text(m)}" for m, c in self.items()))

    @cached_property
    def states(self) -> frozenset[str]:
        """States that appear anywhere, inside functions too."""
        return frozenset().union(*(atom.states for m in self for atom, _ in m))

    @property
    def free(self) -> list[str]:
        """The axes that appear."""
        return sorted({x for m in self for _, labels in m for x in labels if is_free(x)})

    def ordered(self) -> list[tuple[Monomial, Fraction]]:
        return sorted(self.items(), key=lambda item: _text(item[0]))


def _text(mono: Monomial) -> str:
    return " ".join(f"{atom.key}[{','.join(labels)}]" for atom, labels in mono)


def _factor_key(factor: Factor) -> tuple[str, tuple[str, ...]]:
    return factor[0].key, factor[1]


def dim(label: str) -> str:
    for i, ch in enumerate(label):
        if ch in "'~#^@=":
            return label[:i]
    return label


def is_bound(label: str) -> bool:
    return "~" in label


def is_free(label: str) -> bool:
    return not any(ch in label for ch in "~@=")


def labels_of(factors: Iterable[Factor]) -> set[str]:
    return {x for _, labels in factors for x in labels}


def constant(value: Fraction | int) -> Poly:
    return Poly({(): Fraction(value)}) if value else Poly()


def rational(value: float) -> Fraction:
    """The fraction that a float was meant as: 1/3, 1e-6 or 0.1 exactly."""
    short = Fraction(value).limit_denominator(10**6)
    return short if float(short) == value else Fraction(repr(value))


def atom(kind: str, name: str = "", axes: tuple[str, ...] = (), version: int = 0) -> Poly:
    return Poly({((Atom(kind, name, version=version), axes),): Fraction(1)})


def delta(a: str, b: str) -> Poly:
    return Poly({((DELTA, tuple(sorted((a, b)))),): Fraction(1)})


def _collect(parts: Iterable[tuple[Poly, Fraction]]) -> Poly:
    total: dict[Monomial, Fraction] = {}
    for poly, scale_ in parts:
        for mono, c in poly.items():
            total[mono] = total.get(mono, Fraction(0)) + c * scale_
    if len(total) > MOST_MONOMIALS:
        raise TooLarge
    return Poly({m: c for m, c in total.items() if c})


def add(*polys: Poly) -> Poly:
    return _collect((p, Fraction(1)) for p in polys)


def scale(p: Poly, c: Fraction | int) -> Poly:
    return Poly({m: v * c for m, v in p.items()}) if c else Poly()


def mul(p: Poly, q: Poly) -> Poly:
    if len(p) * len(q) > 16 * MOST_MONOMIALS:
        raise TooLarge
    pairs = product(p.items(), q.items())
    return _collect((normal(_apart(a, b)), c * d) for (a, c), (b, d) in pairs)


def _apart(a: Monomial, b: Monomial) -> Monomial:
    """The factors of both, with b's bound labels renamed clear of a's."""
    taken = {x for x in labels_of(a) if is_bound(x)}
    names: dict[str, str] = {}
    for x in sorted(labels_of(b)):
        if is_bound(x):
            names[x] = _fresh(dim(x), taken)
            taken.add(names[x])
    return a + _rename(b, names)


def _fresh(of: str, taken: Iterable[str]) -> str:
    i = 0
    while f"{of}~{i}" in taken:
        i += 1
    return f"{of}~{i}"


def _rename(mono: Iterable[Factor], names: Mapping[str, str]) -> Monomial:
    return tuple((a, tuple(names.get(x, x) for x in labels)) for a, labels in mono)


def relabel(p: Poly, names: Mapping[str, str]) -> Poly:
    if not names:
        return p
    return _collect((normal(_rename(m, names)), c) for m, c in p.items())


def sum_over(p: Poly, label: str) -> Poly:
    """Sum over a free label; a monomial without it is multiplied by the axis's size."""
    size = ((Atom("size", dim(label)), ()),)

    def one(mono: Monomial) -> Poly:
        if label not in labels_of(mono):
            return normal(mono + size)
        return normal(_rename(mono, {label: _fresh(dim(label), labels_of(mono))}))

    return _collect((one(m), c) for m, c in p.items())


def normal(mono: Monomial) -> Poly:
    """One product of factors in normal form (functions.py merges exponentials and powers)."""
    from lmoe_compiler.analysis.functions import merge

    factors = _without_deltas(list(mono))
    merged = merge(factors)
    return merged if merged is not None else Poly({canonical(factors): Fraction(1)})


def _without_deltas(factors: list[Factor]) -> list[Factor]:
    while True:
        for n, (a, labels) in enumerate(factors):
            if a is not DELTA and a.kind != "delta":
                continue
            i, j = labels
            rest = factors[:n] + factors[n + 1 :]
            if i == j:
                lost = is_bound(i) and i not in labels_of(rest)
                factors = [*rest, (Atom("size", dim(i)), ())] if lost else rest
                break
            if is_bound(i) or is_bound(j):
                gone, kept = (i, j) if is_bound(i) else (j, i)
                factors = list(_rename(rest, {gone: kept}))
                break
            factors[n] = (a, tuple(sorted(labels)))
        else:
            return factors


def canonical(factors: Iterable[Factor]) -> Monomial:
    """Sorted, with bound labels numbered so that the text is least."""
    factors = list(factors)
    bound = {x for x in labels_of(factors) if is_bound(x)}
    if not bound:
        return tuple(sorted(factors, key=_factor_key))
    return min((_numbered(factors, order) for order in _orders(factors, bound)), key=_text)


def _orders(factors: list[Factor], bound: set[str]) -> Iterable[list[str]]:
    """Orders of the bound labels: by where each occurs; only ties are permuted."""

    def places(x: str) -> str:
        at = [(a.key, i) for a, labels in factors for i, y in enumerate(labels) if y == x]
        return dim(x) + str(sorted(at))

    groups: dict[str, list[str]] = {}
    for x in sorted(bound):
        groups.setdefault(places(x), []).append(x)
    choices = [list(permutations(groups[p])) for p in sorted(groups)]
    return [[x for part in choice for x in part] for choice in product(*choices)]


def _numbered(factors: list[Factor], order: list[str]) -> Monomial:
    names = {x: f"{dim(x)}~{i}" for i, x in enumerate(order)}
    return tuple(sorted(_rename(factors, names), key=_factor_key))


def open_atom(a: Atom, labels: tuple[str, ...]) -> tuple[Poly, ...]:
    """The arguments of a function atom in terms of the labels of its factor."""
    names = {f"{dim(x)}#{i}": x.replace("~", "^") for i, x in enumerate(labels)}
    return tuple(relabel(p, names) for p in a.args)


def close_atom(kind: str, name: str, args: tuple[Poly, ...]) -> Poly:
    """A function atom of `args`: their free labels become slots, in the order that gives the least text."""
    free = sorted({x for p in args for x in p.free})
    best: tuple[str, tuple[str, ...], tuple[Poly, ...]] | None = None
    for order in permutations(free):
        slots = {x: f"{dim(x)}#{i}" for i, x in enumerate(order)}
        closed = tuple(relabel(p, slots) for p in args)
        text = "; ".join(p.key for p in closed)
        if best is None or text < best[0]:
            best = text, order, closed
    assert best is not None
    factor = Atom(kind, name, best[2]), tuple(x.replace("^", "~") for x in best[1])
    return Poly({(factor,): Fraction(1)})


def components(
    factors: Iterable[Factor], without: frozenset[str] = frozenset()
) -> list[list[Factor]]:
    """Groups of factors connected by bound labels (those in `without` connect nothing)."""
    groups: list[tuple[set[str], list[Factor]]] = []
    for factor in factors:
        mine = {x for x in factor[1] if is_bound(x)} - without
        near = [g for g in groups if g[0] & mine]
        merged = (mine.union(*(g[0] for g in near)), [f for g in near for f in g[1]] + [factor])
        groups = [g for g in groups if all(g is not n for n in near)] + [merged]
    return [g[1] for g in groups]


def show(p: Poly) -> str:
    """For people: `exp(g) S[K, V] - b k[K] k[i] S[i, V]`."""
    return " + ".join(show_monomial(m, c) for m, c in p.ordered()).replace("+ -", "- ") or "0"


def show_monomial(mono: Monomial, c: Fraction = Fraction(1)) -> str:
    parts = []
    for a, labels in mono:
        if a.kind == "fn":
            inner = ", ".join(show(p) for p in open_atom(a, labels))
            parts.append(f"{a.name}({inner})")
        else:
            names = ", ".join(
                x.replace("~0", "_i").replace("~", "_").replace("^", "_") for x in labels
            )
            parts.append((a.name or "delta") + (f"[{names}]" if names else ""))
    sign = "" if c == 1 and parts else "-" if c == -1 and parts else f"{float(c):g} "
    return sign + " ".join(parts)
