"""Hypothesis writes recurrences of the chunkable part of the grammar; the lowering must agree with the interpreter.

A program is a state with any mix of decays (none, scalar, per key, both), writes, feedbacks (merged with a write or
not, before or after the decay), reads before, between and after the steps, an optional normaliser and an output of
all reads. Lengths, chunk sizes and document boundaries are drawn too.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from programs import make_inputs, make_states
from test_execute import everything, same

from lmoe_compiler import interpreted
from lmoe_compiler.config import Options
from lmoe_compiler.ir.parse import parse
from lmoe_compiler.lower import execute

SCALES = ("", "b * ", "-b * ", "sigmoid(g) * ", "a * ")
KEYS = ("k", "x", "q", "tanh(w + u)")
DECAYS = ("log g", "log w", "log -abs(a)", "log logsigmoid(w + u)", "log -abs(a) * sigmoid(b)")
VALUES = ("v", "b * v", "(v + f)", "v * a")


@st.composite
def steps(draw: st.DrawFn) -> tuple[str, list[str]]:
    """The body of the state S, and the names of its reads."""
    lines: list[str] = []
    reads: list[str] = []

    def read(place: str) -> None:
        if draw(st.booleans()):
            vector = draw(st.sampled_from(("q", "x", "q * sigmoid(w)", "u")))
            reads.append(f"r{place}")
            lines.append(f"  read r{place}[V] = ({vector})' S")

    read("0")
    decays = draw(st.lists(st.sampled_from(DECAYS), max_size=2))
    if decays and draw(st.booleans()):
        lines += ["  step S", *(f"    decay {d}" for d in decays)]
        read("1")
        decays = []
    lines += ["  step S", *(f"    decay {d}" for d in decays)]
    reader = draw(st.sampled_from(KEYS[:2]))
    point = draw(st.sampled_from(("", " before")))
    for _ in range(draw(st.integers(0, 2))):
        scale, key = draw(st.sampled_from(SCALES)), draw(st.sampled_from(KEYS))
        lines.append(f"    update {key} (x) ({scale}0.5) * ({reader}' S){point}")
    for _ in range(draw(st.integers(1, 2))):
        key, value = draw(st.sampled_from(KEYS)), draw(st.sampled_from(VALUES))
        key = f"{draw(st.sampled_from(SCALES[:2]))}{key}"
        lines.append(f"    update {key} (x) {value}")
    vector = draw(st.sampled_from(("q", "k", "2 * q")))
    lines.append(f"  read r[V] = ({vector})' S")
    return "\n".join(lines), [*reads, "r"]


@st.composite
def programs(draw: st.DrawFn) -> str:
    body, reads = draw(steps())
    head = "recurrence written\n  state S[K, V]\n"
    output = " + ".join(reads)
    if draw(st.booleans()):
        head += "  state z[K]\n"
        decay = draw(st.sampled_from(("", "    decay log g\n", "    decay log w\n")))
        body += f"\n  step z\n{decay}    update exp(k) (x) b\n  read n = exp(q)' z"
        output = f"({output}) / (abs(n) + 1)"
    if draw(st.booleans()):
        output = f"{output} + dot[K](q * u, k) * v"
    tokens = "  token q[K] k[K] v[V] g w[K] b x[K] f[V]\n  head u[K] a\n"
    return f"{head}{tokens}{body}\n  output {output}\n"


@given(
    text=programs(),
    T=st.integers(0, 21),
    chunk=st.sampled_from([1, 2, 4, 8, 16]),
    cuts=st.none() | st.lists(st.integers(0, 21), max_size=3),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_written_program_is_lowered_wrongly(text, T, chunk, cuts):
    p = parse(text)
    bounds = None
    if cuts is not None:
        inside = sorted(min(cut, T) for cut in cuts)
        bounds = torch.tensor([0, *inside, T], dtype=torch.int32)
    inputs = make_inputs(p, 2 if bounds is None else 1, T)
    states = make_states(p, 2 if bounds is None else len(bounds) - 1)
    options = Options(chunk_size=chunk)
    actual = everything(execute, p, inputs, states, bounds, options)
    expected = everything(interpreted, p, inputs, states, bounds, options)
    same(actual, expected, rtol=1e-9)
