"""A hybrid model on simulated ranks of meshes with an axis for experts, or with experts folded over
other axes: losses, statistics and gradients are those of one rank with all tokens.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from simulated import Captured, Meshed, Run
from torch import Tensor, nn

from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM

NAMES = (
    "loss", "cross_entropy", "aux_loss", "z_loss", "expert_load", "expert_dropped", "logits",
)  # fmt: skip
LENGTH, EXPERTS = 12, 4
CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_layers=2, layer_pattern="LN", num_heads=2, num_kv_heads=1,
    head_dim=8, linear_heads=2, key_dim=4, value_dim=4, num_experts=EXPERTS, top_k=2, expert_size=8,
    shared_expert_size=8,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A mesh, what its axes are for, and how many rows of the batch a rank has."""

    shape: tuple[tuple[str, int], ...]
    sequence: str | None = None
    data: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    rows: int = 1

    @property
    def batch(self) -> tuple[str, ...]:
        given = dict.fromkeys((*self.data, *self.experts))
        return tuple(name for name in given if name != self.sequence)

    def ranks(self, *axes: str) -> int:
        sizes = dict(self.shape)
        return int(torch.tensor([sizes[name] for name in axes]).prod()) if axes else 1

    def meshed(self, capacity: float | None = None) -> Meshed:
        return Meshed(
            dict(self.shape),
            sequence_parallel=self.sequence,
            data_parallel=self.data or None,
            expert_parallel=self.experts or None,
            expert_capacity=capacity,
        )


LAYOUTS = {
    "sp, ep": Layout((("sp", 2), ("ep", 2)), "sp", experts=("ep",)),
    "dp, ep": Layout((("dp", 2), ("ep", 2)), data=("dp",), experts=("ep",)),
    "ep alone, two rows": Layout((("ep", 2),), experts=("ep",), rows=2),
    "folded over dp": Layout((("dp", 4),), data=("dp",), experts=("dp",)),
    "folded over sp": Layout((("sp", 2),), "sp", experts=("sp",)),
    "folded over dp and sp": Layout((("dp", 2), ("sp", 2)), "sp", ("dp",), ("dp", "sp")),
    "dp, sp, ep": Layout((("dp", 2), ("sp", 2), ("ep", 2)), "sp", ("dp",), ("ep",)),
    "dp alone, experts everywhere": Layout((("dp", 2),), data=("dp",)),
}


@cache
def whole_model() -> nn.Module:
    torch.manual_seed(0)
    return LinearMoEForCausalLM(CONFIG).double()


def cut(parameter: Tensor, index: int, ranks: int) -> Tensor:
    """Rows of a rank's experts; other parameters are whole on every rank."""
    share = EXPERTS // ranks
    own = parameter.detach()
    return own.narrow(0, index * share, share).clone() if own.dim() == 3 else own


@dataclass
class Graph:
    """A rank's graph before the passes, and which parameter is which input."""

    captured: Captured
    names: list[str | None]

    def inputs(self, ids: Tensor, labels: Tensor, index: int, ranks: int) -> list[object]:
        parameters = dict(whole_model().named_parameters())
        flat = self.captured.flat_inputs(ids, labels)
        return [
            x if name is None else cut(parameters[name], index, ranks).requires_grad_()
            for x, name in zip(flat, self.names, strict=True)
        ]


@cache
def graph(ranks: int, rows: int) -> Graph:
    """Of a model with 1/ranks of the experts; all ranks compile the same."""
    model = copy.deepcopy(whole_model())
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(cut(parameter, 0, ranks)))

    def step(ids: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        result = model(ids, labels)
        return tuple(getattr(result, name) for name in NAMES)

    captured = Captured(step, *torch.randint(0, 32, (2, rows, LENGTH // 2)))
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [known.get(id(place)) for place in captured.places]
    assert set(known.values()) <= set(names), "a parameter is no input of the graph"
    return Graph(captured, names)


def tokens(layout: Layout) -> tuple[Tensor, Tensor]:
    """All rows of all ranks; labels that do not count are not spread evenly."""
    torch.manual_seed(1)
    ids, labels = torch.randint(0, 32, (2, layout.rows * layout.ranks(*layout.batch), LENGTH))
    labels[0, 2:5] = -100
    return ids, labels


def on_mesh(layout: Layout, weights: list[Tensor], capacity: float | None) -> list[Run]:
    meshed = layout.meshed(capacity)
    ids, labels = tokens(layout)
    ranks = layout.ranks(*layout.experts)
    one = graph(ranks, layout.rows)
    inputs = []
    for rank in range(meshed.size):
        row = meshed.place(rank, *layout.batch) * layout.rows
        own = [x[row : row + layout.rows] for x in (ids, labels)]
        if layout.sequence:
            part = LENGTH // layout.ranks(layout.sequence)
            own = [x.split(part, 1)[meshed.place(rank, layout.sequence)] for x in own]
        inputs.append(one.inputs(*own, meshed.place(rank, *layout.experts), ranks))
    return meshed.run(meshed.transformed(one.captured), inputs, weights)


def weights_of(*names: str) -> list[Tensor]:
    return [torch.tensor(float(name in names), dtype=torch.float64) for name in NAMES[:4]]


def compare(layout: Layout, names: tuple[str, ...], capacity: float | None) -> None:
    runs = on_mesh(layout, weights_of(*names), capacity)
    model = whole_model()
    model.zero_grad()
    expected = model(*tokens(layout))
    sum(getattr(expected, name) for name in names).backward()
    meshed, ranks = layout.meshed(capacity), layout.ranks(*layout.experts)
    one = graph(ranks, layout.rows)
    for rank, run in enumerate(runs):
        for i, name in enumerate(NAMES[:6]):
            want = getattr(expected, name).detach()
            torch.testing.assert_close(
                run.outputs[i], want, rtol=1e-11, atol=1e-13, check_dtype=False
            )
        for grad, name in zip(run.grads, one.names, strict=True):
            if name is not None:
                want = model.get_parameter(name).grad
                want = torch.zeros_like(model.get_parameter(name)) if want is None else want
                want = cut(want, meshed.place(rank, *layout.experts), ranks)
                grad = torch.zeros_like(want) if grad is None else grad
                torch.testing.assert_close(grad, want, rtol=1e-9, atol=1e-12, msg=f"{rank} {name}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_mesh_equals_one_rank(name: str) -> None:
    compare(LAYOUTS[name], ("loss",), None)


@pytest.mark.parametrize("name", ["sp, ep", "folded over dp", "dp alone, experts everywhere"])
def test_with_places_for_all_a_mesh_equals_one_rank(name: str) -> None:
    compare(LAYOUTS[name], ("loss",), float(EXPERTS))


def test_with_a_capacity_other_numbers_of_tokens_stop_every_rank() -> None:
    """In a later call, which nothing is compiled for: each learns it before an exchange could hang."""
    layout = LAYOUTS["ep alone, two rows"]
    meshed, one = layout.meshed(1.25), graph(2, 2)
    graphs = meshed.transformed(one.captured)
    told: list[tuple[int, str]] = []
    both = threading.Barrier(2)

    def noting(rank: int) -> Callable[..., object]:
        def call(*args: object) -> object:
            try:
                return graphs[rank](*args)
            except RuntimeError as error:
                told.append((rank, str(error)))
                # The error of one rank wakes the others, which then die of that.
                both.wait(timeout=30)
                raise

        return call

    def inputs(*lengths: int) -> list[list[object]]:
        ids = torch.zeros(2, 2, 12, dtype=torch.int64)
        return [one.inputs(*(x[:, :n] for x in ids), r, 2) for r, n in enumerate(lengths)]

    calls = [noting(rank) for rank in range(2)]
    meshed.run(calls, inputs(8, 8), weights_of("loss"))
    assert not told
    with pytest.raises(RuntimeError, match="different numbers of rows"):
        meshed.run(calls, inputs(8, 6), weights_of("loss"))
    assert sorted(rank for rank, text in told if "different numbers of rows" in text) == [0, 1]


@pytest.mark.parametrize("loss", ["aux_loss", "z_loss", "cross_entropy"])
@pytest.mark.parametrize("name", ["sp, ep", "dp, ep"])
def test_each_loss_alone_has_the_gradient_of_one_rank(name: str, loss: str) -> None:
    compare(LAYOUTS[name], (loss,), None)
