"""The five functions of an implementation (implementation.py) by generated Triton kernels.

On CUDA tensors, and on CPU tensors where Triton runs its interpreter (TRITON_INTERPRET=1; half precision is then
computed in fp32). What has no generated kernel yet runs through lower/execute.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.codegen.cost import choose
from lmoe_compiler.codegen.describe import header
from lmoe_compiler.codegen.launch import Executable, Extent, interpreting
from lmoe_compiler.codegen.partition import Call, backward_plan, forward_plan, step_plan
from lmoe_compiler.codegen.plan import KEPT_SPAN, Choice, kept_states
from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.lower.adjoint import adjoint
from lmoe_compiler.lower.chunk import NoChunkForm, chunk_program
from lmoe_compiler.lower.program import ChunkAdjoint, ChunkProgram

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LARGEST = 256

Tensors = Sequence[Tensor]


def unsupported(program: Program, inputs: Tensors, options: Options) -> str | None:
    """Why no kernels are generated for this call, or None."""
    if inputs[0].dtype not in DTYPES:
        return f"kernels compute in bf16, fp16 or fp32, not {inputs[0].dtype}"
    for name, size in _sizes(program, inputs).items():
        if size > LARGEST:
            return f"{name} = {size} is larger than {LARGEST}, the longest axis that a kernel holds"
    try:
        _chunk(program)
    except NoChunkForm as reason:
        return str(reason)
    return None


def scan(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output, final states, and the states that the backward starts from."""
    executable, extent = _compiled("forward", program, inputs, states, cu_seqlens, (), options)
    tensors = _arguments(program, inputs, states)
    dtype = inputs[_first_token(program)].dtype
    results = executable(tensors, {"o": _computed(dtype)}, extent, cu_seqlens)
    finals = [results[f"{var.name}_end"] for var in program.states]
    return results["o"].to(dtype), finals, [results[v.name] for v in kept_states(program)]


def saved(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """Empty tensors like those that `scan` keeps; sizes may be symbolic."""
    first = inputs[_first_token(program)]
    heads = layout.measure(program, inputs, (), None).heads
    batch, length = first.shape[:2]
    sizes, kept = _sizes(program, inputs), kept_states(program)
    extent = Extent(
        batch, length, 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, cu_seqlens is not None
    )
    return [
        first.new_empty(
            extent.slots(value.span), heads, *(sizes[a] for a in value.axes), dtype=torch.float32
        )
        for value in kept
    ]


def scan_backward(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    saved: Tensors,
    d_output: Tensor,
    d_states: Sequence[Tensor | None],
    options: Options,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Gradients of inputs (in their shapes and dtypes) and of initial states."""
    given = tuple(d is not None for d in d_states)
    executable, extent = _compiled("backward", program, inputs, states, cu_seqlens, given, options)
    tensors = _arguments(program, inputs, states) | {"do": _ready(d_output)}
    tensors |= {v.name: x for v, x in zip(kept_states(program), saved, strict=True)}
    for var, d in zip(program.states, d_states, strict=True):
        if d is not None:
            tensors[f"d{var.name}_end"] = d.float().contiguous()
    heads = executable.plan.heads
    wanted = {
        f"d{var.name}": _computed(x.dtype)
        if var.kind == "head" or x.shape[2] == heads
        else torch.float32
        for var, x in zip(program.inputs, inputs, strict=True)
    }
    results = executable(tensors, wanted, extent, cu_seqlens)
    grads = [
        _gathered(results[f"d{var.name}"], x, var.kind)
        for var, x in zip(program.inputs, inputs, strict=True)
    ]
    if states is None:
        return grads, None
    return grads, [results[f"d{var.name}_start"] for var in program.states]


def source(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> str:
    """The generated modules of a call, forward then backward, as text."""
    given = tuple(True for _ in program.states)
    forward, _ = _compiled("forward", program, inputs, states, cu_seqlens, (), options)
    backward, _ = _compiled("backward", program, inputs, states, cu_seqlens, given, options)
    return forward.text + "\n\n" + backward.text


def span_map(program: Program, inputs: Tensors, cu_seqlens: Tensor | None, options: Options) -> Any:
    return _torch().span_map(program, inputs, cu_seqlens, options)


def span_map_backward(
    program: Program,
    inputs: Tensors,
    cu_seqlens: Tensor | None,
    d_maps: Sequence[Tensor | None],
    d_ends: Sequence[Tensor | None],
    options: Options,
) -> Any:
    return _torch().span_map_backward(program, inputs, cu_seqlens, d_maps, d_ends, options)


def step(
    program: Program, inputs: Tensors, states: Tensors | None, options: Options
) -> tuple[Tensor, list[Tensor]]:
    """One token [B, H, ...]: output and next states, one launch."""
    rows = [
        x.unsqueeze(1) if v.kind == "token" else x
        for v, x in zip(program.inputs, inputs, strict=True)
    ]
    executable, extent = _compiled("step", program, rows, states, None, (), options)
    dtype = inputs[_first_token(program)].dtype
    tensors = _arguments(program, inputs, states)
    results = executable(tensors, {"o": _computed(dtype)}, extent, None)
    return results["o"].to(dtype), [results[f"{var.name}_end"] for var in program.states]


@cache
def _torch() -> Any:
    return importlib.import_module("lmoe_compiler.lower.execute")


# ---- compiled plans


_executables: dict[tuple[Any, ...], Executable] = {}
_kept: list[Program] = []


def forget() -> None:
    """Drops compiled plans, so that the next call plans again."""
    _executables.clear()


def _compiled(
    direction: str,
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    given: tuple[bool, ...],
    options: Options,
) -> tuple[Executable, Extent]:
    """The executable for these shapes (T excepted) and the lengths of this call."""
    first = _first_token(program)
    batch, length = inputs[first].shape[:2]
    key = (
        direction,
        id(program),
        tuple(
            x.shape[2:] if v.kind == "token" else x.shape
            for v, x in zip(program.inputs, inputs, strict=True)
        ),
        tuple(x.dtype for x in inputs),
        states is None,
        cu_seqlens is None,
        given,
        options.chunk_size,
        (batch, length.bit_length()),
    )
    executable = _executables.get(key)
    if executable is None:
        executable = _executables[key] = _build(
            direction, program, inputs, states, cu_seqlens, given, options
        )
        _kept.append(program)
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return executable, Extent(batch, length, sequences, cu_seqlens is not None)


def _build(
    direction: str,
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    given: tuple[bool, ...],
    options: Options,
) -> Executable:
    heads = {
        v.name: x.shape[2 if v.kind == "token" else 0]
        for v, x in zip(program.inputs, inputs, strict=True)
    }
    first = inputs[_first_token(program)]
    call = Call(
        tuple(_sizes(program, inputs).items()),
        max(heads.values()),
        tuple(heads.items()),
        DTYPES[first.dtype],
        cu_seqlens is not None,
        states is not None,
        given or tuple(False for _ in program.states),
    )
    choice = choose(program, direction, call, first.shape[0], first.shape[1])
    if options.chunk_size is not None:
        choice = _with_chunk(choice, options.chunk_size)
    if direction == "step":
        plan = step_plan(program, choice, call)
    elif direction == "forward":
        plan = forward_plan(_chunk(program), choice, call)
    else:
        plan = backward_plan(_adjoint(program), choice, call)
    return Executable(plan, header(plan))


def _with_chunk(choice: Choice, size: int) -> Choice:
    return replace(choice, chunk=min(max(16, 1 << (size - 1).bit_length()), KEPT_SPAN))


_chunks: dict[int, tuple[Program, ChunkProgram]] = {}
_adjoints: dict[int, tuple[Program, ChunkAdjoint]] = {}


def _chunk(program: Program) -> ChunkProgram:
    if id(program) not in _chunks:
        _chunks[id(program)] = program, chunk_program(program)
    return _chunks[id(program)][1]


def _adjoint(program: Program) -> ChunkAdjoint:
    if id(program) not in _adjoints:
        _adjoints[id(program)] = program, adjoint(_chunk(program))
    return _adjoints[id(program)][1]


def _sizes(program: Program, inputs: Tensors) -> dict[str, int]:
    sizes = dict(program.static)
    for var, x in zip(program.inputs, inputs, strict=True):
        shape = x.shape[len(x.shape) - len(var.axes) :]
        sizes |= dict(zip((a.rstrip("'") for a in var.axes), shape, strict=True))
    return sizes


# ---- tensors in and out


@cache
def _first_token_of(kinds: tuple[str, ...]) -> int:
    return kinds.index("token")


def _first_token(program: Program) -> int:
    return _first_token_of(tuple(v.kind for v in program.inputs))


def _computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels see a tensor: the interpreter multiplies bit patterns of bf16."""
    return torch.float32 if interpreting() else dtype


def _ready(x: Tensor) -> Tensor:
    return x.to(_computed(x.dtype)).contiguous()


def _arguments(program: Program, inputs: Tensors, states: Tensors | None) -> dict[str, Tensor]:
    tensors = {var.name: _ready(x) for var, x in zip(program.inputs, inputs, strict=True)}
    if states is not None:
        tensors |= {
            f"{var.name}_start": x.float().contiguous()
            for var, x in zip(program.states, states, strict=True)
        }
    return tensors


def _gathered(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """The gradient in the input's shape: chunks' parts of a head parameter and heads of a group are summed."""
    if kind == "head":
        grad = grad.sum(0)
        if grad.shape[0] != x.shape[0]:
            grad = grad.reshape(x.shape[0], -1, *x.shape[1:]).sum(1)
    elif grad.shape[2] != x.shape[2]:
        grad = grad.reshape(*x.shape[:3], -1, *x.shape[3:]).sum(3)
    return grad.to(x.dtype)
