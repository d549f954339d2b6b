"""The algebra of index polynomials: sums, products, relabelling, and functions that know the identities by which
spellings differ.

    sigmoid(-x) = 1 - sigmoid(x)      1 / (1 + exp x) = sigmoid(-x)     softplus(x) = -logsigmoid(-x)
    exp p exp q = exp(p + q)          exp(p)^c = exp(c p)               exp(logsigmoid x + r) = sigmoid(x) exp r
    x^a x^b = x^(a + b)               log(c prod f) = log c + sum log f log(1 - sigmoid x) = logsigmoid(-x)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from itertools import permutations, product

from lmoe_compiler.analysis.poly import (
    MOST_MONOMIALS,
    Atom,
    Factor,
    Monomial,
    Poly,
    TooLarge,
    apart,
    canonical,
    constant,
    dim,
    fresh,
    is_bound,
    is_free,
    labels_of,
    rational,
    renamed,
)

INDICATORS = {"gt0", "eq0"}
ONE = constant(1)
POSITIVE = {"exp", "sigmoid"}


def _collect(parts: Iterable[tuple[Poly, Fraction]]) -> Poly:
    total: dict[Monomial, Fraction] = {}
    for poly, scale_ in parts:
        for mono, c in poly.items():
            total[mono] = total.get(mono, Fraction(0)) + c * scale_
    return Poly({m: c for m, c in total.items() if c})


def add(*polys: Poly) -> Poly:
    return _collect((p, Fraction(1)) for p in polys)


def scale(p: Poly, c: Fraction | int) -> Poly:
    return Poly({m: v * c for m, v in p.items()}) if c else Poly()


def mul(p: Poly, q: Poly) -> Poly:
    if len(p) * len(q) > MOST_MONOMIALS**2:
        raise TooLarge
    pairs = product(p.items(), q.items())
    return _collect((normal(apart(a, b)), c * d) for (a, c), (b, d) in pairs)


def normal(mono: Monomial) -> Poly:
    """One product of factors in normal form."""
    factors = _without_deltas(list(mono))
    diagonal = next((f for f in factors if f[0].kind == "fn" and len(set(f[1])) < len(f[1])), None)
    if diagonal is not None:
        rest = list(factors)
        rest.remove(diagonal)
        level = level_of(factors)
        return product_with(
            rest, apply(diagonal[0].name, open_atom(*diagonal, level)), level, factors
        )
    merged = merge(factors)
    return merged if merged is not None else Poly({canonical(factors): Fraction(1)})


def _without_deltas(factors: list[Factor]) -> list[Factor]:
    while True:
        for n, (a, labels) in enumerate(factors):
            if a.kind != "delta":
                continue
            i, j = labels
            rest = factors[:n] + factors[n + 1 :]
            if i == j:
                lost = is_bound(i) and i not in labels_of(rest)
                factors = [*rest, (Atom("size", dim(i)), ())] if lost else rest
                break
            if is_bound(i) or is_bound(j):
                gone, kept = (i, j) if is_bound(i) else (j, i)
                factors = list(renamed(rest, {gone: kept}))
                break
            factors[n] = (a, tuple(sorted(labels)))
        else:
            return factors


def relabel(p: Poly, names: Mapping[str, str]) -> Poly:
    if not names:
        return p
    return _collect((normal(renamed(m, names)), c) for m, c in p.items())


def sum_over(p: Poly, label: str) -> Poly:
    """Sum over a free label; a monomial without it is multiplied by the axis's size."""
    size = ((Atom("size", dim(label)), ()),)

    def one(mono: Monomial) -> Poly:
        if label not in labels_of(mono):
            return normal(mono + size)
        return normal(renamed(mono, {label: fresh(dim(label), labels_of(mono))}))

    return _collect((one(m), c) for m, c in p.items())


def level_of(factors: Iterable[Factor]) -> int:
    """One more than the functions that have been opened around these factors."""
    return 1 + max((x.count("^") for x in labels_of(factors)), default=0)


def open_atom(a: Atom, labels: tuple[str, ...], level: int = 1) -> tuple[Poly, ...]:
    """The arguments of a function atom in terms of the labels of its factor; bound ones get carets."""
    names = {f"{dim(x)}#{i}": x.replace("~", "^" * level) for i, x in enumerate(labels)}
    return tuple(relabel(p, names) for p in a.args)


def reduced(name: str) -> int:
    """How many @ mark the axis that a `max n` reduces; 0 for other functions."""
    return int(name[4:]) if name.startswith("max ") else 0


def maximum_over(p: Poly, label: str) -> Poly:
    """The largest entry along a free label; each maximum around another has a mark of its own."""
    inner = re.findall(r"fn:max (\d+)", p.key)
    level = 1 + max(map(int, inner), default=0)
    return apply(f"max {level}", (relabel(p, {label: dim(label) + "@" * level}),))


def close_atom(kind: str, name: str, args: tuple[Poly, ...]) -> Poly:
    """A function atom of `args`: their free labels become slots, in the order that gives the least text."""
    seen = {x for p in args for mono in p for x in labels_of(mono)}
    own = reduced(name)
    free = sorted(x for x in seen if is_free(x) or ("@" in x and x.count("@") != own))
    orders: dict[str, list[tuple[str, ...]]] = {}
    closed: dict[str, tuple[Poly, ...]] = {}
    for order in permutations(free):
        slots = {x: f"{dim(x)}#{i}" for i, x in enumerate(order)}
        candidate = tuple(relabel(p, slots) for p in args)
        text = "; ".join(p.key for p in candidate)
        orders.setdefault(text, []).append(order)
        closed[text] = candidate
    least = min(orders)
    first = orders[least][0]
    same = tuple(tuple(first.index(x) for x in order) for order in orders[least])
    factor = Atom(kind, name, closed[least], symmetries=same), first
    return Poly({canonical([factor]): Fraction(1)})


def single(p: Poly) -> tuple[Monomial, Fraction] | None:
    """The monomial and coefficient of a polynomial of one term."""
    return next(iter(p.items())) if len(p) == 1 else None


def the_function(p: Poly, name: str) -> Poly | None:
    """x if p is exactly name(x) (a sum of name(x) over an axis is not)."""
    term = single(p)
    if term is None or term[1] != 1 or len(term[0]) != 1 or _is_summed(term[0]):
        return None
    atom, labels = term[0][0]
    return open_atom(atom, labels)[0] if (atom.kind, atom.name) == ("fn", name) else None


def leading_sign(p: Poly) -> int:
    return -1 if p and p.ordered()[0][1] < 0 else 1


def plain(name: str, *args: Poly) -> Poly:
    return close_atom("fn", name, args)


def exp(p: Poly) -> Poly:
    if not p:
        return ONE
    for mono, c in p.items():
        x = the_function(Poly({mono: c}), "logsigmoid")
        if x is not None:
            rest = Poly({m: v for m, v in p.items() if m != mono})
            return mul(sigmoid(x), exp(rest))
    inner = the_function(p, "log")
    return inner if inner is not None else plain("exp", p)


def sigmoid(p: Poly) -> Poly:
    if leading_sign(p) < 0:
        return add(ONE, scale(sigmoid(scale(p, -1)), -1))
    return plain("sigmoid", p)


def logsigmoid(p: Poly) -> Poly:
    return plain("logsigmoid", p)


def softplus(p: Poly) -> Poly:
    return scale(logsigmoid(scale(p, -1)), -1)


def tanh(p: Poly) -> Poly:
    return scale(plain("tanh", scale(p, -1)), -1) if leading_sign(p) < 0 else plain("tanh", p)


def recip(p: Poly) -> Poly:
    return power(p, Fraction(-1))


def sqrt(p: Poly) -> Poly:
    return power(p, Fraction(1, 2))


def rsqrt(p: Poly) -> Poly:
    return power(p, Fraction(-1, 2))


def power(p: Poly, e: Fraction) -> Poly:
    if e == 0:
        return ONE
    if e.denominator == 1 and 1 <= e <= 4:
        out = p
        for _ in range(int(e) - 1):
            out = mul(out, p)
        return out
    if e == -1 and p.get(()) == 1 and len(p) == 2:
        other = Poly({m: c for m, c in p.items() if m})
        x = the_function(other, "exp")
        if x is not None:
            return sigmoid(scale(x, -1))
    term = single(p)
    if term is None:
        return plain(f"pow {e}", p)
    mono, c = term
    if not mono:
        exact = rational(float(c) ** float(e)) if c > 0 else None
        return constant(exact) if exact is not None else plain(f"pow {e}", p)
    if _is_summed(mono):
        return plain(f"pow {e}", p)
    return _power_of_product(mono, c, e)


def _power_of_product(mono: Monomial, c: Fraction, e: Fraction) -> Poly:
    """Distribute over factors that are positive, or over all for an integer exponent; the rest stays together."""
    out, rest = ONE, []
    for factor in mono:
        atom, labels = factor
        if atom.kind == "fn" and atom.name == "exp":
            out = mul(out, exp(scale(open_atom(atom, labels)[0], e)))
        elif atom.kind == "fn" and atom.name.startswith("pow "):
            out = mul(out, power(open_atom(atom, labels)[0], e * Fraction(atom.name[4:])))
        elif e.denominator == 1 or _positive(factor):
            out = mul(out, plain(f"pow {e}", Poly({(factor,): Fraction(1)})))
        else:
            rest.append(factor)
    if c > 0:
        out, c = scale(out, rational(float(c) ** float(e))), Fraction(1)
    elif e.denominator == 1:
        out, c = scale(out, c ** int(e)), Fraction(1)
    if rest or c != 1:
        out = mul(out, plain(f"pow {e}", Poly({canonical(rest): c})))
    return out


def _is_summed(mono: Monomial) -> bool:
    return any(is_bound(x) for x in labels_of(mono))


def _positive(factor: Factor) -> bool:
    return factor[0].kind == "size" or (factor[0].kind == "fn" and factor[0].name in POSITIVE)


def log(p: Poly) -> Poly:
    inner = the_function(p, "exp")
    if inner is not None:
        return inner
    term = single(p)
    if term is not None and term[1] > 0 and not _is_summed(term[0]):
        mono, c = term
        out = constant(0) if c == 1 else plain("log", constant(c))
        for atom, labels in mono:
            out = add(out, _log_of_factor((atom, labels)))
        return out
    if p.get(()) == 1 and len(p) == 2:
        other = Poly({m: c for m, c in p.items() if m})
        x = the_function(scale(other, -1), "sigmoid")
        if x is not None:
            return logsigmoid(scale(x, -1))
        x = the_function(other, "exp")
        if x is not None:
            return softplus(x)
    return plain("log", p)


def _log_of_factor(factor: Factor) -> Poly:
    atom, labels = factor
    if atom.kind == "fn":
        if atom.name == "exp":
            return open_atom(atom, labels)[0]
        if atom.name == "sigmoid":
            return logsigmoid(open_atom(atom, labels)[0])
        if atom.name.startswith("pow "):
            return scale(log(open_atom(atom, labels)[0]), Fraction(atom.name[4:]))
    return plain("log", Poly({(factor,): Fraction(1)}))


def greater(p: Poly, q: Poly) -> Poly:
    """1 where p > q."""
    return plain("gt0", add(p, scale(q, -1)))


def equal(p: Poly, q: Poly) -> Poly:
    gap = add(p, scale(q, -1))
    return plain("eq0", scale(gap, leading_sign(gap)))


def complement(p: Poly) -> Poly:
    return add(ONE, scale(p, -1))


UNARY: dict[str, Callable[[Poly], Poly]] = {
    "neg": lambda p: scale(p, -1), "exp": exp, "log": log, "log1p": lambda p: log(add(ONE, p)),
    "sigmoid": sigmoid, "logsigmoid": logsigmoid, "softplus": softplus, "tanh": tanh,
    "sqrt": sqrt, "rsqrt": rsqrt, "recip": recip,
}  # fmt: skip


def apply(name: str, args: tuple[Poly, ...]) -> Poly:
    """A function by the name of its atom."""
    if name in UNARY:
        return UNARY[name](args[0])
    if name.startswith("pow "):
        return power(args[0], Fraction(name[4:]))
    own = reduced(name)
    if own and not any(x.count("@") == own for mono in args[0] for x in labels_of(mono)):
        return args[0]
    return close_atom("fn", name, args)


def merge(factors: list[Factor]) -> Poly | None:
    """The product of `factors` if exponentials, powers or indicators among them combine, else None."""
    exps: list[Factor] = []
    powers: list[Factor] = []
    for factor in factors:
        name = factor[0].name if factor[0].kind == "fn" else ""
        if name == "exp":
            exps.append(factor)
        elif name.startswith("pow "):
            powers.append(factor)
        elif name in INDICATORS and factors.count(factor) > 1:
            return normal((*(f for f in factors if f != factor), factor))
    if len(exps) < 2 and not powers:
        return None
    level = level_of(factors)
    if len(exps) > 1:
        total = add(*(open_atom(*f, level)[0] for f in exps))
        return product_with([f for f in factors if f not in exps], exp(total), level, factors)
    return _merge_powers(factors, powers, level)


def _merge_powers(factors: list[Factor], powers: list[Factor], level: int) -> Poly | None:
    for i, power_ in enumerate(powers):
        base, e = open_atom(*power_, level)[0], Fraction(power_[0].name[4:])
        for other in powers[i + 1 :]:
            if open_atom(*other, level)[0] == base:
                rest = _without(factors, power_, other)
                found = power(base, e + Fraction(other[0].name[4:]))
                return product_with(rest, found, level, factors)
        term = single(base)
        if term is not None and len(term[0]) == 1 and term[1] == 1 and not _is_summed(term[0]):
            plain_ = (term[0][0][0], tuple(lowered(x, level) for x in term[0][0][1]))
            if plain_ in factors:
                rest = _without(factors, power_, plain_)
                return product_with(rest, power(base, e + 1), level, factors)
    return None


def _without(factors: list[Factor], *gone: Factor) -> list[Factor]:
    rest = list(factors)
    for factor in gone:
        rest.remove(factor)
    return rest


def lowered(label: str, level: int) -> str:
    """A label from inside a function that was opened at `level`, outside of it."""
    return label.replace("^" * level, "~") if label.count("^") == level else label


def product_with(rest: Iterable[Factor], p: Poly, level: int, whole: Iterable[Factor]) -> Poly:
    """rest * p, where p came out of functions opened at `level`: its carets are bound labels of the `whole` product.

    A term of p may be without a label that the functions had, as 1 is in 1 - sigmoid(x): it is summed all the same.
    """
    rest = list(rest)
    bound = sorted(x for x in labels_of(whole) if is_bound(x))
    total = Poly()
    for mono, c in p.items():
        names = {x: lowered(x, level) for x in labels_of(mono)}
        found = labels_of(rest) | set(names.values())
        sizes = [(Atom("size", dim(x)), ()) for x in bound if x not in found]
        taken = found | set(bound)
        for x in sorted(x for x in labels_of(mono) if is_bound(x)):
            names[x] = fresh(dim(x), taken)
            taken.add(names[x])
        total = add(total, scale(normal((*rest, *sizes, *renamed(mono, names))), c))
    return total
