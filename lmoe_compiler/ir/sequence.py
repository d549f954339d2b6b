"""A function of one token, applied along T: grouped heads, initial states and packed documents.

Layouts: tokens [B, T, H, *axes], heads [H, *axes], states [N, H, *axes] with N = B, or the number of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lmoe_compiler.ir.nodes import Var

# (states [B, H, *axes], inputs [B, H, *axes] and heads [H, *axes]) -> (next states, output [B, H, *axes])
TokenFunction = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Tensor]]


def over_tokens(
    step: TokenFunction,
    state_vars: Sequence[Var],
    input_vars: Sequence[Var],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, T, H, *axes] and final states [N, H, *axes] of `step` repeated over T."""
    inputs = widen_heads(input_vars, inputs)
    batch, length = next(
        x.shape[:2] for v, x in zip(input_vars, inputs, strict=True) if v.kind == "token"
    )
    spans = [(0, length)] if cu_seqlens is None else list(_pairs(cu_seqlens.tolist()))
    if states is None:
        count = batch if cu_seqlens is None else len(spans)
        states = zero_states(state_vars, input_vars, inputs, count)
    outputs: list[Tensor] = []
    finals: list[list[Tensor]] = []
    for i, (start, stop) in enumerate(spans):
        now = list(states) if cu_seqlens is None else [s[i : i + 1] for s in states]
        for t in range(start, stop):
            next_states, output = step(now, _token(input_vars, inputs, t))
            now = list(next_states)
            outputs.append(output)
        finals.append(now)
    final = [
        torch.cat(parts) if parts else s[:0] for s, *parts in zip(states, *finals, strict=True)
    ]
    if not outputs:
        zero = [x.new_zeros(x.shape[0], *x.shape[2:]) if v.kind == "token" else x
                for v, x in zip(input_vars, inputs, strict=True)]  # fmt: skip
        _, like = step(zero_states(state_vars, input_vars, inputs, batch), zero)
        return like.unsqueeze(1)[:, :0], final
    return torch.stack(outputs, dim=1), final


def widen_heads(input_vars: Sequence[Var], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Every input with the widest input's number of heads: head h reads group h // factor."""
    dims = [2 if v.kind == "token" else 0 for v in input_vars]
    heads = max(x.shape[d] for x, d in zip(inputs, dims, strict=True))
    return [
        x if x.shape[d] == heads else x.repeat_interleave(heads // x.shape[d], dim=d)
        for x, d in zip(inputs, dims, strict=True)
    ]


def zero_states(
    state_vars: Sequence[Var], input_vars: Sequence[Var], inputs: Sequence[Tensor], count: int
) -> list[Tensor]:
    """Zeros [count, H, *axes] in the inputs' promoted dtype, fp32 at least. `inputs` have equal heads."""
    sizes: dict[str, int] = {}
    dtype = torch.float32
    for var, x in zip(input_vars, inputs, strict=True):
        lead = 3 if var.kind == "token" else 1
        sizes.update(zip((a.rstrip("'") for a in var.axes), x.shape[lead:], strict=True))
        heads = x.shape[lead - 1]
        dtype = torch.promote_types(dtype, x.dtype)
    like = inputs[0]
    return [
        torch.zeros(
            count, heads, *(sizes[a.rstrip("'")] for a in v.axes), dtype=dtype, device=like.device
        )
        for v in state_vars
    ]


def _token(input_vars: Sequence[Var], inputs: Sequence[Tensor], t: int) -> list[Tensor]:
    return [x[:, t] if v.kind == "token" else x for v, x in zip(input_vars, inputs, strict=True)]


def _pairs(offsets: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(offsets))
