"""Tensor parallelism on simulated ranks: a block whose heads and channels are cut equals the whole,
gradients of replicated weights included.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from simulated import Captured, run_graph
from torch import Tensor, nn

from lmoe_compiler.cuts import cuts_of
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import Block
from lmoe_compiler.models.mixer_table import MIXERS
from lmoe_compiler.parallel import _cut_layers
from lmoe_compiler.passes.splice import parameter_name
from lmoe_compiler.passes.tensor_parallel import TensorParallel
from lmoe_compiler.runtime.local_world import run_ranks
from lmoe_compiler.runtime.mesh import Axis

RANKS = 2


def config(mixer: str, **changes: int) -> ModelConfig:
    sizes = {
        "hidden_size": 8, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4,
        "linear_heads": 2, "key_dim": 4, "value_dim": 4, "num_experts": 4, "top_k": 2,
        "expert_size": 4, "shared_expert_size": 4,
    }  # fmt: skip
    return ModelConfig(layer_pattern="X", mixers={"X": mixer}, **(sizes | changes))


@dataclass
class RankResult:
    output: Tensor
    grads: dict[str, Tensor]
    model: nn.Module


def flat(result: object) -> tuple[Tensor, ...]:
    """Output, losses and loads of a block."""
    y, routing = result  # type: ignore[misc]
    return (y,) if routing is None else (y, routing.aux_loss, routing.load)


def run_on_ranks(block: nn.Module, x: Tensor, weight: Tensor, size: int) -> list[RankResult]:
    prepared = []
    for rank in range(size):
        axis = Axis.on_one_group("tp", size, rank, "0")
        model = copy.deepcopy(block)
        _cut_layers(model, axis)
        own = x.detach().clone().requires_grad_()
        captured = Captured(lambda x, model=model: flat(model(x)), own)
        graph = captured.graph
        assert graph is not None
        inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
        names = [parameter_name(n) or n.name for n in inputs]
        assert TensorParallel(axis, cuts_of(model))(graph).counts
        prepared.append((graph, captured.flat_inputs(own), names, model))

    def one(rank: int, _: str) -> RankResult:
        graph, inputs, names, model = prepared[rank]
        run = run_graph(graph, inputs, [weight, torch.tensor(0.5)])
        grads = {n: g for n, g in zip(names, run.grads, strict=True) if g is not None}
        return RankResult(run.outputs[0], grads, model)

    return run_ranks(size, one)


def check(block: nn.Module, size: int = RANKS) -> None:
    x, weight = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    whole_x = x.clone().requires_grad_()
    y, *others = flat(block(whole_x))
    loss = (y * weight).sum() + (0.5 * others[0] if others else 0)
    loss.backward()
    for result in run_on_ranks(block, x, weight, size):
        close(result.output, y)
        cuts = cuts_of(result.model)
        for name, parameter in block.named_parameters():
            if parameter.grad is None:
                continue
            expected = parameter.grad
            for taken in cuts.get(name, ()):
                expected = taken.take(expected)
            close(result.grads.pop(name), expected, name)
        (grad,) = result.grads.values()
        close(grad, whole_x.grad, "x")


def close(got: Tensor, want: Tensor | None, name: str = "output") -> None:
    assert want is not None
    torch.testing.assert_close(
        got, want.detach(), rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}"
    )


@pytest.mark.parametrize("mixer", ["attention", *MIXERS])
def test_every_mixer_cut_by_head_equals_the_whole(mixer: str) -> None:
    torch.manual_seed(0)
    block = Block(config(mixer), "X").double()
    for parameter in block.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    check(block)
