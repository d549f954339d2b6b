"""The CPU implementation: a recurrence's five functions, computed with ATen from its chunk program.

Layouts as everywhere: tokens [B, T, H, *axes], heads [H, *axes], states [N, H, *axes]. In here
tokens are rows [B, H, chunks, C, *axes] in fp32 (fp64 for fp64); packed documents are the batch of a
padded layout (documents.py). schedule.py says what runs for all chunks at once. A program without a
chunk form runs token by token (interpreted.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_compiler import interpreted
from lmoe_compiler.config import Options
from lmoe_compiler.ir.interpret import Value
from lmoe_compiler.ir.nodes import Node, Program
from lmoe_compiler.lower.documents import Part, parts
from lmoe_compiler.lower.program import gradient_name
from lmoe_compiler.lower.rows import Rows
from lmoe_compiler.lower.schedule import Schedule, schedule


def compute_dtype(inputs: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def output_dtype(program: Program, inputs: Sequence[Tensor]) -> torch.dtype:
    return next(x.dtype for v, x in zip(program.inputs, inputs, strict=True) if v.kind == "token")


def scan(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
    options: Options,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Output [B, T, H, *axes], final states [N, H, *axes]; nothing is saved for backward."""
    plan = schedule(program)
    if plan is None:
        return interpreted.scan(program, inputs, states, cu_seqlens, options)
    whole = Rows(program, inputs, options)
    dtype = compute_dtype(inputs)
    documents = inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    output = inputs[0].new_zeros(whole.output_shape, dtype=output_dtype(program, inputs))
    finals = [s.clone() for s in whole.initial(states, documents, dtype)]
    for part in parts(cu_seqlens, whole.length):
        rows, env = _rows(program, inputs, states, part, options, dtype)
        entries, final = rows.loop(plan.forward, env, reverse=False)
        (value,) = rows.evaluate([plan.output], {**env, **entries})
        part.put_tokens(output, rows.tokens(value, program.output.axes).to(output.dtype))
        for into, value in zip(finals, final, strict=True):
            part.put_states(into, value)
    return output, finals, []


def scan_backward(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
    saved: Sequence[Tensor],
    d_output: Tensor,
    d_states: Sequence[Tensor | None],
    options: Options,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Gradients of the inputs (their shapes and dtypes) and of the initial states, if any."""
    plan = schedule(program)
    if plan is None:
        return interpreted.scan_backward(
            program, inputs, states, cu_seqlens, saved, d_output, d_states, options
        )
    dtype = compute_dtype(inputs)
    documents = inputs[0].shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    whole = Rows(program, inputs, options)
    zeros = whole.initial(None, documents, dtype)
    into = [torch.zeros(x.shape, dtype=dtype, device=x.device) for x in inputs]
    ends = [z if d is None else d.to(dtype) for z, d in zip(zeros, d_states, strict=True)]
    entering = [e.clone() for e in ends]
    for part in parts(cu_seqlens, whole.length):
        rows, env = _rows(program, inputs, states, part, options, dtype)
        grads, starts = _backward(
            plan, rows, env, part.tokens(d_output), [part.states(e) for e in ends]
        )
        for var, total, value in zip(program.inputs, into, grads, strict=True):
            if var.kind == "head":
                total += rows.head_gradient(value, var, total.shape[0])
            else:
                part.put_tokens(total, rows.token_gradient(value, var, total.shape[2]))
        for total, value in zip(entering, starts, strict=True):
            part.put_states(total, value)
    typed = [g.to(x.dtype) for g, x in zip(into, inputs, strict=True)]
    if states is None:
        return typed, None
    return typed, [e.to(s.dtype) for e, s in zip(entering, states, strict=True)]


def _rows(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    part: Part,
    options: Options,
    dtype: torch.dtype,
) -> tuple[Rows, dict[Node, Value]]:
    """The layout of one part and the values of the chunk program's leaves."""
    chosen = [
        x if v.kind == "head" else part.tokens(x)
        for v, x in zip(program.inputs, inputs, strict=True)
    ]
    rows = Rows(program, chosen, options, part.valid)
    env = rows.leaves(chosen, dtype)
    entry = None if states is None else [part.states(s) for s in states]
    initial = rows.initial(entry, rows.batch, dtype)
    env.update((v.node, Value(s, v.axes)) for v, s in zip(program.states, initial, strict=True))
    return rows, env


def _backward(
    plan: Schedule,
    rows: Rows,
    env: dict[Node, Value],
    d_output: Tensor,
    d_states: Sequence[Tensor],
) -> tuple[list[Value], list[Tensor]]:
    program = rows.program
    dtype = next(iter(env.values())).tensor.dtype
    entries, _ = rows.loop(plan.forward, env, reverse=False)
    env = {**env, **entries, **rows.output_gradient(d_output, dtype)}
    for var, leaf, d in zip(program.states, plan.backward.carried, d_states, strict=True):
        assert leaf.name == gradient_name(var)
        env[leaf] = Value(d.to(dtype), var.axes)
    exits, starts = rows.loop(plan.backward, env, reverse=True)
    return rows.evaluate(plan.input_grads, {**env, **exits}), starts


span_map = interpreted.span_map
span_map_backward = interpreted.span_map_backward
step = interpreted.step
