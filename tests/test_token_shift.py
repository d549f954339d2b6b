"""Token shifts and halos on simulated ranks: the marked op or a pad, packed or not, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from simulated import Captured, on_ranks, run_graph
from torch import Tensor, fx, nn

from lmoe_compiler.errors import MixesTokens
from lmoe_compiler.models.short_convolution import short_conv, token_shift
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.verifier import Verifier
from lmoe_compiler.runtime.mesh import Axis

LENGTH, WIDTH = 12, 4
MU = torch.rand(WIDTH, dtype=torch.float64)


def mixed(x: Tensor, documents: Tensor | None) -> Tensor:
    """RWKV's mix of a token and the one before it."""
    x = x * x
    return (x + MU * (token_shift(x, documents) - x)).sin()


def padded(x: Tensor, documents: Tensor | None) -> Tensor:
    """The same as RWKV writes it: nn.ZeroPad2d((0, 0, 1, -1))."""
    x = x * x
    return (x + MU * (nn.ZeroPad2d((0, 0, 1, -1))(x) - x)).sin()


def far(x: Tensor, documents: Tensor | None) -> Tensor:
    return x * F.pad(x * 2, (0, 0, 2, -2))


def parallelise(gm: fx.GraphModule, axis: Axis) -> None:
    assert Halo(axis)(gm).counts
    Verifier(Axes(axis, axis)).check(gm)


@pytest.mark.parametrize(
    ("layer", "packed"), [(mixed, False), (mixed, True), (padded, False), (far, False)]
)
@pytest.mark.parametrize("lengths", [[6, 6], [2, 2, 5, 3], [1, 11], [10, 2, 0], [0, 0, 11, 1]])
def test_shards_equal_the_whole(
    layer: Callable[..., Tensor], lengths: list[int], packed: bool
) -> None:
    """Outputs and gradients; with documents the shift stops at their borders, wherever ranks end."""
    x = torch.randn(1 if packed else 2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([0, 3, 3, 9, LENGTH], dtype=torch.int32) if packed else None
    captured = Captured(lambda x, d: (layer(x, d),), x, documents)
    assert captured.graph is not None
    weight = torch.randn_like(x).detach()
    whole = run_graph(captured.graph, captured.flat_inputs(x, documents), [weight])
    shards = [s.clone().requires_grad_() for s in x.detach().split(lengths, dim=1)]
    flat = [captured.flat_inputs(s, documents) for s in shards]
    weights = [[w] for w in weight.split(lengths, dim=1)]
    runs = on_ranks(captured, parallelise, flat, weights)
    got = torch.cat([run.outputs[0] for run in runs], dim=1)
    torch.testing.assert_close(got, whole.outputs[0], rtol=1e-12, atol=1e-12)
    place = next(i for i, g in enumerate(whole.grads) if g is not None)
    grads = torch.cat([run.grads[place] for run in runs], dim=1)
    torch.testing.assert_close(grads, whole.grads[place], rtol=1e-12, atol=1e-12)


def test_a_token_shift_is_the_token_before() -> None:
    x = torch.randn(2, 5, 3)
    expected = torch.cat([torch.zeros(2, 1, 3), x[:, :-1]], dim=1)
    torch.testing.assert_close(token_shift(x), expected, rtol=0, atol=0)


def graph_of(layer: Callable[[Tensor], Tensor], *shape: int) -> fx.GraphModule:
    graph = Captured(lambda x: (layer(x * 2),), torch.randn(shape)).graph
    assert graph is not None
    return graph


@pytest.mark.parametrize("lengths", [[4, 2, 6], [10, 0, 2]])
def test_a_rank_between_others_with_fewer_tokens_than_the_halo(lengths: list[int]) -> None:
    """Every rank stops, and the error says what to do."""
    x = torch.randn(1, LENGTH, WIDTH)
    captured = Captured(lambda x: (short_conv(x * 2, torch.ones(WIDTH, 4)),), x)
    flat = [captured.flat_inputs(shard) for shard in x.split(lengths, dim=1)]
    with pytest.raises(RuntimeError, match=r"model looks 3 tokens back.*at least 3 tokens"):
        on_ranks(captured, parallelise, flat, [[]] * len(lengths))


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: F.pad(x, (0, 0, 1, 0)),  # another length
        lambda x: F.pad(x, (0, 0, -1, 1)),  # from the future
        lambda x: F.pad(x, (0, 0, 1, -1), value=1.0),
        lambda x: torch.cat([x[:, :1], x[:, :-1]], dim=1),
    ],
)
def test_other_shifts_are_refused_with_what_to_write(layer: Callable[[Tensor], Tensor]) -> None:
    graph = graph_of(layer, 1, 8, WIDTH)
    with pytest.raises(MixesTokens, match="runs along the token axis") as error:
        Halo(Axis.on_one_group("sp", 2, 0, "0"))(graph)
    assert "token_shift(x) or F.pad(x, (0, 0, n, -n))" in error.value.try_
