"""A hybrid language model, unchanged, on simulated ranks: loss, outputs and gradients are those of
one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from simulated import Captured, Run, on_ranks, run_graph
from small_model import SMALL
from torch import Tensor, fx

from lmoe_compiler.errors import MixesTokens, StaticSequence
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.token_axis import analyse
from lmoe_compiler.passes.verifier import verify
from lmoe_compiler.runtime.mesh import Axis

NAMES = ("loss", "logits", "cross_entropy", "aux_loss", "z_loss", "expert_load")
LENGTH, ONE = 12, torch.ones((), dtype=torch.float64)


@dataclass
class Whole:
    captured: Captured
    tokens: tuple[Tensor, Tensor]
    documents: Tensor | None
    run: Run


@cache
def whole(packed: bool) -> Whole:
    torch.manual_seed(0)
    model = LinearMoEForCausalLM(SMALL).double()
    batch = 1 if packed else 2
    ids, labels = torch.randint(0, 32, (2, batch, LENGTH))
    labels[0, 3] = -100
    documents = torch.tensor([0, 5, 9, 12], dtype=torch.int32) if packed else None

    def step(ids: Tensor, labels: Tensor, documents: Tensor | None) -> tuple[Tensor, ...]:
        result = model(ids, labels, documents)
        return tuple(getattr(result, name) for name in NAMES)

    captured = Captured(step, ids, labels, documents)
    assert captured.graph is not None
    run = run_graph(captured.graph, captured.flat_inputs(ids, labels, documents), [ONE])
    return Whole(captured, (ids, labels), documents, run)


def parallelise(gm: fx.GraphModule, axis: Axis, way: str) -> None:
    for graph_pass in (
        SequenceParallel(axis),
        Halo(axis),
        SoftmaxParallel(axis, way=way),
        GlobalNumbers(axis),
    ):
        assert graph_pass(gm).counts
    verify(gm)


@pytest.mark.parametrize(("size", "way"), [(2, "keys"), (2, "heads"), (3, "auto")])
@pytest.mark.parametrize("packed", [False, True])
def test_hybrid_model_equals_one_rank(packed: bool, size: int, way: str) -> None:
    one = whole(packed)
    shards = zip(*(x.split(LENGTH // size, dim=1) for x in one.tokens), strict=True)
    flat = [one.captured.flat_inputs(*shard, one.documents) for shard in shards]
    runs = on_ranks(one.captured, partial(parallelise, way=way), flat, [[ONE]] * size)
    for i, name in enumerate(NAMES):
        for rank, run in enumerate(runs):
            expected = one.run.outputs[i]
            if name == "logits":
                expected = expected.split(LENGTH // size, dim=1)[rank]
            torch.testing.assert_close(run.outputs[i], expected, rtol=1e-11, atol=1e-13)
    for i, grad in enumerate(one.run.grads):
        if grad is not None:
            parts = [run.grads[i] for run in runs]
            joined = torch.stack([p for p in parts if p is not None]).sum(0)
            torch.testing.assert_close(joined, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (lambda x: x.cumsum(1), "runs along the token axis"),
        (lambda x: x[:, 1:] + 0, "runs along the token axis"),
        (lambda x: x.flip(1), "runs along the token axis"),
        (lambda x: x.softmax(1), "runs along the token axis"),
        (lambda x: x @ x.transpose(1, 2), "every pair of tokens"),
        (lambda x: x.reshape(2, 4, -1), "moves tokens"),
        (lambda x: x[:, torch.arange(x.shape[1]) // 2], "picks rows of other tokens"),
    ],
)
def test_what_mixes_tokens_is_refused_by_name(mix, reason) -> None:
    def layer(x: Tensor) -> tuple[Tensor]:
        return (mix(x * 2),)

    graph = Captured(layer, torch.randn(2, 8, 4)).graph
    assert graph is not None
    with pytest.raises(MixesTokens, match=reason) as error:
        analyse(graph, 1)
    assert "lambda x" in error.value.where


def test_a_product_over_tokens_is_refused() -> None:
    def layer(x: Tensor) -> tuple[Tensor]:
        return (x.transpose(1, 2) @ x,)

    graph = Captured(layer, torch.randn(2, 8, 4)).graph
    assert graph is not None
    with pytest.raises(MixesTokens, match="sums over tokens"):
        analyse(graph, 1)


def test_a_fixed_length_is_refused() -> None:
    def layer(x: Tensor) -> tuple[Tensor]:
        return (x.view(2, 8, 2, 2),)

    graph = Captured(layer, torch.randn(2, 8, 4)).graph
    assert graph is not None
    with pytest.raises(StaticSequence, match="dimension 1"):
        analyse(graph, 1)


def test_other_reductions_over_tokens_are_refused() -> None:
    def layer(x: Tensor) -> tuple[Tensor]:
        return (F.mse_loss(x, x * 2),)

    graph = Captured(layer, torch.randn(2, 8, 4)).graph
    assert graph is not None
    with pytest.raises(MixesTokens, match="mse_loss mixes tokens"):
        analyse(graph, 1)
