"""Tile pass: what a kernel stores of chunks whose decays are all near, without levels.

One level covers such a chunk, with rows and columns scaled from its start. Level sums are plain expressions then, and
all running sums of a gradient to the gates become one:

    pairs       x                    the pairs s < t of x
    level_sums  g, of a row          G, the running sum of g (less g if exclusive); of a column -G
    level_sign                       -1
    level_gather  x, to rows         sums of the rows of x from each on (less x if exclusive); to columns their negative

Terms of such a sum that are made of scaled rows get these `rounded`: as products take them.

Before: partition.py's kernels. The chunks whose decays are not near are left to a kernel with all levels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace

from lmoe_compiler.codegen.plan import Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import bare, factors_of, merge_running, merge_sums, terms_of
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node


def near_form(
    stores: Sequence[Store], cut: Mapping[Node, Value], exact: bool, full: bool
) -> tuple[Store, ...]:
    """The same values, right where log decays sum up to little; what they load of `cut` stays as it is.

    `exact` keeps sums over rows apart, as `to_tiles` does; `full`: products do not round what is computed.
    """
    build, done = Builder(), dict[Node, Node]()
    nodes = closure([s.node for s in stores], cut)
    loaded = {n: n for n in nodes if n in cut}
    for node in nodes:
        new = node if node in cut else _near(build, node, [done[a] for a in node.args], exact)
        done[node] = loaded.get(new, new)
    roots = [done[s.node] for s in stores]
    if not exact:
        roots = merge_sums(build, roots, closure(roots, loaded), loaded, merge_running)
        roots = roots if full else as_multiplied(build, roots, loaded)
    # What tells whether a chunk is near has to be there.
    running = {n.args[0] for n in closure(roots, loaded) if is_running(n)}
    assert running >= {done[n.args[0]] for n in nodes if n.op == "level_sums" and n not in cut}
    return tuple([replace(s, node=root) for s, root in zip(stores, roots, strict=True)])


def as_multiplied(build: Builder, roots: Sequence[Node], loaded: Mapping[Node, Node]) -> list[Node]:
    """The roots, with terms of sums over rows made of scaled rows as products take these: rounded.

    A gate's gradient is such a sum: of pairs whose rows both come after it there is a term for the row and one for the
    column, which cancel if they are made of the same numbers, and only then. Where several scaled rows are in a term,
    it takes those of most factors.
    """
    nodes = closure(roots, loaded)
    pairs = {n for n in nodes if n.op == "dot" and n["axis"] in (ROW, SOURCE) and n not in loaded}
    operands = dict.fromkeys(bare(a) for n in nodes if n in pairs for a in n.args)
    scaled = {a: Counter(_factors(a, loaded)) for a in operands if a.op == "mul"}
    summed = [n for n in nodes if n.op in ("prefix", "sum") and n not in loaded]
    terms = {t for n in summed for _, t in terms_of(n.args[0], 1, loaded)}
    done: dict[Node, Node] = dict(loaded)
    for node in closure([*scaled, *roots], loaded):
        if node in loaded:
            continue
        args = [done[a] for a in node.args]
        done[node] = build.make(node.op, *args, like=node, **dict(node.attrs))
        own = Counter(factors_of(node, loaded)) if node in terms else Counter()
        inside = [a for a in scaled if scaled[a] <= own and _of_pairs(own - scaled[a], pairs)]
        if inside:
            rows = max(inside, key=lambda a: scaled[a].total())
            rest = [done[f] for f in (own - scaled[rows]).elements()]
            done[node] = build.product([build.make("rounded", done[rows], like=node), *rest])
    return [done[root] for root in roots]


def _factors(product: Node, loaded: Container[Node]) -> list[Node]:
    """Those of a product, though it may be loaded itself."""
    return [f for x in product.args for f in factors_of(x, loaded)]


def _of_pairs(factors: Iterable[Node], pairs: Container[Node]) -> bool:
    return any(bare(f) in pairs for f in factors)


def is_running(node: Node) -> bool:
    """Whether a node is a running sum of log decays that are vectors, as levels are for: how far these get from 0 tells
    which chunks are near.
    """
    summed = node.op == "prefix" and bool(node["inclusive"]) and node.args[0].op == "floor"
    return summed and len(node.axes) == 2


def _near(build: Builder, node: Node, args: list[Node], exact: bool) -> Node:
    if node.op == "level_sum":
        return args[0]
    if node.op == "pairs":
        return build.make("causal", *args, like=node, strict=True)
    if node.op == "mul" and any(a.op == "level_sign" for a in node.args):
        (other,) = [x for x, a in zip(args, node.args, strict=True) if a.op != "level_sign"]
        return build.make("neg", other, like=node)
    if node.op not in ("level_sums", "level_gather"):
        return build.make(node.op, *args, like=node, **dict(node.attrs))
    (x,) = args
    rest = node["exclusive"] and node["of"] == "row"
    if node.op == "level_sums":
        total = build.make("prefix", x, like=node, inclusive=True)
    elif exact:
        total = build.make("suffix", x, like=node, inclusive=True)
    else:
        before = build.make("prefix", x, like=node, inclusive=True)
        total = build.make("sub", build.make("sum", x, like=node, axis=ROW), before)
        total = total if rest else build.make("add", total, x)
        rest = False
    if node["of"] == "col":
        return build.make("neg", total)
    return build.make("sub", total, x) if rest else total
