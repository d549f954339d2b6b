"""One measurement in a fresh process: reads its work from the command line, its turn from standard input; prints JSON.

python -m lmoe_compiler.bench.worker '{"what": "measure", "op": .., "side": "ours", "shape": [..]}' <<< go

first      the very first call, forward and backward
measure    all columns of one cell
compile    a share of the library's configurations, without running them
search     the library's choices for several shapes, one row a shape
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.bench.autotuner import Tuner
from lmoe_compiler.bench.measure import (
    COPY_BANDWIDTH,
    first_call_seconds,
    forward_backward,
    median_us,
    peak_bytes,
    profiled,
)
from lmoe_compiler.bench.plans import bounds
from lmoe_compiler.bench.processes import READY
from lmoe_compiler.bench.workloads import (
    DTYPES,
    SOFTMAX,
    WORKLOADS,
    Library,
    Shape,
    Workload,
    bytes_of,
    make_inputs,
)
from lmoe_compiler.models import RECURRENCES

SHORT = 1024
"""Tokens of a call that is only compiled: divisible by what the library's kernels are specialised on."""


class Side:
    """Whose code is measured: the call on `inputs`, what it is differentiated by, its output and its gradients."""

    def __init__(self, workload: Workload, side: str, shape: Shape, dtype: str = "bf16") -> None:
        inputs = make_inputs(workload, shape, DTYPES[dtype], "cuda")
        library = library_of(workload, side)
        if library is None:
            recurrence = RECURRENCES[workload.name].with_options(implementation="triton")
            self.leaves = list(inputs.values())
            self.forward: Callable[[], Tensor] = lambda: recurrence(**inputs)
        else:
            self.forward, self.leaves = library.bind(inputs)
        # Every side is held to the bytes of the recurrence's own inputs and output.
        self.read, self.written = bytes_of(*inputs.values()), bytes_of(inputs["v"])

    def both(self, d_output: Tensor) -> Callable[[], Any]:
        return forward_backward(self.forward, self.leaves, d_output)


def library_of(workload: Workload, side: str) -> Library | None:
    if side == "ours":
        return None
    library = SOFTMAX if side == "softmax" else workload.library
    assert library is not None, f"no library call for {workload.name}"
    return library


def first(work: dict[str, Any], side: Side) -> dict[str, Any]:
    row = {"first_call_s": first_call_seconds(side.forward)}
    with torch.no_grad():
        o = side.forward()
    row["first_backward_s"] = first_call_seconds(side.both(torch.randn_like(o)))
    return row


def measure(work: dict[str, Any], side: Side) -> dict[str, Any]:
    """Bytes of the floor: every input and output once; in the backward gradients too."""
    row: dict[str, Any] = first(work, side)
    o = side.forward().detach()
    both = side.both(torch.randn_like(o))
    with torch.no_grad():
        row["forward_us"] = median_us(side.forward)
        found = {"forward": profiled(side.forward)}
    row["both_us"] = median_us(both)
    found["both"] = profiled(both)
    for direction, one in found.items():
        row[f"{direction}_kernels"] = sum(count for _, count, _ in one.times)
        row[f"{direction}_busy_us"] = one.busy
    row["kernels"] = {direction: one.times for direction, one in found.items()}
    if work["side"] == "ours":
        row["bounds"] = bounds(work["op"], tuple(work["shape"]), work["dtype"])
    row["peak_mib"] = peak_bytes(both) / 2**20
    row["forward_floor_us"] = 1e6 * (side.read + side.written) / COPY_BANDWIDTH
    row["both_floor_us"] = 1e6 * (3 * side.read + 2 * side.written) / COPY_BANDWIDTH
    row["finite"] = all(bool(x.isfinite().all()) for x in (o, *both()))
    row["sample"] = o[-1, -1, -1, :8].tolist()
    return row


def compile_share(work: dict[str, Any]) -> None:
    """Forward and backward of a short call with nothing launched: results are whatever was in memory."""
    batch, length, heads, size = work["shape"]
    side = Side(WORKLOADS[work["op"]], "fla", (batch, min(length, SHORT), heads, size))
    side.both(torch.empty_like(side.forward()))()


def search(work: dict[str, Any], tuner: Tuner) -> None:
    """The choices for one shape after the other, each as if it were the only one."""
    for shape in work["shapes"]:
        tuner.forget()
        side = Side(WORKLOADS[work["op"]], "fla", tuple(shape))
        o = side.forward()
        side.both(torch.randn_like(o))()
        answer({"op": work["op"], "shape": shape, "chosen": tuner.chosen})


def answer(row: dict[str, Any]) -> None:
    print(json.dumps(row), flush=True)


def main() -> None:
    work: dict[str, Any] = json.loads(sys.argv[1])
    what, side = work["what"], work.get("side", "fla")
    library = library_of(WORKLOADS[work["op"]], side)
    tuner = Tuner(
        {"compile": "compile", "search": "search"}.get(what, "replay"),  # type: ignore[arg-type]
        work.get("chosen"),
        tuple(work.get("share", (0, 1))),
    )
    if library is not None:
        library.find()
    if side == "fla":
        tuner.install()
    torch.zeros(1, device="cuda")
    print(READY, end="", flush=True)
    sys.stdin.readline()
    if what == "compile":
        compile_share(work)
    elif what == "search":
        search(work, tuner)
    else:
        side_of = Side(WORKLOADS[work["op"]], side, tuple(work["shape"]), work["dtype"])
        row = {"first": first, "measure": measure}[what](work, side_of)
        answer(work | row | {"chosen": None, "searched": tuner.searched})


if __name__ == "__main__":
    main()
