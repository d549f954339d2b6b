"""Softmax attention over packed documents and of shards: the same as with a mask, and nothing kept of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.models import document_attention as module
from lmoe_compiler.models.attention import attention
from lmoe_compiler.models.document_attention import document_attention, document_attention_backward

LENGTH = 14
DOCUMENTS = [None, (0, 14), (0, 5, 5, 9, 14), (0, 3, 10)]
# (offset, queries): a shard at the start, in the middle, at the end, a whole sequence, none at all.
SHARDS = [(0, 5), (4, 6), (9, 5), (None, LENGTH), (7, 0)]
CASES = [*itertools.product(DOCUMENTS, SHARDS)][1:]


def inputs(queries: int, rows: int = 2, sizes: tuple[int, int] = (4, 6)) -> list[Tensor]:
    torch.manual_seed(queries)
    shapes = [(queries, 4, sizes[0]), (LENGTH, 2, sizes[0]), (LENGTH, 2, sizes[1])]
    return [torch.randn(rows, *s, dtype=torch.float64, requires_grad=True) for s in shapes]


def places(documents: tuple[int, ...] | None, offset: int | None) -> list[Tensor | None]:
    return [
        None if documents is None else torch.tensor(documents, dtype=torch.int32),
        None if offset is None else torch.tensor([offset]),
    ]


def masked(q: Tensor, k: Tensor, v: Tensor, documents, offset) -> Tensor:
    """The oracle: every pair of a query and a key is asked whether it may meet."""
    starts = documents or (0, LENGTH)
    of = [sum(t >= start for start in starts[1:]) for t in range(LENGTH)]
    first = offset or 0
    mask = torch.tensor(
        [[s <= first + t and of[s] == of[first + t] for s in range(LENGTH)]
         for t in range(q.shape[1])], dtype=torch.bool
    ).view(-1, LENGTH)  # fmt: skip
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshf->bthf", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize(("documents", "shard"), CASES)
def test_it_is_attention_with_a_mask(documents, shard, block, monkeypatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    offset, queries = shard
    tensors = inputs(queries)
    o = attention(*tensors, *places(documents, offset))
    want = masked(*tensors, documents, offset)
    torch.testing.assert_close(o, want, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(want)
    got, expected = (torch.autograd.grad((x * weight).sum(), tensors) for x in (o, want))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def sequences(edges: tuple[Tensor, Tensor]) -> Iterator[tuple[slice, slice]]:
    by_query, by_key = (x.tolist() for x in edges)
    assert len(by_query) == len(by_key)
    for i in range(len(by_query) - 1):
        yield slice(by_query[i], by_query[i + 1]), slice(by_key[i], by_key[i + 1])


@pytest.mark.parametrize(("documents", "shard"), [*itertools.product(DOCUMENTS, SHARDS[:-1])])
def test_edges_give_flash_attention_the_same_sequences(documents, shard) -> None:
    """What the kernel does with them, a sequence at a time: the last query meets the last key."""
    offset, queries = shard
    q, k, v = (x.detach() for x in inputs(queries))
    parts, keys_seen = [], 0
    for ours, theirs in sequences(module._edges(q, k, *places(documents, offset))):
        a, b, c = q.flatten(0, 1)[ours], *(x.flatten(0, 1)[theirs] for x in (k, v))
        # Every key is in one sequence: the kernel writes its gradient there, be it zero.
        assert theirs.start == keys_seen
        keys_seen = theirs.stop
        mask = torch.ones(len(a), len(b), dtype=torch.bool).tril(len(b) - len(a))
        b, c = (x.repeat_interleave(2, dim=1) for x in (b, c))
        scores = torch.einsum("the,she->hts", a, b) * 0.5
        p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hts,shf->thf", p, c))
    assert keys_seen == 2 * LENGTH
    want = masked(q, k, v, documents, offset)
    torch.testing.assert_close(torch.cat(parts), want.flatten(0, 1), rtol=1e-12, atol=1e-12)


def kept(queries: int, keys: int) -> int:
    """Numbers that autograd keeps for a shard's backward."""
    q, k = torch.randn(1, queries, 2, 4), torch.randn(1, keys, 2, 4)
    found = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal found
        found += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(q.requires_grad_(), k, k, *places((0, 3, keys), keys - queries))
    return found


def test_what_is_kept_grows_with_the_tokens_only() -> None:
    short, long = kept(64, 256), kept(128, 512)
    assert short < 64 * 256
    assert long <= 2 * short


def test_half_precision_is_as_exact_as_with_a_mask() -> None:
    tensors = inputs(6)
    where = places((0, 5, 9, 14), 4)
    exact = masked(*tensors, (0, 5, 9, 14), 4)
    weight = torch.randn_like(exact)
    grads = torch.autograd.grad((exact * weight).sum(), tensors)
    rounded = [x.detach().bfloat16().requires_grad_() for x in tensors]
    o = attention(*rounded, *where)
    assert o.dtype == torch.bfloat16
    got = torch.autograd.grad((o * weight.bfloat16()).sum(), rounded)
    for a, b in zip((o, *got), (exact, *grads), strict=True):
        assert (a.double() - b).norm() / b.norm() < 0.02


def test_library_contract() -> None:
    tensors, where = inputs(6), places((0, 5, 9, 14), 4)
    torch.library.opcheck(document_attention, (*tensors, *where))
    results = [x.detach() for x in document_attention(*tensors, *where)]
    given = (results[0], *(x.detach() for x in tensors), *results, *where)
    torch.library.opcheck(document_attention_backward, given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("documents", "shard"), CASES)
def test_on_a_gpu(documents, shard, dtype) -> None:
    """Flash attention in 16 bit, blocks in float32; no host read."""
    offset, queries = shard
    exact = [
        x.detach().to(dtype).double().requires_grad_() for x in inputs(queries, sizes=(16, 16))
    ]
    want = masked(*exact, documents, offset)
    weight = torch.randn_like(want)
    grads = torch.autograd.grad((want * weight).sum(), exact)
    tensors = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    where = [None if x is None else x.cuda() for x in places(documents, offset)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        o = attention(*tensors, *where)
        got = torch.autograd.grad(o, tensors, weight.to("cuda", dtype))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    bound = 1e-5 if dtype == torch.float32 else 0.02
    for a, b in zip((o, *got), (want, *grads), strict=True):
        assert (a.cpu().double() - b).norm() <= bound * b.norm().clamp_min(1e-6)


def test_a_whole_sequence_stays_with_torch() -> None:
    q, k, v = (x.detach() for x in inputs(LENGTH))
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    assert torch.equal(attention(q, k, v), want.transpose(1, 2))
