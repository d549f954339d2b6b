"""Softmax over the earlier keys of each query's document, without a mask of queries by keys that lasts.

Queries are a stretch of the sequence, `offset` tokens into its keys: on a shard of it keys are everybody's. Kept for
the backward are the operands, the result, and one number (the logarithm of its softmax's sum) for each query and head.

    CUDA, 16 bit    torch's flash attention of sequences with lengths of their own: a document in a row is one
    elsewhere       blocks of queries against all keys that they may see, in float32 or wider

No value is read on the host but on a CPU, where that waits for nobody. Notation: B rows, T queries, S keys, H query
heads, G key-value heads, E and F sizes of a key's and a value's head, N documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.flops import flop_formula

# Scores that are alive at once.
_BLOCK = 1 << 22


@torch.library.custom_op("lmoe::document_attention", mutates_args=())
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [B, T, H, E], k [B, S, G, E], v [B, S, G, F], cu_seqlens [N + 1] of the keys' sequence, offset [1] ->
    [B, T, H, F] and the logarithms [H, B T].
    """
    if _flash(q, v):
        edges = _edges(q, k, cu_seqlens, offset)
        call = torch.ops.aten._flash_attention_forward
        o, log, *_ = call(*_packed(q, k, v), *edges, q.shape[1], k.shape[1], 0.0, True, False)
        return o.view(*q.shape[:3], v.shape[-1]), log
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    logs = q.new_empty(q.shape[2], *q.shape[:2], dtype=_wide(q))
    for queries, keys, mask in _blocks(q, k, cu_seqlens, offset):
        scores = _scores(q[:, queries], k[:, keys], mask)
        log = scores.logsumexp(-1)
        o[:, queries] = _by_token(_times((scores - log.unsqueeze(-1)).exp(), v[:, keys]))
        logs[:, :, queries] = log.flatten(1, 2).transpose(0, 1)
    return o, logs.flatten(1)


@torch.library.custom_op("lmoe::document_attention_backward", mutates_args=())
def document_attention_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    logs: Tensor,
    cu_seqlens: Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from scores that are computed again."""
    if _flash(q, v):
        edges = _edges(q, k, cu_seqlens, offset)
        # Only dropout, which there is none of, would read these.
        unused = (q.new_zeros(2, dtype=torch.uint64), q.new_empty(0))
        given = (*_packed(d_o, q, k, v, o), logs, *edges, q.shape[1], k.shape[1])
        grads = torch.ops.aten._flash_attention_backward(*given, 0.0, True, *unused)
        d_q, d_k, d_v = (grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))
        return d_q, d_k, d_v
    d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    d_k, d_v = (x.new_zeros(x.shape, dtype=_wide(q)) for x in (k, v))
    by_query = logs.unflatten(1, q.shape[:2])
    for queries, keys, mask in _blocks(q, k, cu_seqlens, offset):
        scores = _scores(q[:, queries], k[:, keys], mask)
        log = by_query[:, :, queries].transpose(0, 1).unflatten(1, scores.shape[1:3])
        p = (scores - log.unsqueeze(-1)).exp()
        d_result, result, asked = (_by_head(x[:, queries], k) for x in (d_o, o, q))
        d_p = _times(d_result, v[:, keys], transposed=True)
        along = (d_result * result).sum(-1, keepdim=True)
        d_scores = p * (d_p - along) / math.sqrt(q.shape[-1])
        d_q[:, queries] = _by_token(_times(d_scores, k[:, keys]))
        d_k[:, keys] += torch.einsum("bgrts,bgrte->bsge", d_scores, asked)
        d_v[:, keys] += torch.einsum("bgrts,bgrtf->bsgf", p, d_result)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


@document_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, tokens, heads, _ = q.shape
    logs = q.new_empty(heads, rows * tokens, dtype=_wide(q))
    return q.new_empty(rows, tokens, heads, v.shape[-1]), logs


@document_attention_backward.register_fake
def _(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_q, d_k, d_v = (x.new_empty(x.shape) for x in (q, k, v))
    return d_q, d_k, d_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *places = inputs
    ctx.save_for_backward(q, k, v, *output, *places)


def _backward(ctx: Any, d_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*document_attention_backward(d_o, *ctx.saved_tensors), None, None)


document_attention.register_autograd(_backward, setup_context=_save)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _by_head(x: Tensor, k: Tensor) -> Tensor:
    """Of queries, [B, t, H, E] -> [B, G, H/G, t, E]: heads that share their keys beside each other."""
    return x.to(_wide(x)).unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)


def _by_token(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _times(x: Tensor, keys: Tensor, transposed: bool = False) -> Tensor:
    """x [B, G, H/G, t, s] and keys [B, s, G, E] -> [B, G, H/G, t, E]; transposed: the other way."""
    matrix = (
        keys.to(x.dtype).permute(0, 2, 3, 1) if transposed else keys.to(x.dtype).transpose(1, 2)
    )
    return (x.flatten(2, 3) @ matrix).unflatten(2, x.shape[2:4])


def _scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """q [B, t, H, E], k [B, s, G, E], mask [t, s] -> [B, G, H/G, t, s]."""
    scores = _times(_by_head(q, k), k, transposed=True) / math.sqrt(q.shape[-1])
    return scores.masked_fill_(~mask, -torch.inf)


def _blocks(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, offset: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some queries, keys that have all they see among them, and which of these each one sees."""
    rows, length, heads, _ = q.shape
    count = max(1, _BLOCK // max(1, rows * heads * k.shape[1]))
    keys = torch.arange(k.shape[1], device=k.device)
    queries = torch.arange(length, device=q.device)
    queries = queries if offset is None else queries + offset
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].long().contiguous()
        key_document, document = (torch.searchsorted(ends, x, right=True) for x in (keys, queries))
    for start in range(0, length, count):
        here = slice(start, min(start + count, length))
        first = 0 if cu_seqlens is None else torch.searchsorted(key_document, document[start])
        on_host = q.device.type == "cpu"
        seen = slice(int(first), int(queries[here.stop - 1]) + 1) if on_host else slice(None)
        mask = queries[here, None] >= keys[seen]
        if cu_seqlens is not None:
            mask &= document[here, None] == key_document[seen]
        yield here, seen, mask


def _flash(q: Tensor, v: Tensor) -> bool:
    """Whether torch's flash attention takes these."""
    size, half = q.shape[-1], q.dtype in (torch.float16, torch.bfloat16)
    fits = size == v.shape[-1] and size % 8 == 0 and size <= 256
    return q.is_cuda and half and fits and q.numel() > 0


def _packed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous().flatten(0, 1) for x in tensors)


def _edges(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where sequences begin among all rows' queries and keys, [B (N + 2) + 1] int32 each.

    A document's queries are its last ones here, and its keys end with them: flash attention puts the last query of a
    sequence at its last key. Keys behind are sequences without queries.
    """
    (rows, length), total = q.shape[:2], k.shape[1]
    first = torch.zeros(1, dtype=torch.int64, device=q.device)
    starts = first if cu_seqlens is None else cu_seqlens.to(torch.int64)
    edges = torch.cat([starts, torch.full_like(first, total)])
    first = first if offset is None else offset
    row = torch.arange(rows, device=q.device).unsqueeze(1)
    of_queries = (edges - first).clamp(0, length) + row * length
    of_keys = torch.minimum(edges, first + length) + row * total
    ends = (torch.full((1,), rows * size, device=q.device) for size in (length, total))
    by_query, by_key = (
        torch.cat([x.flatten(), end]).to(torch.int32)
        for x, end in zip((of_queries, of_keys), ends, strict=True)
    )
    return by_query, by_key


def _products(q: Sequence[int], k: Sequence[int], v: Sequence[int]) -> tuple[int, int]:
    """Operations of queries with all keys, and of scores with all values, as torch counts softmax attention."""
    pairs = 2 * math.prod(q[:3]) * k[1]
    return pairs * q[3], pairs * v[3]


@flop_formula(torch.ops.lmoe.document_attention)
def _flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, **__: object) -> int:
    return sum(_products(q, k, v))


@flop_formula(torch.ops.lmoe.document_attention_backward)
def _backward_flops(
    d_o: Sequence[int],
    q: Sequence[int],
    k: Sequence[int],
    v: Sequence[int],
    *_: object,
    **__: object,
) -> int:
    keys, values = _products(q, k, v)
    return 3 * keys + 2 * values
