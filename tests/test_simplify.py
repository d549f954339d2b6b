"""Rules of tile graphs that merge sums: the same value, with fewer sums over levels and running sums."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import merge_levels, merge_running, merge_sums
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.ir.nodes import Node, input_, topological

LEVELS, ROWS = 3, 4
LEAVES = [input_(name, ("t", "K")) for name in "abcd"]
KINDS = [(e, of) for e in (False, True) for of in ("row", "col")]
signs = st.sampled_from(["add", "sub"])


def value(node: Node) -> torch.Tensor:
    """[levels, rows]: leaves differ from level to level; a gather is some linear map of its kind and level."""
    torch.manual_seed(0)
    leaves = {leaf: torch.randn(LEVELS, ROWS, dtype=torch.float64) for leaf in LEAVES}
    maps = {kind: torch.randn(LEVELS, ROWS, ROWS, dtype=torch.float64) for kind in KINDS}
    done: dict[Node, torch.Tensor] = {}
    for n in topological([node]):
        args = [done[a] for a in n.args]
        if n.op == "input":
            done[n] = leaves[n]
        elif n.op == "level_gather":
            matrix = maps[bool(n["exclusive"]), str(n["of"])]
            done[n] = (matrix @ args[0].unsqueeze(-1)).squeeze(-1)
        elif n.op == "level_sum":
            done[n] = args[0].sum(0, keepdim=True).expand(LEVELS, ROWS)
        elif n.op == "prefix":
            done[n] = args[0].cumsum(1)
        elif n.op == "neg":
            done[n] = -args[0]
        else:
            done[n] = args[0] + args[1] if n.op == "add" else args[0] - args[1]
    return done[node]


@st.composite
def sums_over_levels(draw) -> Node:
    """+- level_sum(+- gather +- gather ..) +- .. +- a leaf, with leaves negated here and there."""
    build = Builder()

    def leaf() -> Node:
        x = draw(st.sampled_from(LEAVES))
        return build.make("neg", x) if draw(st.booleans()) else x

    def level_sum() -> Node:
        total = None
        for _ in range(draw(st.integers(1, 3))):
            exclusive, of = draw(st.sampled_from(KINDS))
            term = build.make("level_gather", leaf(), exclusive=exclusive, of=of)
            term = draw(st.sampled_from([term, leaf()]))
            total = term if total is None else build.make(draw(signs), total, term)
        return build.make("level_sum", total)

    total = level_sum()
    for _ in range(draw(st.integers(0, 3))):
        term = level_sum() if draw(st.booleans()) else leaf()
        total = build.make(draw(signs), total, term)
        total = build.make("neg", total) if draw(st.booleans()) else total
    return total


@settings(deadline=None)
@given(sums_over_levels())
def test_sums_over_levels_become_one(root):
    merged = merge_levels(Builder(), root)
    torch.testing.assert_close(value(merged), value(root))
    nodes = list(topological([merged]))
    assert sum(n.op == "level_sum" for n in nodes) == 1
    before = [n for n in topological([root]) if n.op == "level_gather"]
    gathers = [n for n in nodes if n.op == "level_gather"]
    if sum(n.op == "level_sum" for n in topological([root])) > 1:
        assert len(gathers) == len({n.attrs for n in before})


@settings(deadline=None)
@given(st.lists(st.tuples(signs, st.sampled_from(LEAVES), st.booleans()), min_size=1, max_size=5))
def test_running_sums_become_one(drawn):
    build = Builder()
    root = LEAVES[0]
    for op, leaf, running in drawn:
        term = build.make("prefix", leaf, inclusive=True) if running else leaf
        root = build.make(op, root, term)
    merged = merge_running(build, root)
    torch.testing.assert_close(value(merged), value(root))
    # Two that are one node are two terms.
    assert sum(n.op == "prefix" for n in topological([merged])) <= 1


def test_loaded_values_stay_terms_of_their_own():
    build = Builder()
    own, loaded = (build.make("level_sum", x) for x in LEAVES[:2])
    total = build.make("add", own, loaded)
    cut = {loaded: loaded}
    (found,) = merge_sums(build, [total], closure([total], cut), cut, merge_levels)
    kept = [n for n in topological([found]) if n.op == "level_sum"]
    assert set(kept) == {own, loaded}
