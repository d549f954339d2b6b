"""The five functions of a recurrence on CPU, with ATen: the implementation behind the ops when there are no kernels.

Programs with a chunk form run by chunked.py, all others token by token by sequential.py. Packed documents become
rows of padded batches (rows.py). Nothing is kept for the backward but the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.layout import Sizes
from lmoe_compiler.lower import chunked, sequential, spans
from lmoe_compiler.lower.rows import Packing, packings

__all__ = ["scan", "scan_backward", "span_map", "span_map_backward", "step", "step_"]

Tensors = Sequence[Tensor]
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 128


def scan(
    program: Program,
    inputs: Tensors,
    states: Tensors | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output [B, T, H, *axes], final states [N, H, *axes], and nothing to keep."""
    sizes = layout.measure(program, inputs, states or (), cu_seqlens)
    initial = initial_states(program, sizes, inputs, states)
    if chunked.chunk_form(program) is None:
        return *sequential.scan(program, sizes, inputs, initial, cu_seqlens), []
    if cu_seqlens is None:
        output, finals = chunked.scan(_rows(program, sizes, inputs, options), initial)
        return output, _separate(finals, initial), []
    output = inputs[layout.first_token(program)].new_empty(sizes.output(program))
    finals = [x.clone() for x in initial]
    for packing in packings(cu_seqlens):
        rows = _rows(program, sizes, inputs, options, packing)
        o, ends = chunked.scan(rows, [x[packing.documents] for x in initial])
        packing.scatter(o, output)
        for final, end in zip(finals, ends, strict=True):
            final[packing.documents] = end
    return output, finals, []


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
    """Gradients of inputs, in their shapes and dtypes, and of the initial states where there are any."""
    sizes = layout.measure(program, inputs, states or (), cu_seqlens)
    initial = initial_states(program, sizes, inputs, states)
    ends = [
        torch.zeros_like(x) if d is None else d.to(x.dtype)
        for x, d in zip(initial, d_states, strict=True)
    ]
    if chunked.chunk_form(program) is None:
        d_inputs, d_initial = sequential.scan_backward(
            program, sizes, inputs, initial, cu_seqlens, d_output, ends
        )
    elif cu_seqlens is None:
        rows = _rows(program, sizes, inputs, options)
        d_inputs, d_initial = chunked.scan_backward(rows, initial, d_output, ends)
    else:
        d_inputs, d_initial = [x.new_zeros(x.shape) for x in inputs], [x.clone() for x in ends]
        for packing in packings(cu_seqlens):
            rows = _rows(program, sizes, inputs, options, packing)
            parts, starts = chunked.scan_backward(
                rows,
                [x[packing.documents] for x in initial],
                packing.gather(d_output),
                [x[packing.documents] for x in ends],
            )
            for i, (var, part) in enumerate(zip(program.inputs, parts, strict=True)):
                if var.kind == "token":
                    packing.scatter(part, d_inputs[i])
                else:
                    d_inputs[i] = d_inputs[i] + part
            for d, start in zip(d_initial, starts, strict=True):
                d[packing.documents] = start
    d_inputs = [d.to(x.dtype) for d, x in zip(d_inputs, inputs, strict=True)]
    if states is None:
        return d_inputs, None
    d_initial = _separate(d_initial, ends)
    return d_inputs, [d.to(x.dtype) for d, x in zip(d_initial, states, strict=True)]


def span_map(
    program: Program, inputs: Tensors, cu_seqlens: Tensor | None, options: Options
) -> tuple[list[Tensor | None], list[Tensor]]:
    """M (None for the identity, [B, H], [B, H, K], ...) and E [B, H, *axes] of each state."""

    def finals(derived: Program, given: Tensors, start: list[Tensor]) -> list[Tensor]:
        derived, tokens = spans.last_document(derived, given, cu_seqlens)
        sizes = layout.measure(derived, tokens, start, None)
        if chunked.chunk_form(derived) is None:
            _, ends = sequential.scan(derived, sizes, tokens, start, None)
        else:
            ends = chunked.final_states(_rows(derived, sizes, tokens, options), start)
        return _separate(ends, start)

    return spans.span_map(program, inputs, cu_seqlens, finals)


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
        derived: Program, given: Tensors, start: list[Tensor], ends: list[Tensor]
    ) -> list[Tensor]:
        derived, tokens = spans.last_document(derived, given, cu_seqlens)
        sizes = layout.measure(derived, tokens, start, None)
        if chunked.chunk_form(derived) is None:
            zero = tokens[0].new_zeros(()).expand(sizes.output(derived))
            grads, _ = sequential.scan_backward(derived, sizes, tokens, start, None, zero, ends)
        else:
            rows = _rows(derived, sizes, tokens, options)
            grads, _ = chunked.scan_backward(rows, start, None, ends)
        return grads[: len(given)]

    grads = spans.span_map_backward(program, inputs, cu_seqlens, d_maps, d_ends, pullback)
    return [grad.to(x.dtype).contiguous() for grad, x in zip(grads, inputs, strict=True)]


def step(
    program: Program, inputs: Tensors, states: Tensors | None, options: Options
) -> tuple[Tensor, list[Tensor]]:
    """One token of every sequence: inputs [B, H, *axes], output [B, H, *axes], next states."""
    sizes = layout.measure(program, inputs, states or (), None, step=True)
    initial = initial_states(program, sizes, inputs, states)
    output, finals = sequential.token(program, sizes, inputs, initial)
    return output, _separate(finals, initial)


def step_(program: Program, inputs: Tensors, states: Tensors, options: Options) -> Tensor:
    """The same into `states`; returns the output."""
    output, following = step(program, inputs, states, options)
    for state, new in zip(states, following, strict=True):
        state.copy_(new)
    return output


def initial_states(
    program: Program, sizes: Sizes, inputs: Tensors, states: Tensors | None
) -> list[Tensor]:
    """The given states, or zeros, in the dtype of accumulation."""
    if states is not None:
        return [x.to(sizes.accumulate) for x in states]
    like = inputs[0]
    return [like.new_zeros(sizes.state(var), dtype=sizes.accumulate) for var in program.states]


def chunk_size(program: Program, sizes: Sizes, length: int | None, options: Options) -> int:
    """A power of two (dyadic sums halve it), no longer than the sequence needs.

    By default half the state's widest axis: measured on CPU, smaller chunks win until the states outgrow their rows.
    """
    assert length is not None
    widest = max((sizes.dims.get(a, 1) for var in program.states for a in var.axes), default=1)
    wanted = options.chunk_size or min(max(widest // 2, SMALLEST_CHUNK), LARGEST_CHUNK)
    return 1 << min((wanted - 1).bit_length(), (max(length, 1) - 1).bit_length())


def _rows(
    program: Program,
    sizes: Sizes,
    inputs: Tensors,
    options: Options,
    packing: Packing | None = None,
) -> chunked.Rows:
    """The whole call, or the documents of one packing, as rows."""
    length = sizes.length
    if packing is not None:
        length = packing.tokens.shape[1]
        inputs = [
            packing.gather(x) if var.kind == "token" else x
            for var, x in zip(program.inputs, inputs, strict=True)
        ]
    lengths = None if packing is None else packing.lengths
    chunk = chunk_size(program, sizes, length, options)
    return chunked.Rows(program, sizes, inputs, lengths, chunk)


def _separate(results: Tensors, arguments: Tensors) -> list[Tensor]:
    """Contiguous results that share no memory with the arguments."""
    return [
        x.clone(memory_format=torch.contiguous_format)
        if any(x.data_ptr() == y.data_ptr() for y in arguments)
        else x.contiguous()
        for x in results
    ]
