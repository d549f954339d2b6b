"""Experts with a fixed number of places: what is dropped, in which order, that it is told, and that
nothing else changes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lmoe_compiler as lmoe
from lmoe_compiler import capacity, experts
from lmoe_compiler.config import CompileOptions
from lmoe_compiler.errors import InvalidOption
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes import pipeline

E, D, FF, TOP = 4, 16, 8, 2


def loop(x, weights, ids, gate_up, down, factor) -> tuple[Tensor, Tensor]:
    """The oracle: token by token, choice by choice, an expert takes rows while it has places."""
    places = -(-ids.numel() * round(factor * 1000) // (E * 1000))
    taken, rows = [0] * E, []
    for n in range(x.shape[0]):
        row = torch.zeros_like(x[n])
        for j, e in enumerate(ids[n].tolist()):
            taken[e] += 1
            if taken[e] <= places:
                gate, up = (gate_up[e] @ x[n]).chunk(2)
                row = row + weights[n, j] * (down[e] @ (F.silu(gate) * up))
        rows.append(row)
    dropped = torch.tensor([max(0, count - places) for count in taken])
    return torch.stack(rows), dropped


def inputs(tokens: int, dtype=torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    weights = torch.rand(tokens, TOP)
    x, gate_up, down = torch.randn(tokens, D), torch.randn(E, 2 * FF, D), torch.randn(E, D, FF)
    return [t.to(dtype).requires_grad_() for t in (x, weights, gate_up, down)]


def run(function, tensors: list[Tensor], ids: Tensor, **options) -> list[Tensor]:
    x, weights, gate_up, down = own = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(x, weights, ids, gate_up, down, **options)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(t.grad for t in own)]


ROUTINGS = {
    "random": lambda n: torch.rand(n, E).topk(TOP).indices,
    "all on two": lambda n: torch.tensor([1, 2]).repeat(n, 1),
    "an expert twice": lambda n: torch.tensor([3, 3]).repeat(n, 1),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("factor", [0.01, 0.5, 1, 1.25])
def test_drops_are_those_of_the_loop_with_all_gradients(routing: str, factor: float) -> None:
    ids = ROUTINGS[routing](11)
    tensors = inputs(11)
    ours = run(capacity.swiglu_experts, tensors, ids, factor=factor)
    exact = run(lambda *a: loop(*a, factor)[0], tensors, ids)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    dropped = loop(*(t.detach() for t in tensors[:2]), ids, *tensors[2:], factor)[1]
    assert torch.equal(capacity.dropped_rows(ids, E, factor), dropped)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_places_are_an_injection_in_token_order(data: st.DataObject) -> None:
    tokens = data.draw(st.integers(0, 9))
    flat = data.draw(st.lists(st.integers(0, E - 1), min_size=tokens * TOP, max_size=tokens * TOP))
    factor = data.draw(st.sampled_from([0.1, 0.5, 1.0, 1.1, 4.0]))
    ids = torch.tensor(flat, dtype=torch.int64).view(tokens, TOP)
    source, slot = capacity.places(ids, E, factor)
    count = capacity.capacity(ids.numel(), E, factor)
    assert source.shape[0] == E * count
    found = {int(s): row for row, s in enumerate(slot) if s >= 0}
    assert found == {place: int(row) for place, row in enumerate(source) if row >= 0}
    for expert in range(E):
        rows = [row for row, e in enumerate(flat) if e == expert]
        assert [r for r in rows if slot[r] >= 0] == rows[:count]
    assert int((slot < 0).sum()) == int(capacity.dropped_rows(ids, E, factor).sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_with_places_for_all_it_is_the_exact_block(routing: str, dtype: torch.dtype) -> None:
    ids = ROUTINGS[routing](13)
    tensors = inputs(13, dtype)
    ours = run(capacity.swiglu_experts, tensors, ids, factor=float(E))
    exact = run(experts.swiglu_experts, tensors, ids)
    for got, want in zip(ours, exact, strict=True):
        error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
        assert error <= 2 * torch.finfo(dtype).eps


def test_the_past_does_not_depend_on_the_future() -> None:
    """Rows are taken in token order, so other choices of later tokens drop no earlier row."""
    tensors, ids = inputs(12), ROUTINGS["random"](12)
    other = ids.clone()
    other[7:] = torch.tensor([1, 2])
    weights = tensors[1].detach().clone()
    weights[7:] += 100
    before = capacity.swiglu_experts(*tensors[:2], ids, *tensors[2:], factor=0.8)
    after = capacity.swiglu_experts(tensors[0], weights, other, *tensors[2:], factor=0.8)
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7:], after[7:])


def test_two_runs_have_equal_bits() -> None:
    tensors, ids = inputs(40, torch.float32), ROUTINGS["random"](40)
    first, second = (run(capacity.swiglu_experts, tensors, ids, factor=0.7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_is_not_a_number_stays_with_its_token() -> None:
    """Empty places are filled from token 0; its values must not get through."""
    x, weights, gate_up, down = (t.detach() for t in inputs(6))
    x[0] = torch.nan
    ids = torch.tensor([[0, 1], [2, 3], [2, 3], [2, 3], [2, 3], [2, 3]])
    out = capacity.swiglu_experts(x, weights, ids, gate_up, down, factor=2.0)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def test_nothing_is_read_on_the_host() -> None:
    """Tensors without data go through all of it, the bodies of both ops included."""
    ids = torch.empty(9, TOP, dtype=torch.int64, device="meta")
    x, weights, gate_up, down = (t.detach().to("meta") for t in inputs(9))
    source, slot = capacity.places(ids, E, 0.5)
    rows = capacity.place._init_fn(x, source, slot, TOP)
    assert capacity.pick._init_fn(rows, source, slot, TOP).shape == x.shape
    assert capacity.swiglu_experts(x, weights, ids, gate_up, down, factor=0.5).shape == x.shape
    assert capacity.dropped_rows(ids, E, 0.5).shape == (E,)


def test_library_contract_and_second_derivatives() -> None:
    ids = ROUTINGS["random"](7)
    source, slot = capacity.places(ids, E, 0.5)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(source.shape[0], 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(capacity.place, (x, source, slot, TOP))
    torch.library.opcheck(capacity.pick, (y, source, slot, TOP))
    tensors = [t.detach()[..., :3].clone().requires_grad_() for t in inputs(7)[:2]]
    gate_up = torch.randn(E, 4, 3, dtype=torch.float64, requires_grad=True)
    down = torch.randn(E, 3, 2, dtype=torch.float64, requires_grad=True)

    def block(x, weights, gate_up, down):
        return capacity.swiglu_experts(x, weights, ids, gate_up, down, factor=0.5)

    assert torch.autograd.gradcheck(block, (*tensors, gate_up, down))
    assert torch.autograd.gradgradcheck(block, (*tensors, gate_up, down))


CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=1, layer_pattern="N", num_heads=2, num_kv_heads=1,
    head_dim=8, num_experts=4, top_k=2, expert_size=8, shared_expert_size=8,
)  # fmt: skip


def model_and_tokens() -> tuple[nn.Module, Tensor, Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LinearMoEForCausalLM(CONFIG)
    return model, *torch.randint(0, 32, (2, 2, 12))


def test_a_model_reports_what_it_drops() -> None:
    model, ids, labels = model_and_tokens()
    exact = model(ids, labels)
    assert not exact.expert_dropped.any()
    tight = lmoe.compile(model, expert_capacity=0.5, inner="aot_eager")(ids, labels)
    places = capacity.capacity(ids.numel() * 2, 4, 0.5)
    assert torch.equal(tight.expert_dropped, (tight.expert_load - places).clamp_min(0))
    assert tight.expert_dropped.sum(1).min() > 0
    assert not torch.allclose(tight.logits, exact.logits, rtol=0, atol=1e-6)
    tight.loss.backward()


def test_a_model_with_places_for_all_is_the_exact_one() -> None:
    model, ids, labels = model_and_tokens()
    results = []
    for options in ({}, {"expert_capacity": 4}):
        torch._dynamo.reset()
        model.zero_grad()
        output = lmoe.compile(model, inner="aot_eager", **options)(ids, labels)
        output.loss.backward()
        results.append([output.loss.detach(), *(p.grad.clone() for p in model.parameters())])
    assert not output.expert_dropped.any()
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-7)


def test_drops_in_silence_are_refused() -> None:
    def block(x, weights, ids, gate_up, down):
        experts.dropped_rows(ids, E)
        return torch.ops.lmoe.experts(x, weights, ids, gate_up, down)

    x, weights, gate_up, down = inputs(5)
    compiled = lmoe.compile(block, expert_capacity=1.0, inner="eager")
    with pytest.raises(Exception, match=r"DropsInSilence: .* and no output says"):
        compiled(x, weights, ROUTINGS["random"](5), gate_up, down)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "1.25"])
def test_a_capacity_that_is_no_factor_is_refused(value: object) -> None:
    with pytest.raises(InvalidOption, match="not a positive number"):
        CompileOptions.of({"expert_capacity": value})


def test_only_the_option_changes_numbers() -> None:
    assert not any(p.changes_numerics for p in pipeline(CompileOptions()).passes)
    found = pipeline(CompileOptions(expert_capacity=1.25)).passes
    assert [p.name for p in found if p.changes_numerics] == ["count_dropped", "lower_experts"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_holds_forward_and_backward(dtype: torch.dtype) -> None:
    """Captured once, replayed for other choices: what is dropped changes, nothing is read."""
    operands = [t.detach().cuda().requires_grad_() for t in inputs(64, dtype)]
    x, weights, gate_up, down = operands
    ids = ROUTINGS["random"](64).cuda()

    def step() -> list[Tensor]:
        y = capacity.swiglu_experts(x, weights, ids, gate_up, down, factor=0.5)
        grads = torch.autograd.grad(y.float().square().sum(), operands)
        return [y.detach(), *grads, capacity.dropped_rows(ids, E, 0.5)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for name in ROUTINGS:
        ids.copy_(ROUTINGS[name](64))
        graph.replay()
        held = [t.clone() for t in captured]
        for got, want in zip(held, step(), strict=True):
            torch.testing.assert_close(got, want)
        assert int(held[-1].sum()) > 0
