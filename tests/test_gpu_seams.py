"""Where generated kernels meet torch and large sizes (`pytest -m gpu`): graphs, checkpoints, strides, 64-bit offsets,
sequential kinds, span maps. `-k sanitizer` is a short selection for compute-sanitizer:

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 \\
    python -m pytest -m gpu -k sanitizer tests/test_gpu_seams.py
"""

from __future__ import annotations

import pytest
import torch
from accuracy import assert_accurate
from cases import CASES, Sizes, make_inputs
from differentiated import as_argument, as_list, differentiated
from kinds import ROWS
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import lmoe_compiler as lmoe
from lmoe_compiler.codegen import compiled
from lmoe_compiler.lower.chunk import build
from lmoe_compiler.models import RECURRENCES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

BY_NAME = {case.name: case for case in CASES}
ONE_OF_EACH = (
    "linear_attention",
    "simple_gla",
    "gla",
    "delta_rule",
    "gated_delta_rule",
    "kda",
    "slstm",
)
WALKED = [name for name, row in ROWS.items() if build(row.recurrence.ir) is None]
WALKED_MODELS = [name for name, recurrence in RECURRENCES.items() if build(recurrence.ir) is None]
half = torch.bfloat16
each = pytest.mark.parametrize("name", ONE_OF_EACH)


def prepared(
    name: str, sizes: Sizes, dtype: torch.dtype = half
) -> tuple[list[Tensor], list[Tensor]]:
    inputs, states = make_inputs(BY_NAME[name], sizes)
    return [x.to(dtype).cuda() for x in inputs.values()], [x.float().cuda() for x in states]


def generated(name: str) -> lmoe.Recurrence:
    return RECURRENCES[name].with_options(implementation="triton")


def grads_of(call, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = call(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), device="cuda", dtype=output.dtype)
    return [output, *torch.autograd.grad(output, leaves, weights.view_as(output))]


def near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for x, y in zip(actual, expected, strict=True):
        error = (x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-20)
        assert error <= tolerance


@pytest.mark.parametrize("dtype", [half, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", WALKED)
@pytest.mark.parametrize(("size", "length"), [(24, 70), (128, 33)])
def test_kinds_without_a_chunk_form(name, dtype, size, length):
    """Sequential kernels: outputs, final states and every gradient, also where programs hold tiles (K = V = 128)."""
    recurrence = ROWS[name].recurrence
    torch.manual_seed(size)
    sizes = {"K": size, "V": size, "M": 16, "N": 2}
    lead = {"token": (2, length, 2), "head": (2,), "state": (2, 2)}

    def noise(var) -> Tensor:
        shape = (*lead[var.kind], *(sizes[a.rstrip("'")] for a in var.axes))
        return torch.randn(shape, device="cuda") / size**0.5

    inputs = {var.name: noise(var).to(dtype) for var in recurrence.inputs}
    states = [noise(var).abs() + 0.5 for var in recurrence.states]
    exact = differentiated(
        recurrence.reference,
        {n: x.double() for n, x in inputs.items()},
        [x.double() for x in states],
    ).tensors()
    floor = differentiated(recurrence.reference, inputs, states).tensors()
    kernels = recurrence.with_options(implementation="triton")
    actual = differentiated(kernels, inputs, states).tensors()
    assert_accurate(actual, floor, exact, dtype)


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_delta_rule", "kda"])
@pytest.mark.parametrize("ends", [None, (0, 70, 200), (0, 0, 200)], ids=str)
def test_span_maps(name, ends):
    inputs, _ = prepared(name, Sizes(1, 200, 2, 64, 64), torch.float32)
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="cuda")
    text, span = RECURRENCES[name].text(), torch.ops.lmoe.span_map.default
    found = []
    for dtype, options in (
        (torch.float64, "implementation=torch"),
        (torch.float32, "implementation=triton"),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        results = span(text, leaves, offsets, options)
        torch.manual_seed(0)
        weights = [torch.randn(x.shape, device="cuda").to(dtype) for x in results]
        grads = torch.autograd.grad(results, leaves, weights, allow_unused=True)
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]
        found.append([*results, *grads])
    near(found[1], found[0], 1e-5)


@pytest.mark.parametrize("name", ["gated_delta_rule", "kda", "rwkv7"])
def test_span_maps_of_many_tokens(name):
    """A shard of one head is cut into spans itself, whose maps are matrices: for M, whose values are keys, too."""
    inputs, _ = prepared(name, Sizes(1, 8192, 1, 128, 128))
    # So little is forgotten that M is not 0 at the end.
    less = {"g": 1e-4, "beta": 0.02, "a": 0.02}
    names = [var.name for var in RECURRENCES[name].inputs]
    inputs = [less.get(n, 1.0) * x for n, x in zip(names, inputs, strict=True)]
    text, span = RECURRENCES[name].text(), torch.ops.lmoe.span_map.default
    compiled.forget()
    found = []
    for dtype, options in (
        (torch.float64, "implementation=torch"),
        (half, "implementation=triton"),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        results = span(text, leaves, None, options)
        torch.manual_seed(0)
        weights = [torch.randn(x.shape, device="cuda").to(x.dtype) for x in results]
        grads = torch.autograd.grad(results, leaves, weights, allow_unused=True)
        found.append([*results, *(g for g in grads if g is not None)])
    plans = [executable.plan for executable in compiled._executables.values()]
    cut = [p for p in plans if any(k.name == "spans_matrix" for k in p.kernels)]
    assert {p.program.states[0].axes for p in cut} == {("K", "V"), ("K", "K_columns")}
    near(found[1], found[0], 0.02)


@each
def test_graph_of_forward_and_backward(name):
    """Nothing waits for the device or allocates outside the graph's pool: a replay sees new inputs."""
    inputs, _ = prepared(name, Sizes(2, 200, 2, 64, 64))
    held = [x.clone().requires_grad_() for x in inputs]
    call, graph = generated(name), torch.cuda.CUDAGraph()

    def run() -> list[Tensor]:
        output = call(*held)
        return [output, *torch.autograd.grad(output, held, output.detach())]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    with torch.no_grad():
        for x in held:
            x.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        expected = run()
    torch.cuda.synchronize()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)


@each
def test_graph_of_steps_in_place(name):
    """A captured step advances the state that it was given, replay after replay."""
    inputs, states = prepared(name, Sizes(4, 1, 2, 64, 64))
    tokens = {i for i, var in enumerate(RECURRENCES[name].inputs) if var.kind == "token"}
    now = [x[:, 0].contiguous() if i in tokens else x for i, x in enumerate(inputs)]
    step, held = generated(name).step, [x.clone() for x in states]
    expected = list(states)
    with torch.no_grad():
        for _ in range(3):
            wanted, after = step(*now, state=as_argument(expected))
            expected = as_list(after)
        step(*now, state=as_argument([x.clone() for x in held]), inplace=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output, _ = step(*now, state=as_argument(held), inplace=True)
        for x, y in zip(held, states, strict=True):
            x.copy_(y)
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    for x, y in zip([output, *held], [wanted, *expected], strict=True):
        assert torch.equal(x, y)


@each
def test_inductor_takes_the_whole_graph(name):
    inputs, _ = prepared(name, Sizes(2, 130, 2, 64, 64))
    call = generated(name)
    compiled = torch.compile(lambda *xs: 2 * call(*xs), fullgraph=True)
    near(grads_of(compiled, inputs), grads_of(lambda *xs: 2 * call(*xs), inputs), 0.01)


@each
def test_activation_checkpointing(name):
    inputs, _ = prepared(name, Sizes(2, 130, 2, 64, 64))
    call = generated(name)
    again = grads_of(lambda *xs: checkpoint(call, *xs, use_reentrant=False), inputs)
    for x, y in zip(again, grads_of(call, inputs), strict=True):
        assert torch.equal(x, y)


@each
def test_any_strides(name):
    """Heads before tokens, and a slice of a wider tensor that is not even aligned to 16 bytes.

    Kernels for odd addresses load fewer numbers at once, and may add up in another order.
    """
    dtype = torch.float32 if name in WALKED_MODELS else half
    inputs, _ = prepared(name, Sizes(2, 130, 2, 64, 64), dtype)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x for x in inputs]
    shifted = [
        torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if x.dim() > 2 else x
        for x in inputs
    ]
    assert any(x.data_ptr() % 16 for x in shifted)
    expected = grads_of(generated(name), inputs)
    for changed, allowed in ((strided, 0.0), (shifted, 1e-5)):
        actual = grads_of(generated(name), changed)
        near(actual, expected, 1e-5 if name in WALKED_MODELS else allowed)


@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule"])
def test_gradients_beyond_32_bits(name):
    """2.2e9 elements in every tensor, a million programs: the last sequence has the gradients of a small call."""
    batch, sizes = 8192, Sizes(1, 128, 130, 16, 16)
    inputs, _ = prepared(name, sizes)
    call = generated(name)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = call(*leaves)
    small = [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output))]
    wide = [x.expand(batch, *x.shape[1:]).contiguous().requires_grad_() for x in inputs]
    assert wide[0].numel() > 2**31
    output = call(*wide)
    grads = torch.autograd.grad(output, wide, torch.ones_like(output))
    for row in (0, batch - 1):
        near([output[row : row + 1], *(g[row : row + 1] for g in grads)], small, 0.005)


@pytest.mark.parametrize(("T", "K", "V"), [(75, 24, 20), (600, 72, 68)])
@each
def test_small_calls_for_the_sanitizer(name, T, K, V):
    """Ragged lengths and widths, packed documents, a step, a span map: everything that masks addresses; and more than
    a span of what a forward keeps, where gradients are written by scans of their own.
    """
    inputs, states = prepared(name, Sizes(1, T, 2, K, V))
    call, offsets = generated(name), torch.tensor([0, 1, 40, 40, T], dtype=torch.int32).cuda()
    grads_of(call, inputs)
    grads_of(lambda *xs: call(*xs, cu_seqlens=offsets), inputs)
    tokens = {i for i, var in enumerate(RECURRENCES[name].inputs) if var.kind == "token"}
    now = [x[:, 0].contiguous() if i in tokens else x for i, x in enumerate(inputs)]
    call.step(*now, state=as_argument(states), inplace=True)
    if name not in WALKED_MODELS:
        torch.ops.lmoe.span_map(RECURRENCES[name].text(), inputs, None, "implementation=triton")
    torch.cuda.synchronize()
