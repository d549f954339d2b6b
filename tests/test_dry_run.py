"""Dry runs: graphs for ranks that do not exist. Volumes, what overlaps, what is kept, and the same on every rank."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import CASES, Sizes, make_inputs
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import lmoe_compiler as lmoe
from lmoe_compiler.dry_run import capture, dry_run, table
from lmoe_compiler.errors import WrongOnRanks
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.passes.base import GraphRecord, Record
from lmoe_compiler.passes.halo import Halo
from lmoe_compiler.passes.sequence_parallel import SequenceParallel
from lmoe_compiler.passes.softmax_parallel import SoftmaxParallel
from lmoe_compiler.passes.verifier import signature, verify
from lmoe_compiler.runtime.mesh import Axis, axis_of
from lmoe_compiler.runtime.topology import TOPOLOGIES

RANKS, SIZES = 8, Sizes(B=1, T=6, H=16, K=8, V=4)
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    layer_pattern="LN",
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    linear_heads=8,
    key_dim=4,
    value_dim=2,
    num_experts=8,
    top_k=2,
    expert_size=8,
    shared_expert_size=8,
)
PASSES = (SequenceParallel, Halo, SoftmaxParallel)


@contextmanager
def fake_ranks(rank: int) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,), mesh_dim_names=("sp",))
    finally:
        axis_of.cache_clear()
        dist.destroy_process_group()


@cache
def compiled(rank: int, schedule: str) -> GraphRecord:
    """One gated layer, compiled by this rank of eight that do not exist."""
    case = next(case for case in CASES if case.name == "gated_delta_rule")
    inputs = [x.requires_grad_() for x in make_inputs(case, SIZES, torch.float32)[0].values()]
    gate = torch.randn(SIZES.B, SIZES.T, SIZES.H, SIZES.V, requires_grad=True)

    def layer(gate: Tensor, *xs: Tensor) -> Tensor:
        return case.recurrence(*xs) * F.silu(gate)

    torch._dynamo.reset()
    record = Record(texts=True)
    with fake_ranks(rank) as mesh:
        options = {"sequence_parallel": "sp", "schedule": schedule, "inner": "aot_eager"}
        run = lmoe.compile(layer, mesh=mesh, record=record, **options)
        run(gate, *inputs).sum().backward()
    (graph,) = record.graphs
    return graph


@pytest.mark.parametrize("schedule", ["all_gather", "transpose"])
def test_work_runs_between_start_and_wait(schedule: str) -> None:
    (_, forward), (_, backward) = compiled(0, schedule).lowered
    name = "all_gather_into_tensor" if schedule == "all_gather" else "all_to_all_single"
    places = [forward.index(word) for word in (f"{name}:", "aten.silu", "wait_tensor", "lmoe.scan")]
    assert places == sorted(places)
    counts = [text.count(f"_c10d_functional.{name}.default") for text in (forward, backward)]
    assert counts == ([1, 1] if schedule == "all_gather" else [2, 2])


@pytest.mark.parametrize("schedule", ["all_gather", "transpose"])
def test_only_a_state_and_its_map_are_kept_for_the_backward(schedule: str) -> None:
    _, backward = compiled(0, schedule).lowered[1]
    signature_line = next(line for line in backward.splitlines() if "def forward" in line)
    shapes = re.findall(r'(\w+): "f32\[([\d, ]+)\]"', signature_line)
    kept = [
        torch.Size(map(int, shape.split(", "))).numel()
        for name, shape in shapes
        if not name.startswith(("tangents", "primals"))
    ]
    state, map_ = SIZES.H * SIZES.K * SIZES.V, SIZES.H * SIZES.K * SIZES.K
    assert sum(kept) == state + map_


@pytest.mark.parametrize("schedule", ["all_gather", "transpose"])
def test_graphs_are_the_same_text_on_every_rank(schedule: str) -> None:
    first, *others = (compiled(rank, schedule) for rank in (0, RANKS // 2, RANKS - 1))
    assert all(other.lowered == first.lowered for other in others)


def test_volumes_are_those_of_the_formulas() -> None:
    tokens, element = 64, 2
    transfers = dry_run(CONFIG, RANKS, tokens, TOPOLOGIES["h100"], "transpose")
    volume = {t.what: t.volume for t in transfers}
    heads, keys, values = CONFIG.linear_heads, CONFIG.key_dim, CONFIG.value_dim
    state, map_ = heads * keys * values * 4, heads * keys * keys * 4
    assert volume["transpose"] == (map_ + 2 * state) * (RANKS - 1) / RANKS
    channels = heads * (2 * keys + values)
    assert volume["halo"] == (CONFIG.conv_size - 1) * channels * element
    assert volume["keys, values"] == (RANKS - 1) * tokens * 2 * CONFIG.head_dim * element
    rows = tokens * CONFIG.top_k * (RANKS - 1) / RANKS
    assert volume["experts, both ways"] == 2 * rows * CONFIG.hidden_size * element
    assert "layers.0.mixer" in table(transfers)


@pytest.mark.parametrize("broken", PASSES)
def test_a_missing_pass_is_caught_with_the_layer(broken: type) -> None:
    axis = Axis.on_one_group("sp", RANKS, 3, "0")
    graph = copy.deepcopy(hybrid())
    for kind in PASSES:
        if kind is not broken:
            kind(axis)(graph)
    layer = "layers.1.mixer" if broken is SoftmaxParallel else "layers.0.mixer"
    with pytest.raises(WrongOnRanks, match=layer):
        verify(graph)


def test_signatures_tell_ranks_that_differ() -> None:
    graphs = []
    for rank, schedule in ((0, "transpose"), (5, "transpose"), (5, "all_gather")):
        graph = copy.deepcopy(hybrid())
        SequenceParallel(Axis.on_one_group("sp", RANKS, rank, "0"), schedule=schedule)(graph)
        graphs.append(signature(graph))
    assert graphs[0] == graphs[1] != graphs[2]


@cache
def hybrid() -> fx.GraphModule:
    return capture(CONFIG, 64, RANKS)
