"""Index polynomials for people: `exp(g) S[K, V] - b k[K] k[K_i] S[K_i, V]`."""

from __future__ import annotations

from fractions import Fraction

from lmoe_compiler.analysis.algebra import open_atom
from lmoe_compiler.analysis.poly import Monomial, Poly


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
