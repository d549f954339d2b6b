"""One micro-step's polynomial, read as decays, rank-one feedbacks and key-value writes; or why it is none of these.

S[K, V] times     scalar / K / V / K and V apart / both in one atom     decay, the last one elementwise
S[K~0, V] times   u[K] w[K~0]                                           feedback over K; over V the mirror image
no S              u[K] y[V]                                             write
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lmoe_compiler.analysis.algebra import (
    ONE,
    exp,
    level_of,
    mul,
    open_atom,
    product_with,
    relabel,
    scale,
)
from lmoe_compiler.analysis.poly import (
    Factor,
    Monomial,
    Poly,
    canonical,
    components,
    constant,
    is_bound,
    is_free,
    labels_of,
)
from lmoe_compiler.analysis.show import show_monomial


class Refused(Exception):
    """The step has no such form: `why`, and the factor of the polynomial that prevents it (None: several)."""

    def __init__(self, why: str, factor: Factor | None = None) -> None:
        super().__init__(why)
        self.why, self.factor = why, factor


@dataclass(frozen=True)
class RankOne:
    """scale key (x) (read' S) along `axis`."""

    axis: str
    key: Poly
    scale: Poly
    read: Poly
    point: Literal["before", "after"]


@dataclass(frozen=True)
class Terms:
    """One micro-step. `decay` as a whole, and as factors with separate axes."""

    decay: Poly
    decays: tuple[Poly, ...]
    feedbacks: tuple[RankOne, ...]
    writes: tuple[tuple[Poly, Poly], ...]


def classify(p: Poly, state: str, axes: tuple[str, ...]) -> Terms:
    """The terms of `p`, the next value of `state` over its axes; raises Refused."""
    decay, writes = Poly(), Poly()
    reads: dict[str, Poly] = {}
    for mono, c in p.items():
        own = [f for f in mono if f[0].kind == "state" and f[0].name == state]
        hidden = next((f for f in mono if f not in own and state in f[0].states), None)
        if hidden is not None:
            raise Refused(f"{show_monomial((hidden,))} is not linear in {state}", hidden)
        if len(own) > 1:
            raise Refused(f"{show_monomial(mono, c)} is of degree {len(own)} in {state}")
        if not own:
            writes[mono] = c
            continue
        rest = tuple(f for f in mono if f is not own[0])
        axis = _read_axis(own[0], mono, axes)
        if axis is None:
            decay[canonical(rest)] = c
        else:
            label = own[0][1][axes.index(axis)]
            opened = _renamed(rest, label, axis + "'")
            into = reads.setdefault(axis, Poly())
            into[opened] = into.get(opened, Fraction(0)) + c
    decays = _decays(decay, axes)
    feedbacks = [
        f for axis in axes if axis in reads for f in _feedbacks(reads[axis], decay, axis, axes)
    ]
    _shares_a_solve(decays, feedbacks, state)
    return Terms(decay, decays, tuple(feedbacks), tuple(_writes(writes, axes)))


def _renamed(factors: Monomial, old: str, new: str) -> Monomial:
    return canonical((a, tuple(new if x == old else x for x in labels)) for a, labels in factors)


def _read_axis(own: Factor, mono: Monomial, axes: tuple[str, ...]) -> str | None:
    """The one axis over which the state is read; None if the state stands as it is."""
    changed = [axis for axis, label in zip(axes, own[1], strict=True) if label != axis]
    if not changed:
        return None
    label = own[1][axes.index(changed[0])]
    if len(changed) == 1 and is_bound(label):
        return changed[0]
    what = show_monomial(mono)
    if all(is_bound(x) for x in own[1]):
        raise Refused(f"{what} reads the state to a single number, so tokens share no solve")
    raise Refused(f"{what} has the state's axes in another place")


def split(p: Poly, axis: str) -> list[tuple[Poly, Poly]]:
    """p as a sum of left * right, where left holds what is connected to `axis`; proportional parts are merged."""
    by_left: dict[Monomial, Poly] = {}
    for mono, c in p.ordered():
        parts = components(mono)
        left = canonical(f for part in parts if axis in labels_of(part) for f in part)
        right = canonical(f for part in parts if axis not in labels_of(part) for f in part)
        by_left.setdefault(left, Poly())[right] = c
    pairs: list[tuple[Poly, Poly]] = []
    for left, rights in by_left.items():
        for known, other in pairs:
            ratio = _ratio(rights, other)
            if ratio is not None:
                known[left] = ratio
                break
        else:
            pairs.append((Poly({left: Fraction(1)}), rights))
    return pairs


def _ratio(p: Poly, q: Poly) -> Fraction | None:
    if set(p) != set(q):
        return None
    ratios = {p[m] / q[m] for m in p}
    return ratios.pop() if len(ratios) == 1 else None


def content(p: Poly) -> tuple[Poly, Poly]:
    """(c, rest) with p = c rest: c the leading coefficient and the factors without axes common to all terms."""
    ordered = p.ordered()
    common: Counter[Monomial] | None = None
    for mono, _ in ordered:
        mine = Counter(
            canonical(g) for g in components(mono) if not any(map(is_free, labels_of(g)))
        )
        common = mine if common is None else common & mine
    assert common is not None
    lead = ordered[0][1]
    rest = Poly()
    for mono, c in ordered:
        left, kept = Counter(common), []
        for group in components(mono):
            name = canonical(group)
            if left[name] > 0:
                left[name] -= 1
            else:
                kept.extend(group)
        rest[canonical(kept)] = c / lead
    factor = constant(lead)
    for shared in common.elements():
        factor = mul(factor, Poly({shared: Fraction(1)}))
    return factor, rest


def _decays(decay: Poly, axes: tuple[str, ...]) -> tuple[Poly, ...]:
    if decay == ONE:
        return ()
    used = [axis for axis in axes if axis in decay.free]
    if len(used) == 2:
        pairs = split(decay, used[0])
        if len(pairs) == 1 and used[1] not in pairs[0][0].free:
            return pairs[0]
    return (decay,)


def _feedbacks(p: Poly, decay: Poly, axis: str, axes: tuple[str, ...]) -> list[RankOne]:
    """Terms u[K] w[K'] of S read over K' = axis', as rank-one updates; after the decay where w contains it."""
    other = axis + "'"
    for mono in p:
        for group in components(mono):
            labels = labels_of(group)
            if axis in labels and other in labels:
                text = show_monomial(tuple(group))
                raise Refused(f"{text} is a dense matrix over {axis}, not of rank one", group[0])
    found = []
    for key, read in _smaller(split(p, axis), [(b, a) for a, b in split(p, other)]):
        point: Literal["before", "after"] = "after"
        if decay != ONE:
            rest = divide(read, relabel(decay, {axis: other})) if decay else None
            point, read = ("before", read) if rest is None else ("after", rest)
        for q, allowed in ((read, other), (key, axis)):
            _only(q, allowed, axis)
        scale_key, key = content(key)
        scale_read, read = content(read)
        read = relabel(read, {other: axis})
        found.append(RankOne(axis, key, mul(scale_key, scale_read), read, point))
    return sorted(found, key=lambda f: f.key.key)


def _smaller(one: list[tuple[Poly, Poly]], two: list[tuple[Poly, Poly]]) -> list[tuple[Poly, Poly]]:
    return one if len(one) <= len(two) else two


def _only(p: Poly, allowed: str, axis: str) -> None:
    for mono in p:
        for factor in mono:
            extra = [x for x in factor[1] if is_free(x) and x != allowed]
            if extra:
                text = show_monomial((factor,))
                raise Refused(
                    f"{text} makes the feedback over {axis} differ along {extra[0]}: no shared solve",
                    factor,
                )


def _shares_a_solve(decays: tuple[Poly, ...], feedbacks: list[RankOne], state: str) -> None:
    along = {axis for decay in decays for axis in decay.free}
    for feedback in feedbacks:
        if along - {feedback.axis}:
            axis = sorted(along - {feedback.axis})[0]
            factor = next(f for d in decays for m in d for f in m if axis in f[1])
            raise Refused(
                f"{state} decays along {axis} and is fed back along {feedback.axis}: no shared solve",
                factor,
            )


def _writes(p: Poly, axes: tuple[str, ...]) -> list[tuple[Poly, Poly]]:
    if not p:
        return []
    if len(axes) < 2:
        return [(p, ONE)]
    apart, together = Poly(), Poly()
    for mono, c in p.items():
        mixed = any(len(labels_of(g) & set(axes)) > 1 for g in components(mono))
        (together if mixed else apart)[mono] = c
    pairs = [(together, ONE)] if together else []
    for key, value in split(apart, axes[0]):
        factor, key = content(key)
        pairs.append((key, mul(factor, value)))
    return sorted(pairs, key=lambda pair: pair[0].key)


def divide(p: Poly, q: Poly) -> Poly | None:
    """p / q if q divides p exactly, term by term from the leading ones; exp(a + b) / exp(a) = exp(b)."""
    lead, lead_c = max(q.items(), key=lambda item: _order(item[0]))
    rest, out = p, Poly()
    for _ in range(4 * len(p) + 4):
        if not rest:
            return out
        quotient = None
        for mono, c in sorted(rest.items(), key=lambda item: _order(item[0]), reverse=True):
            quotient = _divide_monomial(mono, lead)
            if quotient is not None:
                quotient = scale(quotient, c / lead_c)
                break
        if quotient is None:
            return None
        out = Poly(_sum(out, quotient))
        rest = Poly(_sum(rest, scale(mul(quotient, q), -1)))
    return None


def _sum(p: Poly, q: Poly) -> dict[Monomial, Fraction]:
    total = {m: p.get(m, Fraction(0)) + q.get(m, Fraction(0)) for m in {**p, **q}}
    return {m: c for m, c in total.items() if c}


def _order(mono: Monomial) -> tuple[int, str]:
    return len(mono), " ".join(f"{a.key}{labels}" for a, labels in mono)


def _divide_monomial(mono: Monomial, by: Monomial) -> Poly | None:
    left, level = list(mono), level_of((*mono, *by))
    out = ONE
    for factor in by:
        if factor in left:
            left.remove(factor)
            continue
        if factor[0].name != "exp" or factor[0].kind != "fn":
            return None
        wanted = open_atom(*factor, level)[0]
        for candidate in left:
            if candidate[0].kind == "fn" and candidate[0].name == "exp":
                rest = _without_exponent(open_atom(*candidate, level)[0], wanted)
                if rest is not None:
                    left.remove(candidate)
                    out = mul(out, rest)
                    break
        else:
            return None
    return product_with(left, out, level, left)


def _without_exponent(have: Poly, wanted: Poly) -> Poly | None:
    """exp(have - wanted) if every term of `wanted` is contained in `have`."""
    if any(have.get(m, Fraction(0)) / c < 1 for m, c in wanted.items()):
        return None
    return exp(Poly(_sum(have, scale(wanted, -1))))
