"""Ranks that hold different numbers of tokens, none at all among them: softmax layers are those of one rank."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from simulated import Captured, Run, on_ranks, run_graph
from torch import Tensor, fx, nn

from lmoe_compiler.models.attention import Attention
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import Block
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.losses import GlobalNumbers
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime.mesh import TRAFFIC, Axis, _backend

LENGTH, WIDTH = 14, 8
CONFIG = ModelConfig(
    hidden_size=WIDTH, num_layers=1, layer_pattern="N", num_heads=4, num_kv_heads=2, head_dim=4,
    linear_heads=2, key_dim=4, value_dim=4, num_experts=0, expert_size=8,
)  # fmt: skip


class Two(nn.Module):
    """Softmax after a recurrence, both with rotary positions or halos of their own."""

    def __init__(self) -> None:
        super().__init__()
        config = replace(CONFIG, layer_pattern="LN", num_layers=2)
        self.first, self.second = Block(config, "L"), Block(config, "N")

    def forward(self, x: Tensor, documents: Tensor | None) -> Tensor:
        return self.second(self.first(x, documents)[0], documents)[0]


LAYERS = {"softmax": lambda: Attention(CONFIG), "both": Two}


class Whole:
    """A layer on one rank: its graph, inputs, cotangent and results."""

    def __init__(self, name: str, packed: bool) -> None:
        torch.manual_seed(1)
        layer = LAYERS[name]().double()
        self.x = torch.randn(1 if packed else 2, LENGTH, WIDTH, dtype=torch.float64)
        documents = torch.tensor([0, 3, 3, 10, LENGTH], dtype=torch.int32)
        self.documents = documents if packed else None
        self.captured = Captured(lambda x, d: (layer(x, d),), self.x, self.documents)
        self.weight = torch.randn_like(self.x)
        graph = self.captured.graph
        assert graph is not None
        self.run = run_graph(graph, self.inputs(self.x), [self.weight])

    def inputs(self, x: Tensor) -> list[object]:
        return self.captured.flat_inputs(x.clone().requires_grad_(), self.documents)


whole = cache(Whole)


def spread(gm: fx.GraphModule, axis: Axis, way: str, even: bool = False) -> None:
    for graph_pass in (
        SequenceParallel(axis),
        Halo(axis),
        SoftmaxParallel(axis, way=way, even=even),
        GlobalNumbers(axis),
    ):
        graph_pass(gm)
    Verifier(Axes(axis, axis)).check(gm)


def run(one: Whole, lengths: list[int], **how: object) -> list[Run]:
    flat = [one.inputs(part) for part in one.x.split(lengths, dim=1)]
    weights = [[w] for w in one.weight.split(lengths, dim=1)]
    return on_ranks(one.captured, partial(spread, **how), flat, weights)


def check(one: Whole, runs: list[Run]) -> None:
    """Outputs and gradients of inputs side by side, those of weights added up."""
    got = torch.cat([run.outputs[0] for run in runs], dim=1)
    torch.testing.assert_close(got, one.run.outputs[0], rtol=1e-11, atol=1e-12)
    for i, grad in enumerate(one.run.grads):
        if grad is not None:
            parts = [run.grads[i] for run in runs]
            tokens = grad.shape == one.x.shape
            joined = torch.cat(parts, dim=1) if tokens else torch.stack(parts).sum(0)
            torch.testing.assert_close(joined, grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("way", ["keys", "heads"])
@pytest.mark.parametrize("lengths", [[5, 9], [13, 1], [0, 14], [7, 7]])
def test_softmax_on_two_ranks(lengths: list[int], way: str, packed: bool) -> None:
    one = whole("softmax", packed)
    check(one, run(one, lengths, way=way))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lengths", [[2, 6, 0, 5, 1], [0, 0, 14]])
def test_softmax_on_more_ranks_than_heads(lengths: list[int], packed: bool) -> None:
    one = whole("softmax", packed)
    check(one, run(one, lengths, way="auto"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("lengths", "way"), [([9, 5], "heads"), ([3, 4, 7], "keys")])
def test_softmax_after_a_recurrence(lengths: list[int], way: str, packed: bool) -> None:
    """Every rank holds at least what the next one's convolution looks back at."""
    one = whole("both", packed)
    check(one, run(one, lengths, way=way))


def test_sizes_travel_between_hosts() -> None:
    """Their group never asks a device, whatever the others are of."""
    kinds = {kind: _backend("cuda", kind) for kind in TRAFFIC}
    assert kinds.pop("sizes") == {"backend": "gloo"}
    assert not any(kinds.values())


@pytest.mark.parametrize("way", ["keys", "heads"])
def test_a_promise_of_as_many_tokens_is_checked(way: str) -> None:
    one = whole("softmax", packed=True)
    check(one, run(one, [7, 7], way=way, even=True))
    with pytest.raises(
        RuntimeError, match="ranks hold different numbers of tokens, and even_tokens=True"
    ):
        run(one, [5, 9], way=way, even=True)
