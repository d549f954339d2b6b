"""Plans for bf16 in Triton's interpreter, which computes them in fp32; run by test_codegen.py."""

from __future__ import annotations

import pytest
import torch
from cases import Sizes, make_inputs
from interpreted_kernels import BY_NAME, PLANS, names_are_in_scope

from lmoe_compiler.codegen import compiled, gradients, run, tuned
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
