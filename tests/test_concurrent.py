"""Kernels side by side: what touches the same memory, and not only to read it, runs one after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.concurrent import Touch, waits
from lmoe_compiler.codegen.launch import Executable
from lmoe_compiler.codegen.names import identifier
from lmoe_compiler.codegen.prepared import Launch, Prepared
from lmoe_compiler.models import RECURRENCES

pytest.importorskip("triton")

touch = st.tuples(st.integers(0, 1), st.integers(0, 6), st.integers(1, 3), st.booleans())


def behind(after: list[tuple[int, ...]]) -> list[set[int]]:
    """Of every launch, all that have ended when it begins."""
    found: list[set[int]] = []
    for edges in after:
        found.append(set(edges).union(*(found[i] for i in edges)))
    return found


@settings(deadline=None)
@given(st.lists(st.lists(touch, max_size=3), max_size=9))
def test_launches_wait_for_what_they_share_memory_with_and_for_nothing_else(drawn):
    launches = [[Touch((p, 0), a, a + n, w) for p, a, n, w in one] for one in drawn]
    after = waits(launches)
    ended = behind(after)
    for i, own in enumerate(launches):
        shared = {
            j
            for j in range(i)
            for x in own
            for y in launches[j]
            if x.place == y.place
            and (x.written or y.written)
            and set(range(x.first, x.end)) & set(range(y.first, y.end))
        }
        assert set(after[i]) <= shared <= ended[i]
        # No edge says what others say together.
        assert all(j not in ended[k] for j in after[i] for k in after[i])


def first_of(launch: Launch) -> int:
    """The first token of its section: T_0 is the third of the lengths from the end, where there are sections."""
    return launch.lengths[-3] if "T_0" in launch.launcher.function.arg_names else 0


def memory_of(executable: Executable, prepared: Prepared) -> dict[int, tuple[int, int, int]]:
    """By slot: where a value lies that is no tensor of its own."""
    first = len(executable.given) + len(prepared.own)
    values = zip(prepared.shared, prepared.places, strict=True)
    return {first + i: (room, at, at + m.bytes) for i, (m, (room, at)) in enumerate(values)}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "name", ["linear_attention", "retention", "gla", "delta_rule", "gated_delta_rule", "kda"]
)
@pytest.mark.parametrize("shape", [(2, 4096, 16, 128), (8, 1024, 8, 64)], ids=str)
def test_no_kernel_meets_another_in_memory(name, shape, overlap, direction):
    request = request_of(RECURRENCES[name].program(), direction, shape)
    choice = request.choice()
    choice = replace(choice, section=512, overlap=True) if overlap else choice
    executable = request.make(choice)
    prepared = executable.prepare(request.extent)
    where = memory_of(executable, prepared)
    writes = {one: {identifier(v.name) for v in one.kernel.written} for one in executable.launchers}
    ended = behind([one.after for one in prepared.launches])
    met = 0
    for i, one in enumerate(prepared.launches):
        assert all(j < i for j in one.after)
        for j in range(i):
            other = prepared.launches[j]
            for n, slot in zip(one.launcher.names, one.slots, strict=False):
                for m, there in zip(other.launcher.names, other.slots, strict=False):
                    if n not in writes[one.launcher] and m not in writes[other.launcher]:
                        continue
                    (room, a, b), (beside, c, d) = (where.get(s, (s, 0, 1)) for s in (slot, there))
                    # Of results, sections have rows of their own.
                    own = room == slot and beside == there and first_of(one) != first_of(other)
                    if room == beside and a < d and c < b and not own:
                        met += 1
                        assert j in ended[i], (one.launcher.kernel.name, other.launcher.kernel.name)
    assert bool(met) == any(one.after for one in prepared.launches)


def test_scans_of_states_and_of_their_gradients_run_side_by_side():
    program = RECURRENCES["gated_delta_rule"].program()
    request = request_of(program, "backward", (2, 4096, 16, 128))
    executable = request.make(replace(request.choice(), section=0))
    prepared = executable.prepare(request.extent)
    order = [one.launcher.kernel.name for one in prepared.launches]
    ended = behind([one.after for one in prepared.launches])
    states, adjoint = order.index("states"), order.index("adjoint")
    assert states not in ended[adjoint]
    assert adjoint not in ended[states]
    assert {states, adjoint} <= ended[order.index("products")]


@pytest.mark.parametrize("name", ["gated_delta_rule", "kda", "gla"])
def test_a_section_waits_for_nothing_that_the_one_before_it_only_reads(name):
    """With two in memory, kernels of a section wait for what is carried into it alone."""
    request = request_of(RECURRENCES[name].program(), "backward", (2, 4096, 16, 128))
    executable = request.make(replace(request.choice(), section=1024, overlap=True))
    prepared = executable.prepare(request.extent)
    size = len(executable.plan.kernels)
    ended = behind([one.after for one in prepared.launches])
    order = [one.launcher.kernel.name for one in prepared.launches]
    assert order[:size] * 4 == order
    gradients = [i for i, n in enumerate(order) if n.startswith("gradients")]
    second = set(range(size, 2 * size))
    scans = {i for i in second if not order[i].startswith(("products", "gradients"))}
    # Nor do its gradients, which are other rows of the same results.
    ours = {g for g in gradients if g in second}
    assert not any(g in ended[i] for i in scans | ours for g in gradients if g < size)
    # The third has the places of the first.
    assert set(gradients) & set(range(size)) <= ended[2 * size + order.index("gradients")]
