"""Places in the workspace of a call: what is there at the same time lies apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.workspace import places
from lmoe_compiler.models import RECURRENCES

pytest.importorskip("triton")
values = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6), st.integers(0, 3)), max_size=9)


@given(values)
def test_values_needed_together_do_not_overlap(drawn):
    sizes = [size for size, _, _ in drawn]
    needed = [(first, first + more) for _, first, more in drawn]
    found = places(sizes, needed)
    spans = list(zip(found, sizes, needed, strict=True))
    for i, (at, size, (first, last)) in enumerate(spans):
        assert at >= 0
        for other, extent, (begin, end) in spans[:i]:
            together = begin <= last and first <= end
            assert not together or at + size <= other or other + extent <= at
    # No larger than everything side by side, and no smaller than what any kernel needs.
    top = max((at + size for at, size, _ in spans), default=0)
    most = max(
        (sum(s for s, (a, b) in zip(sizes, needed, strict=True) if a <= t <= b) for t in range(10)),
        default=0,
    )
    assert most <= top <= sum(sizes)


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
    at = dict(zip((m.name for m in prepared.shared), prepared.offsets, strict=True))
    assert prepared.zeros == sum(m.bytes for m in zeros)
    assert all(at[m.name] + m.bytes <= prepared.zeros for m in zeros)
    assert all(at[m.name] >= prepared.zeros for m in prepared.shared if not m.zeros)
    # Values of a kernel, read and written, are apart.
    size = {m.name: m.bytes for m in prepared.shared}
    for launcher in executable.launchers:
        spans = sorted((at[n], at[n] + size[n]) for n in launcher.names if n in at and size[n])
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
