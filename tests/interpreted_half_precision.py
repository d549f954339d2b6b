"""Plans for bf16 in Triton's interpreter, which computes them in fp32; run by test_codegen.py."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from cases import Sizes, make_inputs
from interpreted_kernels import BY_NAME, PLANS, names_are_in_scope

from lmoe_compiler.codegen import compiled, gradients, launcher, run, tuned
from lmoe_compiler.codegen import plan as plans
from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.ir.parse import parse
from lmoe_compiler.lower import execute

__all__ = ["names_are_in_scope"]
# A near kernel overflows where chunks are not near; numpy says so, and its far kernel computes them again.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TWO_DECAYS = """recurrence two_decays
  state A[K, V]
  state B[K, V]
  token q[K] k[K] v[V] g w[K]
  step A
    decay log g
    update k (x) v
  read p[V] = q' A
  step B
    decay log w
    update k (x) v
  read r[V] = q' B
  output r + p
"""


NORMALISED = """recurrence normalised
  state S[K, V]
  state z[K]
  token q[K] k[K] v[V] g[K]
  step S
    decay log g
    update k (x) v
  read r[V] = q' S
  step z
    decay log g
    update k (x) 1
  read n = q' z
  output r / (abs(n) + 1)
"""

STEP = """recurrence same_factors
  state S[K, V]
  token q[K] k[K] v[V] y[K] w[K] b
  step S
    decay log w
"""
SAME_FACTORS = {
    "of rows that are read": "    update k (x) v\n  read r[V] = q' S\n  read p[V] = (q * q)' S\n  output r + p\n",
    "of rows and others": "    update k (x) v\n  read r[V] = (q * y)' S\n  read p[V] = (q * q)' S\n  output r + p\n",
    "of keys": "    update k * y (x) v\n    update k * k (x) v\n  read r[V] = q' S\n  output r\n",
    "of a number": "    update b * k (x) b * v\n    update k (x) -b * (k' S)\n  read r[V] = q' S\n  output r\n",
}


def in_half_precision(program: Program, inputs: list[torch.Tensor], error: float) -> None:
    """Plans for bf16, whose sums over rows are differences of one; the interpreter computes in fp32."""
    d_output, exact = torch.randn_like(inputs[2]), [x.double() for x in inputs]
    o, finals, kept = run.scan(program, inputs, None, None, Options())
    nothing = [None] * len(finals)
    grads, _ = run.scan_backward(program, inputs, None, None, kept, d_output, nothing, Options())
    right, *_ = execute.scan(program, exact, None, None, Options())
    expected, _ = execute.scan_backward(
        program, exact, None, None, (), d_output.double(), nothing, Options()
    )
    for x, y in zip([o, *grads], [right, *expected], strict=True):
        assert (x.double() - y).norm() <= error * y.norm()


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("gla", "inner"),
        ("kda", "inner"),
        ("rwkv7", "inner"),
        ("two_decays", "inner"),
        ("two_decays", "prepared"),
    ],
)
def test_near_and_far_chunks_in_half_precision(name, plan, monkeypatch):
    """With two decays only that of a vector has levels, and tells which chunks are near."""
    monkeypatch.setattr(tuned, "lookup", lambda *_: PLANS[plan])
    monkeypatch.setattr(plans, "KEPT_SPAN", 32)
    for module in (run, gradients):
        monkeypatch.setattr(module, "cast", lambda x, _: x)
    run.forget()
    if name == "two_decays":
        program = parse(TWO_DECAYS)
        q, k, v, w = (torch.randn(1, 56, 2, n) for n in (20, 20, 24, 20))
        inputs = {"q": q, "k": k / 5, "v": v, "g": w[..., 0], "w": w}
    else:
        program = BY_NAME[name].recurrence.program()
        inputs, _ = make_inputs(BY_NAME[name], Sizes(B=1, T=56, H=2, K=20, V=24))
    for gate in {"g", "w"} & set(inputs):
        strong = torch.ones(56).index_fill(0, torch.arange(16, 32), 300.0)
        inputs[gate] = -inputs[gate].abs() / 5 * strong.view(1, 56, *[1] * (inputs[gate].dim() - 2))
    vectors = [inputs[gate] for gate in ("g", "w") if gate in inputs and inputs[gate].dim() > 3]
    assert all(x[:, 16:32].sum(1).min() < -80 for x in vectors), "far in bf16"
    inputs = [inputs[var.name].bfloat16() for var in program.inputs]
    in_half_precision(program, inputs, 1e-4)
    run.forget()


@pytest.mark.parametrize("plan", ["inner", "products"])
@pytest.mark.parametrize("body", SAME_FACTORS.values(), ids=list(SAME_FACTORS))
def test_factors_that_occur_twice(body, plan, monkeypatch):
    """In one product, or in products beside which they are once: each counts as often as it is there."""
    monkeypatch.setattr(tuned, "lookup", lambda *_: PLANS[plan])
    for module in (run, gradients):
        monkeypatch.setattr(module, "cast", lambda x, _: x)
    run.forget()
    program = parse(STEP + body)
    made = {"w": lambda x: -x.abs() / 8, "b": torch.sigmoid, "v": lambda x: x}
    unit = torch.nn.functional.normalize
    sizes = {"K": 20, "V": 24}
    rows = [
        (var.name, torch.randn(1, 40, 1, *(sizes[a] for a in var.axes))) for var in program.inputs
    ]
    inputs = [made.get(name, lambda x: unit(x, dim=-1))(x).bfloat16() for name, x in rows]
    in_half_precision(program, inputs, 1e-5)
    run.forget()


@pytest.mark.parametrize("name", ["gla", "kda", "rwkv7", "normalised"])
def test_what_cancels_in_gradients_of_gates_is_rounded_alike(name, monkeypatch):
    """Gates up to the first value that is not zero have no gradient: of each pair of rows behind them its row's and its
    column's part cancel, to the last digits of fp32 where products take rounded operands (in fp16 here).
    """
    constants = launcher._constants

    def rounded(plan, names):
        return constants(plan, names) | ({"DOT": tl.float16} if "DOT" in names else {})

    monkeypatch.setattr(launcher, "_constants", rounded)
    monkeypatch.setattr(gradients, "cast", lambda x, _: x)
    run.forget()
    case = "gla" if name == "normalised" else name
    program = parse(NORMALISED) if name == "normalised" else BY_NAME[name].recurrence.program()
    inputs, _ = make_inputs(BY_NAME[case], Sizes(B=1, T=32, H=1, K=32, V=32))
    for row in ("v", "k"):
        inputs[row][:, :8] = 0.0
    inputs["g"] = -inputs["g"].abs() / 8
    d_output = torch.randn_like(inputs["v"])
    d_output[:, 13:] = 0.0
    rows = [inputs[var.name].bfloat16() for var in program.inputs]
    _, finals, kept = run.scan(program, rows, None, None, Options())
    nothing = [None] * len(finals)
    grads, _ = run.scan_backward(program, rows, None, None, kept, d_output, nothing, Options())
    dg = grads[[var.name for var in program.inputs].index("g")].float()
    assert dg[:, :9].norm() <= 2e-6 * dg.norm()
    run.forget()


def test_parts_of_no_tokens_add_up_to_nothing():
    """A gradient that programs leave in parts, of a call whose kernels have no programs."""
    update = "update k (x) b * v\n  read r[V] = q' B\n  output r\n"
    text = "recurrence scaled\n  state B[K, V]\n  token q[K] k[K] v[V] w[K] b\n  step B\n    decay log w\n    "
    program = parse(text + update)
    inputs = [torch.zeros(2, 0, 1, *(128 for _ in var.axes)).bfloat16() for var in program.inputs]
    o, finals, kept = run.scan(program, inputs, None, None, Options())
    nothing = [None] * len(finals)
    grads, _ = run.scan_backward(program, inputs, None, None, kept, o, nothing, Options())
    parts = [e for e in compiled._executables.values() if e.plan.direction == "backward"]
    assert any(v.parts for e in parts for k in e.plan.kernels for v in k.written)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
