"""A GPU that nobody has measured: what `explain` says of it, and the check of a plan's numbers when it is first used.

The check runs the same kernels on the first tokens of the call and ATen in fp32 on the same, and compares. It waits
for the device once; while a CUDA graph is captured that is impossible, and the check is left to the next call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.codegen import cost
from lmoe_compiler.codegen.gradients import gathered
from lmoe_compiler.codegen.launch import Executable
from lmoe_compiler.codegen.launcher import interpreting
from lmoe_compiler.codegen.plan import KEPT_SPAN, OUTPUT
from lmoe_compiler.config import Options
from lmoe_compiler.errors import WrongResult
from lmoe_compiler.lower import execute

if TYPE_CHECKING:
    from lmoe_compiler.codegen.compiled import Request

MEASURED = frozenset(device.name for device in cost.DEVICES)
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.005, torch.float32: 1e-3}
"""Relative RMS error: a wrong kernel is off by much more, a right one by a quarter of this or less."""


def unknown() -> bool:
    """Whether plans for the current device come from another device's rules."""
    return not interpreting() and cost.device().name not in MEASURED


def notes() -> list[str]:
    if not unknown():
        return []
    return [
        f"{cost.device().name} has not been measured: the plan is that of an H100, and its numbers are compared"
        " with ATen's at first use; `lmoe bench tune` finds the fastest plans of this device"
    ]


def verified(request: Request, executable: Executable, given: Sequence[Tensor]) -> bool:
    """Whether the plan may be used without another look; raises where its numbers are wrong."""
    if not unknown():
        return True
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    named = dict(zip(request.names, given, strict=True))
    short = shortened(request, named, executable.plan.chunk)
    found, expected = by_kernels(request, executable, short), by_aten(request, short)
    dtype = request.inputs[0].dtype
    for name, x, y in zip(request.results, found, expected, strict=False):
        error = (x.float() - y.float()).norm() / y.float().norm().clamp_min(1e-12)
        if not error <= TOLERANCE[dtype]:
            raise WrongResult(
                f"generated kernels of {request.program.name} are wrong on {cost.device().name}: "
                f"{name} is off by {float(error):.1e} ({request.direction})",
                why="this GPU has not been measured, so the plan was compared with ATen at first use",
                try_='r.with_options(implementation="torch"), and please report it',
            )
    return True


def shortened(request: Request, named: dict[str, Tensor], chunk: int) -> dict[str, Tensor]:
    """The first sequence's first tokens, two chunks and a ragged end; packed, they are two documents.

    Fewer than one kept state is for, so that states are kept at the start only.
    """
    _, length = request.lengths
    tokens = min(length, 2 * chunk + 7, KEPT_SPAN - 1)
    documents = 1 if request.documents is None else 2
    starts = zip(request.kept, request.program.states, strict=False)
    kept = {name: named.get(f"{var.name}_start") for name, var in starts}
    kinds = {var.name: var.kind for var in request.program.inputs} | {"do": "token"}
    short = {}
    for name, x in named.items():
        if name == "cu_seqlens":
            x = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32, device=x.device)
        elif kinds.get(name) == "token":
            x = x[:1] if request.is_step else x[:1, :tokens]
        elif name not in kinds:
            if name in kept:
                start = kept[name]
                x = torch.zeros_like(x[:1]) if start is None else start.to(x.dtype)
            x = x[:1].expand(documents, *x.shape[1:])
        short[name] = x.clone(memory_format=torch.contiguous_format)
    return short


def by_kernels(request: Request, executable: Executable, short: dict[str, Tensor]) -> list[Tensor]:
    inputs = [short[var.name] for var in request.program.inputs]
    documents = None if request.documents is None else 2
    small = replace(request, inputs=inputs, documents=documents)
    results = executable(executable.prepare(small.extent), [*short.values()])
    results = results[
        : len(results) - (0 if request.is_step or request.is_backward else len(request.kept))
    ]
    if not request.is_backward:
        return results
    count = len(inputs)
    return [*gathered(request.program, inputs, results[:count]), *results[count:]]


def by_aten(request: Request, short: dict[str, Tensor]) -> list[Tensor]:
    program, options = request.program, Options()
    inputs = [short[var.name].float() for var in program.inputs]
    states = None
    if request.has_states:
        states = [short[f"{var.name}_start"] for var in program.states]
    offsets = short.get("cu_seqlens")
    if request.is_step:
        o, following = execute.step(program, inputs, states, options)
        return [o, *following]
    if not request.is_backward:
        o, finals, _ = execute.scan(program, inputs, states, offsets, options)
        return [o, *finals] if OUTPUT in request.results else finals
    d_output = short.get("do")
    if d_output is None:
        sizes = layout.measure(program, inputs, states or (), offsets)
        d_output = inputs[0].new_zeros(()).expand(sizes.output(program))
    d_ends = [short.get(f"d{var.name}_end") for var in program.states]
    grads, d_states = execute.scan_backward(
        program, inputs, states, offsets, (), d_output.float(), d_ends, options
    )
    return [*grads, *(d_states or ())]
