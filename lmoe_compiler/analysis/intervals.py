"""The range of an expression, from declared bounds: interval arithmetic on index polynomials.

A gate's range decides which stabilised form of a decay is safe, and whether its logarithm exists.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import product

from lmoe_compiler.analysis.algebra import open_atom, reduced
from lmoe_compiler.analysis.evaluate import Evaluator
from lmoe_compiler.analysis.poly import Factor, Poly, is_bound, labels_of
from lmoe_compiler.ir.nodes import Bound, Node

Interval = tuple[float, float]
INF = math.inf
EVERYTHING = (-INF, INF)
MOST_CORNERS = 8


def interval(
    node: Node, bounds: Iterable[Bound], static: Mapping[str, int] | None = None
) -> Interval:
    """[low, high] of an expression of inputs; unknown inputs may be anything."""
    return range_of(Evaluator((), static or {}).polynomial(node), bounds)


def range_of(p: Poly, bounds: Iterable[Bound]) -> Interval:
    known = {b.name: (b.low, b.high) for b in bounds}
    return _Ranges(known).of(p)


class _Ranges:
    def __init__(self, known: Mapping[str, Interval]) -> None:
        self.known = known

    def of(self, p: Poly) -> Interval:
        plain = self._plain(p)
        corners = self._corners(p)
        return (max(plain[0], corners[0]), min(plain[1], corners[1]))

    def _plain(self, p: Poly) -> Interval:
        low = high = 0.0
        for mono, c in p.items():
            if any(is_bound(x) for x in labels_of(mono)):
                return self._sums(p)
            part: Interval = (1.0, 1.0)
            for factor, times in Counter(mono).items():
                part = _times(part, _repeated(self.factor(factor), times))
            part = _times(part, (float(c), float(c)))
            low, high = low + part[0], high + part[1]
        return EVERYTHING if math.isnan(low) or math.isnan(high) else (low, high)

    def _sums(self, p: Poly) -> Interval:
        """A sum over an axis of unknown length keeps only its sign."""
        signs = [self._sign_of_term(mono, c) for mono, c in p.items()]
        low = 0.0 if all(s[0] >= 0 for s in signs) else -INF
        return (low, 0.0 if all(s[1] <= 0 for s in signs) else INF)

    def _sign_of_term(self, mono: tuple[Factor, ...], c: Fraction) -> Interval:
        part: Interval = (1.0, 1.0)
        for factor, times in Counter(mono).items():
            part = _times(part, _repeated(self.factor(factor), times))
        return _times(part, (float(c), float(c)))

    def _corners(self, p: Poly) -> Interval:
        """Exact for a polynomial of degree one in each of a few bounded atoms: its extremes are at corners."""
        atoms = sorted({f for mono in p for f in mono}, key=lambda f: (f[0].key, f[1]))
        ranges = [self.factor(f) for f in atoms]
        multilinear = all(count == 1 for mono in p for count in Counter(mono).values())
        summed = any(is_bound(x) for mono in p for x in labels_of(mono))
        finite = all(math.isfinite(x) for r in ranges for x in r)
        if not (multilinear and finite) or summed or not 0 < len(atoms) <= MOST_CORNERS:
            return EVERYTHING
        values = []
        for corner in product(*ranges):
            at = dict(zip(atoms, corner, strict=True))
            values.append(sum(float(c) * math.prod(at[f] for f in mono) for mono, c in p.items()))
        return (min(values), max(values))

    def factor(self, factor: Factor) -> Interval:
        atom, labels = factor
        if atom.kind == "input":
            return self.known.get(atom.name, EVERYTHING)
        if atom.kind == "size":
            return (1.0, INF)
        if atom.kind == "const":
            return (float(atom.name), float(atom.name))
        if atom.kind == "delta":
            return (0.0, 1.0)
        if atom.kind != "fn":
            return EVERYTHING
        args = [self.of(p) for p in open_atom(atom, labels)]
        if atom.name.startswith("pow "):
            return _power(args[0], float(Fraction(atom.name[4:])))
        if atom.name in ("maximum", "minimum"):
            pick = max if atom.name == "maximum" else min
            return (pick(args[0][0], args[1][0]), pick(args[0][1], args[1][1]))
        if atom.name == "where":
            return (min(args[1][0], args[2][0]), max(args[1][1], args[2][1]))
        if atom.name in FIXED:
            return FIXED[atom.name]
        if reduced(atom.name):
            return args[0]
        if atom.name in MONOTONE:
            rule = MONOTONE[atom.name]
            return (rule(args[0][0]), rule(args[0][1]))
        if atom.name == "abs":
            low, high = args[0]
            return (0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)))
        return EVERYTHING


def _exp(x: float) -> float:
    return INF if x > 709 else math.exp(x)


def _sigmoid(x: float) -> float:
    return 1 / (1 + _exp(-x))


def _logsigmoid(x: float) -> float:
    if x == INF:
        return 0.0
    return -math.log1p(math.exp(-x)) if x > -30 else x


def _log(x: float) -> float:
    return -INF if x <= 0 else INF if x == INF else math.log(x)


MONOTONE: dict[str, Callable[[float], float]] = {
    "exp": _exp, "sigmoid": _sigmoid, "logsigmoid": _logsigmoid, "log": _log, "tanh": math.tanh,
    "relu": lambda x: max(x, 0.0), "erf": math.erf,
}  # fmt: skip
FIXED: dict[str, Interval] = {
    "gt0": (0.0, 1.0), "eq0": (0.0, 1.0), "isfinite": (0.0, 1.0),
    "sign": (-1.0, 1.0), "sin": (-1.0, 1.0), "cos": (-1.0, 1.0),
}  # fmt: skip


def _times(a: Interval, b: Interval) -> Interval:
    corners = [0.0 if 0 in (x, y) else x * y for x in a for y in b]
    return (min(corners), max(corners))


def _repeated(a: Interval, times: int) -> Interval:
    if times % 2:
        return _power_of(a, times)
    low, high = sorted((abs(a[0]), abs(a[1])))
    return _power_of((0.0 if a[0] < 0 < a[1] else low, high), times)


def _power_of(a: Interval, times: int) -> Interval:
    return (a[0] ** times, a[1] ** times)


def _power(a: Interval, e: float) -> Interval:
    low, high = a
    if low < 0:
        return EVERYTHING if e != int(e) or e < 0 or e % 2 else (0.0, INF)

    def at(x: float) -> float:
        if x == 0:
            return 0.0 if e > 0 else INF
        return (0.0 if e < 0 else INF) if x == INF else x**e

    return tuple(sorted((at(low), at(high))))  # type: ignore[return-value]
