"""The five functions of an implementation (implementation.py) by generated Triton kernels.

On CUDA tensors, and on CPU tensors where Triton runs its interpreter (TRITON_INTERPRET=1; half precision is then
computed in fp32). A repeated call is a look-up (compiled.py), allocations and launches (launch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.codegen import compiled
from lmoe_compiler.codegen.compiled import forget, report
from lmoe_compiler.codegen.extent import Extent
from lmoe_compiler.codegen.gradients import cast, gathered
from lmoe_compiler.codegen.launcher import interpreting
from lmoe_compiler.codegen.names import printable
from lmoe_compiler.codegen.supported import axis_sizes, unsupported
from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.lower import spans

__all__ = [
    "forget", "report", "saved", "scan", "scan_backward", "source", "span_map", "span_map_backward",
    "step", "step_", "unsupported",
]  # fmt: skip

Tensors = Sequence[Tensor]


def scan(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output, final states, and the states that the backward starts from."""
    o, *rest = _run("forward", program, inputs, states, cu_seqlens, options)
    finals, kept = rest[: len(program.states)], rest[len(program.states) :]
    return cast(o, inputs[layout.first_token(program)].dtype), finals, kept


def saved(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> list[Tensor]:
    """Empty tensors like those that `scan` keeps; sizes may be symbolic."""
    first = inputs[layout.first_token(program)]
    heads = layout.measure(program, inputs, (), None).heads
    batch, length = first.shape[:2]
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes, extent = (
        axis_sizes(program, inputs),
        Extent(batch, length, documents, cu_seqlens is not None),
    )
    dtypes = {"dot": compiled.computed(first.dtype), "fp32": torch.float32}
    return [
        first.new_empty(
            extent.slots(value.span),
            heads,
            *(sizes[a] for a in value.axes),
            dtype=dtypes[value.dtype],
        )
        for value in compiled.kept(program)
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
    results = _run(
        "backward", program, inputs, states, cu_seqlens, options, saved, [d_output], d_states
    )
    count = len(program.inputs)
    grads = gathered(program, inputs, results[:count])
    return grads, None if states is None else results[count:]


def step(
    program: Program, inputs: Tensors, states: Tensors | None, options: Options
) -> tuple[Tensor, list[Tensor]]:
    """One token [B, H, ...]: output and next states, one launch."""
    o, *following = _run("step", program, inputs, states, None, options)
    return cast(o, inputs[layout.first_token(program)].dtype), following


def step_(program: Program, inputs: Tensors, states: Tensors, options: Options) -> Tensor:
    """The same, with the next states written over the given ones; returns the output."""
    if not all(x.is_contiguous() for x in states):
        output, following = step(program, inputs, states, options)
        for state, new in zip(states, following, strict=True):
            state.copy_(new)
        return output
    into = dict(zip((f"{v.name}_end" for v in printable(program).states), states, strict=True))
    o = compiled.call(
        "step_",
        program,
        inputs,
        [*_ready(inputs), *states],
        has_states=True,
        documents=None,
        options=options,
        into=into,
    )[0]
    return cast(o, inputs[layout.first_token(program)].dtype)


def span_map(
    program: Program, inputs: Tensors, cu_seqlens: Tensor | None, options: Options
) -> tuple[list[Tensor | None], list[Tensor]]:
    """M and E of the last document's part of the span, by scans of derived programs; nothing is read on the host."""

    def finals(derived: Program, tokens: Tensors, start: list[Tensor]) -> list[Tensor]:
        starts = [_for_documents(x, cu_seqlens) for x in start]
        derived = with_columns(derived, start[0].shape[-1])
        ends = _run("ends", derived, tokens, starts, cu_seqlens, options)
        ends = ends[: len(derived.states)]
        return [x[-1:] for x in ends] if cu_seqlens is not None else ends

    maps, ends = spans.span_map(program, inputs, cu_seqlens, finals)
    return [None if m is None else m.contiguous() for m in maps], [e.contiguous() for e in ends]


def span_map_backward(
    program: Program,
    inputs: Tensors,
    cu_seqlens: Tensor | None,
    d_maps: Sequence[Tensor | None],
    d_ends: Sequence[Tensor | None],
    options: Options,
) -> list[Tensor]:
    """Gradients of the inputs, in their shapes and dtypes."""

    def pullback(
        derived: Program, tokens: Tensors, start: list[Tensor], ends: list[Tensor]
    ) -> list[Tensor]:
        starts = [_for_documents(x, cu_seqlens) for x in start]
        if cu_seqlens is not None:
            last = [torch.zeros_like(x) for x in starts]
            for x, d in zip(last, ends, strict=True):
                x[-1:] = d
            ends = last
        derived = with_columns(derived, start[0].shape[-1])
        kept = _run("ends", derived, tokens, starts, cu_seqlens, options)[len(derived.states) :]
        results = _run("pullback", derived, tokens, starts, cu_seqlens, options, kept, [], ends)
        return gathered(derived, tokens, results[: len(derived.inputs)])

    return spans.span_map_backward(program, inputs, cu_seqlens, d_maps, d_ends, pullback)


@cache
def with_columns(program: Program, size: int) -> Program:
    """A square map's second axis as an axis of its own: kernels tile the columns, not the rows."""
    (first, *others) = program.states
    if others or not any(axis.endswith("'") for axis in first.axes):
        return program
    axes = tuple(f"{axis[:-1]}_columns" if axis.endswith("'") else axis for axis in first.axes)
    static = (*program.static, *((a, size) for a in axes if a not in first.axes))
    return replace(program, states=(replace(first, axes=axes),), static=static)


def source(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> str:
    """The generated modules of a call, forward then backward, as text."""
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    given, program = tuple(True for _ in program.states), printable(program)
    pages = []
    for direction, ends in (("forward", ()), ("backward", given)):
        request = compiled.Request(
            direction, program, inputs, states is not None, documents, ends, options
        )
        pages.append(compiled.executable_of(request).text)
    return "\n\n".join(pages)


def _run(
    direction: str,
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
    kept: Tensors = (),
    d_output: Tensors = (),
    d_ends: Sequence[Tensor | None] = (),
) -> list[Tensor]:
    given = _ready(inputs)
    if states is not None:
        given += [x if x.is_contiguous() else x.contiguous() for x in states]
    given += kept
    given += _ready(d_output)
    given += [d.contiguous() for d in d_ends if d is not None]
    documents = None
    if cu_seqlens is not None:
        documents = cu_seqlens.shape[0] - 1
        given.append(cu_seqlens.contiguous())
    return compiled.call(
        direction,
        program,
        inputs,
        given,
        has_states=states is not None,
        documents=documents,
        ends=tuple([d is not None for d in d_ends]),
        options=options,
    )


def _ready(tensors: Tensors) -> list[Tensor]:
    """As kernels read them: rows one after another, in the interpreter in fp32."""
    if interpreting():
        tensors = [x.float() for x in tensors]
    return [x if x.is_contiguous() else x.contiguous() for x in tensors]


def _for_documents(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[1, H, *axes] for every document."""
    if cu_seqlens is None:
        return x.contiguous()
    return x.expand(cu_seqlens.shape[0] - 1, *x.shape[1:]).contiguous()
