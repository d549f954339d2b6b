"""Random recurrences by generated kernels in Triton's interpreter, beside ATen operations in float64; run by
test_codegen.py.

Rows, numbers and decays meet in all ways: a factor twice in a product, one key for what is written and what is read.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from interpreted_kernels import PLANS, RECOMPUTED

from lmoe_compiler.codegen import gradients, run, tuned
from lmoe_compiler.codegen import plan as plans
from lmoe_compiler.config import Options
from lmoe_compiler.ir.parse import parse
from lmoe_compiler.lower import execute

# A near kernel overflows where chunks are not near; numpy says so, and its far kernel computes them again.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOKENS = "  token q[K] k[K] v[V] x[K] y[K] w[K] g b c\n"
SIZES = {"K": 20, "V": 24}
READS = st.sampled_from(("q", "q * q", "q * x", "b * q"))
DECAYS = st.sampled_from(([], ["g"], ["w"], ["w"], ["w", "y"], ["w", "g"]))
MANY = {name: PLANS[name] for name in ("prepared", "inner", "products", "spans", "sections")}
MANY["recomputed"] = RECOMPUTED


@st.composite
def recurrences(draw) -> str:
    """Of few rows and numbers, so that they meet often."""
    key, number = draw(st.sampled_from("kx")), draw(st.sampled_from("bc"))
    keys = st.sampled_from((key, f"{key} * {key}", f"{number} * {key}", "k * x"))
    values = st.sampled_from(("v", f"{number} * v", f"{number} * {number} * v", "v * v"))
    pairs = draw(st.lists(st.tuples(keys, values), min_size=1, max_size=2))
    updates = [f"{row} (x) {value}" for row, value in pairs]
    if draw(st.booleans()):
        row = draw(st.sampled_from((key, f"{number} * {key}")))
        scale = draw(st.sampled_from((number, f"({number} * {number})")))
        read = draw(st.sampled_from((key, key, "k")))
        updates.insert(draw(st.integers(0, len(updates))), f"{row} (x) -{scale} * ({read}' S)")
    step = [
        "step S",
        *(f"  decay log {d}" for d in draw(DECAYS)),
        *(f"  update {u}" for u in updates),
    ]
    reads = [
        f"read r{i}[V] = ({row})' S"
        for i, row in enumerate(draw(st.lists(READS, min_size=1, max_size=2)))
    ]
    body = [*reads, *step] if draw(st.booleans()) else [*step, *reads]
    output = " + ".join([f"r{i}{draw(st.sampled_from(('', ' * b')))}" for i in range(len(reads))])
    lines = "".join(f"  {line}\n" for line in [*body, f"output {output}"])
    return f"recurrence random\n  state S[K, V]\n{TOKENS}{lines}"


def made(name: str, axes: tuple[str, ...], strong: bool) -> torch.Tensor:
    """Keys of length one, numbers between 0 and 1; log decays, of some tokens far ones if `strong`."""
    rows = torch.randn(1, 40, 1, *(SIZES[a] for a in axes))
    if name in "wyg":
        rows = -rows.abs() / 8
        rows[:, 16:30] *= 300 if strong and axes else 1
        return rows
    return rows.sigmoid() if name in "bc" else F.normalize(rows, dim=-1) if axes == ("K",) else rows


@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    recurrences(), st.sampled_from(sorted(MANY)), st.booleans(), st.booleans(), st.integers(0, 99)
)
def test_random_recurrences(text, plan, strong, ends, seed):
    """Plans for bf16, which the interpreter computes in fp32: outputs, final states and all gradients."""
    torch.manual_seed(seed)
    program = parse(text)
    inputs = [made(var.name, var.axes, strong).bfloat16() for var in program.inputs]
    start, end = (torch.randn(1, 1, *SIZES.values()) for _ in range(2))
    d_output, exact = torch.randn_like(inputs[2]), [x.double() for x in inputs]
    run.forget()
    with ExitStack() as patched:
        for module in (run, gradients):
            patched.enter_context(mock.patch.object(module, "cast", lambda x, _: x))
        patched.enter_context(mock.patch.object(plans, "KEPT_SPAN", 32))
        patched.enter_context(mock.patch.object(tuned, "lookup", return_value=MANY[plan]))
        o, finals, kept = run.scan(program, inputs, [start], None, Options())
        given_end = [end if ends else None]
        grads, d_start = run.scan_backward(
            program, inputs, [start], None, kept, d_output, given_end, Options()
        )
    run.forget()
    doubled = [start.double()]
    right, states, *_ = execute.scan(program, exact, doubled, None, Options())
    given_end = [end.double() if ends else None]
    expected, expected_start = execute.scan_backward(
        program, exact, doubled, None, (), d_output.double(), given_end, Options()
    )
    found = [o, *finals, *grads, *d_start]
    for x, y in zip(found, [right, *states, *expected, *expected_start], strict=True):
        assert (x.double() - y).norm() <= 2e-5 * y.norm().clamp_min(1e-12)
