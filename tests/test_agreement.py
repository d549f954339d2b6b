"""Ranks that cannot go on together say so, each of them, before they hang; and meshes and layers that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from simulated import Captured
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh

import lmoe_compiler as lmoe
from lmoe_compiler.errors import InvalidOption, NotShardable, WrongOnRanks
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.models.attention import Attention  # noqa: F401 (registers lmoe::attention)
from lmoe_compiler.models.short_convolution import short_conv
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.runtime.agreement import compare
from lmoe_compiler.runtime.mesh import Axis

AXIS = Axis.on_one_group("sp", 4, 1, "0")


def disagree(rank: int, size: int) -> None:
    """Other shapes on one rank; then a compilation that fails on one rank: errors on both, at once."""
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("sp",))
    options: dict[str, Any] = {"mesh": mesh, "sequence_parallel": "sp", "inner": "aot_eager"}
    layer = lmoe.compile(lambda q, k, v: RECURRENCES["linear_attention"](q, k, v), **options)
    with pytest.raises(Exception, match="compiled different collectives") as error:
        layer(*torch.randn(3, 1 + rank, 6, 2, 4))
    assert " start [(" in str(error.value)
    dist.barrier()

    def refused(x: Tensor) -> Tensor:
        return x.cumsum(1) if rank else x.cumsum(2)

    words = "cumsum mixes tokens" if rank else "rank 1 of axis 'sp' could not compile graph 1"
    with pytest.raises(Exception, match=words):
        lmoe.compile(refused, **options)(torch.randn(1, 6, 4))
    dist.barrier()
    weight = torch.ones(4, 4)
    convolved = lmoe.compile(lambda x: short_conv(x * 2, weight), **options)
    for lengths in ((5, 1), (0, 6), (1, 0)):
        convolved(torch.randn(1, lengths[rank], 4))


@pytest.mark.slow
def test_every_rank_is_told_before_it_hangs() -> None:
    run_processes(2, disagree)


def test_the_first_difference_is_named() -> None:
    texts = {0: "a.mixer start [4]\na.mlp send [8]", 3: "a.mixer start [4]\nb.mlp send [8]"}
    with pytest.raises(WrongOnRanks, match="ranks 0 and 3 of axis 'sp'") as error:
        compare(texts, "sp")
    assert error.value.where == "graph 0: a.mlp send [8]   against   b.mlp send [8]"
    with pytest.raises(WrongOnRanks, match="ranks 0 and 1"):
        compare({0: "a", 1: "a\nb"}, "sp")
    compare({0: "a\nb", 1: "a\nb"}, "sp")


def test_a_mesh_without_the_named_axis() -> None:
    class Mesh:
        mesh_dim_names = ("dp", "tp")

    with pytest.raises(InvalidOption, match="sequence_parallel='sp' is not an axis") as error:
        lmoe.compile(lambda x: x, mesh=Mesh(), sequence_parallel="sp")
    assert "the mesh has dp, tp" in error.value.why
    with pytest.raises(InvalidOption, match="sequence_parallel='sp' is not an axis") as error:
        lmoe.compile(lambda x: x, sequence_parallel="sp")
    assert "no mesh was given" in error.value.why


def graph_of(layer: Any, *xs: Tensor) -> fx.GraphModule:
    graph = Captured(layer, *xs).graph
    assert graph is not None
    return graph


def attention(offset: Tensor | None = None) -> fx.GraphModule:
    """Six key-value heads."""
    x = torch.randn(1, 8, 6, 4)
    return graph_of(lambda x: (torch.ops.lmoe.attention(x * 2, x, x, None, offset),), x)


def test_ranks_that_do_not_divide_heads() -> None:
    """Softmax by heads: refused, or by keys where the choice is free. Recurrences: padded, and said so."""
    with pytest.raises(NotShardable, match="6 key-value heads on 4 ranks"):
        SoftmaxParallel(AXIS, way="heads")(attention())
    (note,) = SoftmaxParallel(AXIS)(attention()).notes
    assert "keys, 4 ranks do not divide 6 key-value heads" in note
    recurrence = RECURRENCES["linear_attention"]
    graph = graph_of(lambda q, k, v: (recurrence(q, k, v),), *torch.randn(3, 1, 8, 6, 4))
    (note,) = SequenceParallel(AXIS, schedule="transpose")(graph).notes
    assert "6 heads are padded to 8" in note


def test_marked_ops_that_bring_what_a_pass_gives_are_refused() -> None:
    x, weight, history = torch.randn(1, 8, 4), torch.ones(4, 3), torch.zeros(1, 2, 4)
    graph = graph_of(lambda x: (short_conv(x * 2, weight, None, history),), x)
    with pytest.raises(NotShardable, match="a short convolution with a history"):
        Halo(AXIS)(graph)
    with pytest.raises(NotShardable, match="an attention with offset="):
        SoftmaxParallel(AXIS)(attention(torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("options", "what"),
    [({"initial_state": True}, "initial_state="), ({"return_state": True}, "return_state=True")],
)
def test_states_at_the_ends_of_a_shard_are_refused(options: dict[str, bool], what: str) -> None:
    state = torch.zeros(1, 6, 4, 4)
    given: dict[str, Any] = {**options} | (
        {"initial_state": state} if "initial_state" in options else {}
    )
    recurrence = RECURRENCES["linear_attention"]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        result = recurrence(q, k, v, **given)
        return result if isinstance(result, tuple) else (result,)

    graph = graph_of(layer, *torch.randn(3, 1, 8, 6, 4))
    with pytest.raises(NotShardable, match=f"a recurrence with {what}"):
        SequenceParallel(AXIS)(graph)
