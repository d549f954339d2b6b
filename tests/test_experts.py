"""The expert block against a loop over tokens and experts, in every dtype, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lmoe_compiler import experts

E, D, FF = 4, 16, 8


def loop(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The oracle: one token and one expert at a time."""
    rows = []
    for n in range(x.shape[0]):
        row = torch.zeros_like(x[n])
        for j in range(ids.shape[1]):
            gate, up = (gate_up[ids[n, j]] @ x[n]).chunk(2)
            row = row + weights[n, j].to(x.dtype) * (down[ids[n, j]] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def inputs(ids: Tensor, dtype: torch.dtype, hidden: int = D, size: int = FF) -> list[Tensor]:
    torch.manual_seed(0)
    n, k = ids.shape
    weights = torch.randn(n, k).softmax(-1).to(dtype)
    x = torch.randn(n, hidden).to(dtype)
    gate_up = (torch.randn(E, 2 * size, hidden) * 0.3).to(dtype)
    down = (torch.randn(E, hidden, size) * 0.3).to(dtype)
    return [t.requires_grad_() for t in (x, weights, gate_up, down)]


def run(function, tensors: list[Tensor], ids: Tensor) -> list[Tensor]:
    x, weights, gate_up, down = (t.detach().clone().requires_grad_() for t in tensors)
    out = function(x, weights, ids, gate_up, down)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
    return [out.detach(), *(t.grad for t in (x, weights, gate_up, down))]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


ROUTINGS = {
    "balanced": torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [2, 1]]),
    "an expert without tokens": torch.tensor([[0, 1], [3, 1], [1, 0], [3, 0], [0, 1]]),
    "all on one expert": torch.tensor([[2], [2], [2], [2]]),
    "no tokens": torch.zeros(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_loop_with_all_gradients(routing, dtype):
    ids = ROUTINGS[routing]
    tensors = inputs(ids, dtype)
    ours = run(torch.ops.lmoe.experts, tensors, ids)
    if not ids.numel():
        assert [tuple(t.shape) for t in ours[1:]] == [tuple(t.shape) for t in tensors]
        assert all(not t.any() for t in ours)
        return
    exact = run(loop, [t.double() for t in tensors], ids)
    floor = run(loop, tensors, ids)
    for ours_one, exact_one, floor_one in zip(ours, exact, floor, strict=True):
        # the same loop in this dtype says what rounding alone costs
        assert relative(ours_one, exact_one) <= max(
            1.5 * relative(floor_one, exact_one), 8 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize(("hidden", "size"), [(30, 8), (16, 5), (3, 1)])
def test_rows_that_torch_grouped_mm_refuses(hidden, size):
    """Strides that are no multiple of 16 bytes go through the fallback, with the same result."""
    ids = ROUTINGS["an expert without tokens"]
    tensors = inputs(ids, torch.float32, hidden, size)
    for a, b in zip(
        run(torch.ops.lmoe.experts, tensors, ids), run(loop, tensors, ids), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype):
    """torch._grouped_mm's own meta kernel refuses fp32 under compile; ours must not."""
    ids = ROUTINGS["balanced"]
    tensors = inputs(ids, dtype)
    compiled = torch.compile(torch.ops.lmoe.experts, backend="aot_eager", fullgraph=True)
    for a, b in zip(
        run(compiled, tensors, ids), run(torch.ops.lmoe.experts, tensors, ids), strict=True
    ):
        assert torch.equal(a, b)


def test_the_mark_is_one_node_of_the_dynamo_graph():
    graphs = []

    def keep(gm, _inputs):
        graphs.append(gm.graph)
        return gm.forward

    ids = ROUTINGS["balanced"]
    x, weights, gate_up, down = inputs(ids, torch.float32)
    torch.compile(torch.ops.lmoe.experts, backend=keep, fullgraph=True)(
        x, weights, ids, gate_up, down
    )
    calls = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    assert [str(target) for target in calls] == ["lmoe.experts"]


def test_gradients_and_second_derivatives_in_float64():
    ids = ROUTINGS["an expert without tokens"]
    tensors = inputs(ids, torch.float64, hidden=3, size=2)

    def block(x, weights, gate_up, down):
        return torch.ops.lmoe.experts(x, weights, ids, gate_up, down)

    assert torch.autograd.gradcheck(block, tensors)
    assert torch.autograd.gradgradcheck(block, tensors)


def test_library_contract():
    ids = ROUTINGS["an expert without tokens"]
    order, inverse, offsets = experts.sort_by_expert(ids, E)
    x, _, gate_up, _ = inputs(ids, torch.float32)
    rows = torch.randn(ids.numel(), D, requires_grad=True)
    torch.library.opcheck(experts.dispatch, (x, order, inverse, 2))
    torch.library.opcheck(experts.collect, (rows, order, inverse, 2))
    torch.library.opcheck(experts.grouped_mm, (rows, gate_up.mT, offsets))
    torch.library.opcheck(experts.grouped_mm_weight, (rows, rows, offsets))


def test_flops_are_those_of_the_routed_rows():
    ids = ROUTINGS["balanced"]
    x, weights, gate_up, down = inputs(ids, torch.float32)
    with FlopCounterMode(display=False) as counter:
        torch.ops.lmoe.experts(x, weights, ids, gate_up, down).sum().backward()
    forward = 2 * ids.numel() * D * 3 * FF
    assert counter.get_total_flops() == 3 * forward


def test_autocast_runs_the_products_in_bfloat16_and_keeps_the_input_dtype():
    ids = ROUTINGS["balanced"]
    tensors = inputs(ids, torch.float32)
    exact = run(torch.ops.lmoe.experts, tensors, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run(torch.ops.lmoe.experts, tensors, ids)
    for a, b in zip(rounded, exact, strict=True):
        assert a.dtype == b.dtype
        assert 0 < relative(a, b) < 0.02
