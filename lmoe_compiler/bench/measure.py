"""One measurement of one call: medians, kernels launched, peak memory, first call. Device work is timed with events."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lmoe_compiler.errors import ImplementationUnavailable

COPY_BANDWIDTH = 4.2e12
"""Bytes a second of a device-to-device copy on an H200, read plus written: what "floor" is measured in."""


def require_device(*, library: bool) -> None:
    """Raises ImplementationUnavailable before any worker starts: no GPU, or no flash-linear-attention."""
    if not torch.cuda.is_available():
        raise ImplementationUnavailable(
            "there is no CUDA device to time kernels on",
            why=f"torch {torch.__version__} sees none",
            try_="lmoe bench resources gla   # registers and spills, without a GPU",
        )
    if library and importlib.util.find_spec("fla") is None:
        raise ImplementationUnavailable(
            "flash-linear-attention is not installed",
            why="`fla` cannot be imported",
            try_="pip install --target somewhere fla-core einops; PYTHONPATH=somewhere lmoe bench ...",
        )


def median_us(function: Callable[[], object], rep_ms: int = 100) -> float:
    from triton.testing import do_bench

    return 1e3 * float(do_bench(function, warmup=25, rep=rep_ms, return_mode="median"))


def first_call_seconds(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Profile:
    """Kernels of a call, longest first: name, launches, microseconds of all of them (means over some calls).

    `busy` are the microseconds in which at least one runs: fewer than the sum where some run side by side.
    """

    times: list[tuple[str, int, float]]
    busy: float


def profiled(function: Callable[[], object], calls: int = 5) -> Profile:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    found = [e for e in recorded.key_averages() if e.device_type.name == "CUDA"]
    times = [(e.key, e.count // calls, float(e.self_device_time_total) / calls) for e in found]
    # One by one, as they ran.
    spans = [e.time_range for e in recorded.events() or () if e.device_type.name == "CUDA"]
    return Profile(
        sorted(times, key=lambda time: -time[2]),
        covered([(span.start, span.end) for span in spans]) / calls,
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def peak_bytes(function: Callable[[], object]) -> int:
    """Most memory in use during the call, above what was in use before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def forward_backward(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], d_output: Tensor
) -> Callable[[], Any]:
    def call() -> Any:
        return torch.autograd.grad(forward(), inputs, d_output)

    return call


def relative_rms(x: Tensor, reference: Tensor) -> float:
    """||x - reference|| / ||reference||; NaN where any element is."""
    return float(
        torch.linalg.vector_norm(x.double() - reference.double())
        / torch.linalg.vector_norm(reference.double())
    )


def versions() -> dict[str, str]:
    """What every table says beside its numbers."""
    found = {"torch": torch.__version__, "triton": metadata.version("triton")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"device": device, **found}
