"""Sequence parallelism on simulated ranks: P shards through the transformed graph equal the whole
on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from simulated import Captured, Run, on_ranks, run_graph
from span_loop import SpanLoop
from torch import Tensor, fx

import lmoe_compiler as lmoe
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.runtime.exchange import SCHEDULES
from lmoe_compiler.runtime.mesh import Axis

TEXTS = {
    "identity": """recurrence linear_attention
  state S[K, V]
  token q[K] k[K] v[V]
  step S
    update k (x) v
  read r[V] = q' S
  output r""",
    "scalar": """recurrence simple_gla
  state S[K, V]
  token q[K] k[K] v[V] g
  step S
    decay log g
    update k (x) v
  read r[V] = q' S
  output r""",
    "diagonal": """recurrence gla
  state S[K, V]
  token q[K] k[K] v[V] g[K]
  step S
    decay log g
    update k (x) v
  read r[V] = q' S
  output r""",
    "rank_one": """recurrence gated_delta_rule
  state S[K, V]
  token q[K] k[K] v[V] g beta
  step S
    decay log g
    update k (x) beta * v
    update k (x) -beta * (k' S)
  read r[V] = q' S
  output r""",
    "head_decay": """recurrence retention
  state S[K, V]
  token q[K] k[K] v[V]
  head w
  step S
    decay log w
    update k (x) v
  read r[V] = q' S
  output r""",
    "two_states": """recurrence normalised
  state z[K] S[K, V]
  token q[K] k[K] v[V]
  step z
    update k (x) 1
  step S
    update k (x) v
  read n = q' z
  read r[V] = q' S
  output r / (n + 9)""",
}
SIZES = {"K": 3, "V": 2}
HEADS = 3


@pytest.fixture(autouse=True)
def _token_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = SpanLoop()
    monkeypatch.setattr("lmoe_compiler.library.choose", lambda *_: loop)


def make_inputs(recurrence: lmoe.Recurrence, batch: int, length: int) -> list[Tensor]:
    inputs = []
    for var in recurrence.ir.inputs:
        lead = (batch, length, HEADS) if var.kind == "token" else (HEADS,)
        x = torch.randn(*lead, *(SIZES[a] for a in var.axes), dtype=torch.float64)
        if var.name in ("g", "w"):
            x = -x.abs()
        inputs.append(x.sigmoid() if var.name == "beta" else x)
    return inputs


LENGTH = 14


@dataclass
class Whole:
    """A recurrence on one rank: its graph, inputs, cotangent, output and gradients."""

    captured: Captured
    inputs: list[Tensor]
    weight: Tensor
    documents: Tensor | None
    run: Run


@cache
def whole(form: str, documents: tuple[int, ...] | None) -> Whole:
    recurrence = lmoe.parse(TEXTS[form])
    batch = 2 if documents is None else 1
    inputs = [x.requires_grad_() for x in make_inputs(recurrence, batch, LENGTH)]
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32)

    def layer(*args: Tensor) -> Tensor:
        *xs, cu_seqlens = args
        return recurrence(*xs, cu_seqlens=cu_seqlens)

    captured = Captured(layer, *inputs, offsets)
    weight = torch.randn(batch, LENGTH, HEADS, SIZES["V"], dtype=torch.float64)
    assert captured.graph is not None
    run = run_graph(captured.graph, captured.flat_inputs(*inputs, offsets), [weight])
    return Whole(captured, inputs, weight, offsets, run)


def check(form: str, schedule: str, lengths: list[int], documents: tuple[int, ...] | None) -> None:
    """Outputs and gradients of shards of these lengths against one rank."""
    one = whole(form, documents)
    is_token = [x.dim() > 2 for x in one.inputs]
    shards = [
        [
            x.detach().split(lengths, dim=1)[rank] if t else x.detach()
            for x, t in zip(one.inputs, is_token, strict=True)
        ]
        for rank in range(len(lengths))
    ]
    flat = [
        one.captured.flat_inputs(*(x.clone().requires_grad_() for x in shard), one.documents)
        for shard in shards
    ]

    def transform(gm: fx.GraphModule, axis: Axis) -> None:
        SequenceParallel(axis, schedule=schedule)(gm)

    weights = [[w] for w in one.weight.split(lengths, dim=1)]
    runs = on_ranks(one.captured, transform, flat, weights)
    got = torch.cat([run.outputs[0] for run in runs], dim=1)
    torch.testing.assert_close(got, one.run.outputs[0], rtol=1e-10, atol=1e-10)
    for i, grad in enumerate(one.run.grads):
        if grad is not None:
            parts = [run.grads[i] for run in runs]
            joined = sum(parts) if grad.dim() < 3 else torch.cat(parts, dim=1)
            torch.testing.assert_close(joined, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", TEXTS)
def test_shards_equal_the_whole(form: str, schedule: str) -> None:
    check(form, schedule, [7, 7], None)
    check(form, schedule, [5, 2, 3, 4], None)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", TEXTS)
def test_packed_documents_cross_ranks_at_will(form: str, schedule: str) -> None:
    for documents in [(0, 14, 14, 14), (0, 5, 5, 14), (0, 4, 10, 14)]:
        check(form, schedule, [4, 6, 4], documents)


@pytest.mark.slow
@pytest.mark.parametrize("form", TEXTS)
def test_random_documents_on_up_to_eight_ranks(form: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for size in (2, 3, 4, 8):
        inner = torch.randint(0, LENGTH + 1, (4,), generator=generator).sort().values.tolist()
        cuts = torch.randperm(LENGTH - 1, generator=generator)[: size - 1].sort().values + 1
        lengths = torch.tensor([0, *cuts.tolist(), LENGTH]).diff().tolist()
        check(form, "transpose", lengths, (0, *inner, LENGTH))
