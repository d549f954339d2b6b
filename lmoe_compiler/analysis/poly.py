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
from math import factorial, prod

MOST_MONOMIALS = 64
MOST_ORDERS = 720


class TooLarge(Exception):
    """A product would grow far past MOST_MONOMIALS, or too many of its labels are alike; it is left unexpanded."""


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
    # Of a function: orders of its slots that mean the same (of exp(x[i] y[j]) only one, of exp(x[i] x[j]) two).
    symmetries: tuple[tuple[int, ...], ...] = ()
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


def apart(a: Monomial, b: Monomial) -> Monomial:
    """The factors of both, with b's bound labels renamed clear of a's."""
    taken = {x for x in labels_of(a) if is_bound(x)}
    names: dict[str, str] = {}
    for x in sorted(labels_of(b)):
        if is_bound(x):
            names[x] = fresh(dim(x), taken)
            taken.add(names[x])
    return a + renamed(b, names)


def fresh(of: str, taken: Iterable[str]) -> str:
    i = 0
    while f"{of}~{i}" in taken:
        i += 1
    return f"{of}~{i}"


def renamed(mono: Iterable[Factor], names: Mapping[str, str]) -> Monomial:
    return tuple((a, tuple(names.get(x, x) for x in labels)) for a, labels in mono)


def _least(factor: Factor) -> Factor:
    """The factor with its labels in the least of the orders that mean the same."""
    a, labels = factor
    if len(a.symmetries) < 2:
        return factor
    return a, min(tuple(labels[i] for i in order) for order in a.symmetries)


def canonical(factors: Iterable[Factor]) -> Monomial:
    """Sorted, with bound labels numbered by what they connect, whatever they were called.

    Each group of connected factors is numbered on its own, so equal groups, of which a mean over an axis makes
    many, need no trying of orders.
    """
    factors = [_least(f) for f in factors]
    if not any(is_bound(x) for x in labels_of(factors)):
        return tuple(sorted(factors, key=_factor_key))
    taken: dict[str, int] = {}
    out: list[Factor] = []
    for group in sorted(map(_numbered, components(factors)), key=_text):
        names = {}
        for x in sorted(x for x in labels_of(group) if is_bound(x)):
            names[x] = f"{dim(x)}~{taken.setdefault(dim(x), 0)}"
            taken[dim(x)] += 1
        out += renamed(group, names)
    return tuple(sorted(map(_least, out), key=_factor_key))


def _numbered(group: list[Factor]) -> Monomial:
    """One connected group with its bound labels numbered from 0, so that the text is least."""
    found = []
    for order in _orders(group):
        names = {x: f"{dim(x)}~{i}" for i, x in enumerate(order)}
        found.append(tuple(sorted(map(_least, renamed(group, names)), key=_factor_key)))
    return min(found, key=_text)


def _orders(group: list[Factor]) -> list[list[str]]:
    """Orders of the bound labels: by where each occurs and beside what; only ties are permuted."""
    places = {x: 0 for x in sorted(labels_of(group)) if is_bound(x)}
    known = 0
    while known < len(places) and known != (known := len(set(places.values()))):
        texts = {x: f"{dim(x)} {at} {_surroundings(group, x, places)}" for x, at in places.items()}
        ranks = {text: i for i, text in enumerate(sorted(set(texts.values())))}
        places = {x: ranks[text] for x, text in texts.items()}
    ties = [[x for x in places if places[x] == i] for i in sorted(set(places.values()))]
    if prod(factorial(len(tie)) for tie in ties) > MOST_ORDERS:
        raise TooLarge
    return [[x for part in choice for x in part] for choice in product(*map(permutations, ties))]


def _surroundings(group: list[Factor], label: str, places: Mapping[str, int]) -> list[str]:
    """The factors that `label` occurs in, with what is known of the other labels there."""

    def seen(factor: Factor) -> str:
        a, labels = factor
        marks = ["*" if x == label else f"~{places[x]}" if x in places else x for x in labels]
        same = a.symmetries or (tuple(range(len(marks))),)
        return a.key + str(min([marks[i] for i in order] for order in same))

    return sorted(seen(f) for f in group if label in f[1])


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
