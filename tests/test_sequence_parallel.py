"""Sequence parallelism on simulated ranks: P shards through the transformed graph equal the whole
on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from cases import CASES, Sizes, make_inputs, weights_like
from simulated import Captured, Run, on_ranks, run_graph
from torch import Tensor, fx

from lmoe_compiler.errors import NoSpanMap
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.runtime.exchange import SCHEDULES
from lmoe_compiler.runtime.mesh import Axis

SIZES = Sizes(B=2, T=14, H=3, K=4, V=3)
MAPPED = {case.name: case for case in CASES if case.kind != "nonlinear"}
# One of each kind of map: nothing, scalar (of a head, of a token), diagonal, dense, two states.
KINDS = (
    "linear_attention",
    "retention",
    "simple_gla",
    "gla",
    "gated_delta_rule",
    "normalised_linear_attention",
)
LENGTH = SIZES.T


@dataclass
class Whole:
    """A recurrence on one rank: its graph, inputs, cotangent, output and gradients."""

    captured: Captured
    inputs: list[Tensor]
    weight: Tensor
    documents: Tensor | None
    run: Run


@cache
def whole(name: str, documents: tuple[int, ...] | None) -> Whole:
    case = MAPPED[name]
    sizes = SIZES if documents is None else replace(SIZES, B=1)
    inputs = [x.requires_grad_() for x in make_inputs(case, sizes)[0].values()]
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32)

    def layer(*args: Tensor) -> Tensor:
        *xs, cu_seqlens = args
        return case.recurrence(*xs, cu_seqlens=cu_seqlens)

    captured = Captured(layer, *inputs, offsets)
    assert captured.graph is not None
    flat = captured.flat_inputs(*inputs, offsets)
    weights = weights_like(*captured.graph(*flat))
    run = run_graph(captured.graph, flat, weights)
    return Whole(captured, inputs, weights[0], offsets, run)


def check(name: str, schedule: str, lengths: list[int], documents: tuple[int, ...] | None) -> None:
    """Outputs and gradients of shards of these lengths against one rank."""
    one = whole(name, documents)
    is_token = [var.kind == "token" for var in MAPPED[name].recurrence.ir.inputs]
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
            tokens = grad.dim() > 2 and grad.shape[1] == LENGTH
            joined = torch.cat(parts, dim=1) if tokens else torch.stack(parts).sum(0)
            torch.testing.assert_close(joined, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", KINDS)
def test_shards_equal_the_whole(name: str, schedule: str) -> None:
    check(name, schedule, [5, 2, 3, 4], None)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", KINDS)
def test_packed_documents_cross_ranks_at_will(name: str, schedule: str) -> None:
    for documents in [(0, 5, 5, 14), (0, 4, 10, 14)]:
        check(name, schedule, [4, 6, 4], documents)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPPED)
def test_random_documents_on_up_to_eight_ranks(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for size in (2, 3, 4, 8):
        inner = torch.randint(0, LENGTH + 1, (4,), generator=generator).sort().values.tolist()
        cuts = torch.randperm(LENGTH - 1, generator=generator)[: size - 1].sort().values + 1
        lengths = torch.tensor([0, *cuts.tolist(), LENGTH]).diff().tolist()
        check(name, "transpose", lengths, (0, *inner, LENGTH))


def test_a_recurrence_without_a_span_map_is_refused_by_name() -> None:
    case = next(case for case in CASES if case.name == "slstm")
    inputs = list(make_inputs(case, SIZES)[0].values())
    captured = Captured(lambda *xs: (case.recurrence(*xs),), *inputs)
    assert captured.graph is not None
    with pytest.raises(NoSpanMap, match="slstm has no span map"):
        SequenceParallel(Axis.on_one_group("sp", 2, 0, "0"))(captured.graph)
