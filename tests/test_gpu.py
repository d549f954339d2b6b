"""Ops, calls and the backend on a CUDA device (`pytest -m gpu`): the generated kernels behind the same interfaces."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from calls import arguments, gated, state
from torch.utils import benchmark

import lmoe_compiler as lmoe
from lmoe_compiler import implementation
from lmoe_compiler.config import Options

pytestmark = pytest.mark.gpu


def on_device(*tensors, grad=False):
    return [x.detach().cuda().requires_grad_(grad) for x in tensors]


def test_auto_runs_generated_kernels():
    inputs = on_device(*arguments(dtype=torch.float32))
    for function in ("scan", "scan_backward"):
        chosen = implementation.choose(function, gated.ir, inputs, Options())
        assert chosen.__module__ == implementation.TRITON


@pytest.mark.parametrize("given_state", [False, True])
def test_opcheck(given_state):
    inputs = on_device(*arguments(dtype=torch.float32), grad=True)
    states = on_device(state(dtype=torch.float32), grad=True) if given_state else []
    torch.library.opcheck(torch.ops.lmoe.scan.default, (gated.text(), inputs, states, None, ""))


def test_a_thread_of_its_own_and_a_stream_of_its_own():
    """A repeated call is launched as a graph, which needs the device's context in whatever thread it runs."""
    inputs = on_device(*arguments(2, 130, dtype=torch.bfloat16))
    expected = gated(*inputs)
    gated(*inputs)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(gated, *inputs).result()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        torch.cuda._sleep(10_000_000)
        late = [x + 0 for x in inputs]
        found = gated(*late)
    aside.synchronize()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_many_calls_in_flight_keep_their_own_arguments():
    """A graph is pointed at the next call's tensors while it still runs for those before."""
    given = [on_device(*arguments(2, 700, dtype=torch.bfloat16)) for _ in range(8)]
    for i, xs in enumerate(given):
        xs[2].mul_(i + 1)
    expected = [gated(*xs) for xs in given]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    found = [gated(*xs) for _ in range(4) for xs in given]
    for x, y in zip(found, 4 * expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_is_eager_for_many_lengths(inner):
    compiled = lmoe.compile(lambda *xs: gated(*xs, return_state=True), inner=inner, fullgraph=True)
    for T in (5, 64, 130, 1000):
        inputs = on_device(*arguments(2, T, dtype=torch.float32), grad=True)
        results = []
        for function in (compiled, partial(gated, return_state=True)):
            output, final = function(*inputs)
            grads = torch.autograd.grad(output.sin().sum() + final.sin().sum(), inputs)
            results.append((output, final, *grads))
        torch.testing.assert_close(*results)


def test_autocast():
    inputs = on_device(*arguments(2, 70, dtype=torch.float32))
    with torch.autocast("cuda", torch.bfloat16):
        output = gated(*inputs)
    cast = [x.to(torch.bfloat16) for x in inputs[:3]]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, gated(*cast, *inputs[3:]), rtol=0, atol=0)


def test_host_time_of_a_call(record_property):
    """What the processor does for one small call, kernels launched and not waited for."""
    inputs = on_device(*arguments(1, 64, dtype=torch.bfloat16))
    leaves = on_device(*inputs, grad=True)
    for name, given in (("inference", inputs), ("training", leaves)):
        timer = benchmark.Timer("f(*xs)", globals={"f": gated, "xs": given})
        microseconds = timer.blocked_autorange(min_run_time=1).median * 1e6
        record_property(f"{name}_us", microseconds)
        print(f"{name}: {microseconds:.1f} us a call")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_span_maps_of_packed_documents_wait_for_nothing():
    """Where the last document begins is data: no value goes to the host, forward or backward."""
    inputs = on_device(*arguments(1, 130, dtype=torch.float32))
    cu_seqlens = torch.tensor([0, 40, 130], dtype=torch.int32, device="cuda")
    span = partial(
        torch.ops.lmoe.span_map, gated.text(), inputs, cu_seqlens, "implementation=torch"
    )
    span()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = span()
        torch.ops.lmoe.span_map_backward(
            gated.text(), inputs, cu_seqlens, results, "implementation=torch"
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
