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

import lmoe_compiler as lmoe
from lmoe_compiler.cuts import Cut, Part, cuts_of
from lmoe_compiler.errors import InvalidOption, NotShardable
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import Block
from lmoe_compiler.models.mixer_table import MIXERS
from lmoe_compiler.models.moe import SwiGLU
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
    outputs: list[Tensor]
    grads: dict[str, Tensor]
    cuts: dict[str, tuple[Cut, ...]]


def flat(result: object) -> tuple[Tensor, ...]:
    """What a layer or a block gives that has a gradient."""
    if isinstance(result, Tensor):
        return (result,)
    y, routing = result  # type: ignore[misc]
    return (y,) if routing is None else (y, routing.aux_loss)


def on_ranks(layer: nn.Module, x: Tensor, weights: list[Tensor], size: int) -> list[RankResult]:
    """The layer cut over `size` simulated ranks."""
    axes = [Axis.on_one_group("tp", size, rank, "0") for rank in range(size)]
    models = [copy.deepcopy(layer) for _ in axes]
    for model, axis in zip(models, axes, strict=True):
        _cut_layers(model, axis)
    captured = Captured(lambda x: flat(models[0](x)), x)
    graph = captured.graph
    assert graph is not None
    names = [parameter_name(n) for n in graph.graph.nodes if n.op == "placeholder"]
    graphs = [copy.deepcopy(graph) for _ in axes]
    for axis, gm in zip(axes, graphs, strict=True):
        for node, kept in zip(gm.graph.nodes, graph.graph.nodes, strict=True):
            # Where a parameter comes from; a deep copy leaves it out.
            node._dynamo_source = getattr(kept, "_dynamo_source", None)
        assert TensorParallel(axis, cuts_of(models[0]))(gm).counts

    def one(rank: int, _: str) -> RankResult:
        given = captured.flat_inputs(x)
        inputs = [
            place if name is None else models[rank].get_parameter(name)
            for place, name in zip(given, names, strict=True)
        ]
        run = run_graph(graphs[rank], inputs, weights)
        grads = zip(names, run.grads, strict=True)
        found = {name or "x": grad for name, grad in grads if grad is not None}
        return RankResult(run.outputs, found, cuts_of(models[rank]))

    return run_ranks(size, one)


def check(layer: nn.Module, size: int = RANKS) -> None:
    """Outputs and all gradients on every rank: of cut weights its part, of the others all of it."""
    x, weight = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    x.requires_grad_()
    outputs = flat(layer(x))
    weights = [weight, torch.tensor(0.5, dtype=torch.float64)]
    sum((o * w).sum() for o, w in zip(outputs, weights, strict=False)).backward()
    expected = {"x": x.grad} | {n: p.grad for n, p in layer.named_parameters()}
    for result in on_ranks(layer, x, weights, size):
        for got, want in zip(result.outputs, outputs, strict=True):
            close(got, want)
        assert result.grads.keys() == {n for n, grad in expected.items() if grad is not None}
        for name, got in result.grads.items():
            want = expected[name]
            for taken in result.cuts.get(name, ()):
                want = taken.take(want)
            close(got, want, name)


def close(got: Tensor, want: Tensor | None, name: str = "output") -> None:
    assert want is not None
    torch.testing.assert_close(
        got, want.detach(), rtol=1e-9, atol=1e-10, msg=lambda text: f"{name}: {text}"
    )


def new_block(mixer: str, **changes: int) -> Block:
    torch.manual_seed(0)
    block = Block(config(mixer, **changes), "X").double()
    for parameter in block.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("mixer", ["attention", *MIXERS])
def test_every_mixer_cut_by_head_equals_the_whole(mixer: str) -> None:
    check(new_block(mixer).mixer)


def test_more_ranks_cut_experts_and_dense_layers_too() -> None:
    check(new_block("gla", linear_heads=4), size=4)
    check(new_block("attention", num_experts=0, num_kv_heads=4), size=4)


@pytest.mark.parametrize(("kv_heads", "size"), [(1, 2), (1, 4), (2, 4)])
def test_ranks_share_key_value_heads_where_these_are_fewer(kv_heads: int, size: int) -> None:
    """Neighbours have a copy each, and its whole gradient."""
    layer = new_block("attention", num_kv_heads=kv_heads).mixer
    check(layer, size=size)
    cut = copy.deepcopy(layer)
    _cut_layers(cut, Axis.on_one_group("tp", size, size - 1, "0"))
    assert (cut.num_heads, cut.num_kv_heads) == (4 // size, 1)
    assert torch.equal(cut.k_proj.weight, layer.k_proj.weight[-4:])


def test_heads_that_ranks_do_not_divide_are_refused_by_layer() -> None:
    block = nn.ModuleDict({"first": new_block("attention")})
    with pytest.raises(NotShardable, match="2 key-value heads on 3 ranks") as error:
        _cut_layers(block, Axis.on_one_group("tp", 3, 0, "0"))
    assert error.value.where == "first.mixer"
    with pytest.raises(NotShardable, match="4 channels of an MLP on 3 ranks"):
        _cut_layers(SwiGLU(8, 4), Axis.on_one_group("tp", 3, 0, "0"))


def test_a_model_without_layers_to_cut_is_refused() -> None:
    with pytest.raises(NotShardable, match="Linear has no layer that can be cut"):
        _cut_layers(nn.Linear(2, 2), Axis.on_one_group("tp", 2, 0, "0"))


class Half(nn.Module):
    """An MLP that can be cut, in ways that its options spoil."""

    def __init__(self, *, bias: bool = False, summed: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=bias)
        self.summed = summed

    def tensor_parts(self, ranks: int) -> dict[str, Part]:
        down = {"down.weight": Part.even(self.down.weight, 1, summed=True)} if self.summed else {}
        return {"up.weight": Part.even(self.up.weight, 0), **down}

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return self.down(hidden) if self.summed else hidden


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Half(bias=True), "has a bias, which every rank would add"),
        (Half(summed=False), "leaves the graph with this rank's part only"),
    ],
)
def test_layers_whose_parts_never_come_together_are_refused(layer: Half, message: str) -> None:
    _cut_layers(layer, axis := Axis.on_one_group("tp", 2, 0, "0"))
    graph = Captured(layer, torch.randn(1, 5, 4)).graph
    assert graph is not None
    with pytest.raises(NotShardable, match=message):
        TensorParallel(axis, cuts_of(layer))(graph)


def test_a_cut_model_is_compiled_with_its_axis_or_not_at_all() -> None:
    _cut_layers(layer := Half(), Axis.on_one_group("tp", 2, 0, "0"))
    with pytest.raises(InvalidOption, match="is cut over axis 'tp', and the compiler is not told"):
        lmoe.compile(layer)


def test_a_part_is_what_its_spans_say() -> None:
    """Two stretches of heads round a low rank that all have: rows of both, the rank's gradient in common."""
    whole = torch.arange(10.0)[:, None]
    taken = Cut.of(Part(0, ((4, True), (2, False), (4, True))), "tp", 1, 2)
    assert taken.take(whole)[:, 0].tolist() == [2, 3, 4, 5, 8, 9]
    assert taken.common == ((2, 4),)
