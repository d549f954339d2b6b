"""Places in the workspace of a call: what is there at the same time lies apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.workspace import WORKSPACE, Alive, places
from lmoe_compiler.models import RECURRENCES

pytest.importorskip("triton")
interval = st.tuples(st.integers(0, 6), st.integers(0, 3))
values = st.lists(st.tuples(st.integers(0, 9), interval, interval), max_size=9)


def alive(kernels: tuple[int, int], depths: tuple[int, int]) -> Alive:
    (first, more), (shallow, deeper) = kernels, depths
    return Alive(first, first + more, shallow, shallow + deeper)


def together(a: Alive, b: Alive) -> bool:
    """By a common kernel, or a common depth."""
    kernels, depths = ((range(x[i], x[i + 1] + 1) for x in (a, b)) for i in (0, 2))
    return any(set.intersection(*map(set, pair)) for pair in (kernels, depths))


@settings(deadline=None)
@given(values)
def test_values_needed_together_do_not_overlap(drawn):
    sizes = [size for size, *_ in drawn]
    needed = [alive(*when) for _, *when in drawn]
    found = [at for _, at in places(sizes, needed)]
    spans = list(zip(found, sizes, needed, strict=True))
    for i, (at, size, when) in enumerate(spans):
        assert at >= 0
        for other, extent, then in spans[:i]:
            assert not together(when, then) or at + size <= other or other + extent <= at
    # No larger than everything side by side, and no smaller than what any kernel needs.
    top = max((at + size for at, size, _ in spans), default=0)
    pairs = list(zip(sizes, needed, strict=True))
    most = max(sum(s for s, a in pairs if a.first <= t <= a.last) for t in range(10))
    assert most <= top <= sum(sizes)


@settings(deadline=None)
@given(values, st.lists(st.tuples(st.integers(0, 20), interval), max_size=3))
def test_rooms_are_left_before_they_are_taken(drawn, rooms):
    sizes = [size for size, *_ in drawn]
    needed = [alive(*when) for _, *when in drawn]
    free = [(size, Alive(kernel, inf, depth, inf)) for size, (kernel, depth) in rooms]
    found = places(sizes, needed, free)
    for i, ((room, at), size, when) in enumerate(zip(found, sizes, needed, strict=True)):
        if room != WORKSPACE:
            assert at + size <= rooms[room][0]
            assert when.last < rooms[room][1][0]
            assert when.deep < rooms[room][1][1]
        for (other, start), extent, then in zip(found[:i], sizes, needed, strict=False):
            apart = at + size <= start or start + extent <= at
            assert other != room or not together(when, then) or apart


def test_what_is_done_with_lies_in_results_that_come_later():
    """GLA in one section: rows scaled by decays, and pairs, where gradients of queries, keys and gates will be."""
    request = request_of(RECURRENCES["gla"].program(), "backward", (8, 1024, 8, 64))
    executable = request.make(request.choice())
    assert not executable.plan.choice.section
    prepared = executable.prepare(request.extent)
    names = [*executable.given, *(m.name for m in prepared.own)]
    inside = {
        m.name: names[slot]
        for m, (slot, _) in zip(prepared.shared, prepared.places, strict=True)
        if slot != WORKSPACE
    }
    assert set(inside.values()) <= {"dq", "dk", "dv", "dg"}
    last = {n: i for i, one in enumerate(executable.launchers) for n in one.names}
    first = {n: i for i, one in reversed([*enumerate(executable.launchers)]) for n in one.names}
    assert len(inside) >= 3
    assert all(last[name] < first[result] for name, result in inside.items())
    assert prepared.bytes <= 36 * 2**20


@pytest.mark.parametrize("varlen", [False, True])
def test_a_backward_reuses_what_it_no_longer_needs(varlen):
    """KDA: what its products leave lies where its factors were; zeros of packed documents are first and kept."""
    request = request_of(RECURRENCES["kda"].program(), "backward", (1, 2048, 4, 128))
    request = replace(request, documents=3 if varlen else None)
    executable = request.make(request.choice())
    prepared = executable.prepare(request.extent)
    assert prepared.bytes < sum(m.bytes for m in prepared.shared)
    zeros = [m for m in prepared.shared if m.zeros]
    assert bool(zeros) == varlen
    at = {
        m.name: x
        for m, (slot, x) in zip(prepared.shared, prepared.places, strict=True)
        if slot == WORKSPACE
    }
    assert prepared.zeros == sum(m.bytes for m in zeros)
    assert all(at[m.name] + m.bytes <= prepared.zeros for m in zeros)
    assert all(
        at[m.name] >= prepared.zeros for m in prepared.shared if m.name in at and not m.zeros
    )
    # Values of a kernel, read and written, are apart.
    size = {m.name: m.bytes for m in prepared.shared}
    for launcher in executable.launchers:
        spans = sorted((at[n], at[n] + size[n]) for n in launcher.names if n in at and size[n])
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
