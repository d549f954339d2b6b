"""One op, one shape, one side (ours or the library's) in a fresh process: prints its numbers as one line of JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.bench.measure import (
    COPY_BANDWIDTH,
    first_call_seconds,
    forward_backward,
    kernels_launched,
    median_us,
    peak_bytes,
)
from lmoe_compiler.bench.workloads import WORKLOADS, Workload, bytes_of, make_inputs
from lmoe_compiler.models import RECURRENCES


def forward_of(workload: Workload, side: str, inputs: dict[str, Tensor]) -> Callable[[], Tensor]:
    if side == "fla":
        assert workload.library is not None
        return workload.library.bind(inputs)
    recurrence = RECURRENCES[workload.name].with_options(implementation="triton")
    return lambda: recurrence(**inputs)


def measure(workload: Workload, shape: tuple[int, int, int, int], side: str) -> dict[str, Any]:
    """All columns of one cell. Bytes: every input and output once; in the backward gradients too."""
    inputs = make_inputs(workload, shape, torch.bfloat16, "cuda")
    forward = forward_of(workload, side, inputs)
    row: dict[str, Any] = {"op": workload.name, "shape": shape, "side": side}
    row["first_call_s"] = first_call_seconds(forward)
    o = forward()
    d_output = torch.randn_like(o)
    leaves = [x for x in inputs.values() if x.requires_grad]
    both = forward_backward(forward, leaves, d_output)
    row["first_backward_s"] = first_call_seconds(both)
    with torch.no_grad():
        row["forward_us"] = median_us(forward)
        row["forward_kernels"] = kernels_launched(forward)
    row["both_us"] = median_us(both)
    row["both_kernels"] = kernels_launched(both)
    row["peak_mib"] = peak_bytes(both) / 2**20
    read, written = bytes_of(*inputs.values()), bytes_of(o)
    row["forward_floor_us"] = 1e6 * (read + written) / COPY_BANDWIDTH
    row["both_floor_us"] = 1e6 * (3 * read + 2 * written) / COPY_BANDWIDTH
    row["finite"] = all(bool(g.isfinite().all()) for g in (o, *both()))
    return row


def main() -> None:
    op, shape, side = json.loads(sys.argv[1])
    print(json.dumps(measure(WORKLOADS[op], tuple(shape), side)))


if __name__ == "__main__":
    main()
