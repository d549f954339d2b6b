"""Dry runs: graphs for ranks that do not exist. Volumes, what overlaps, what is kept, and the same on every rank."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import CASES, Sizes, make_inputs
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import lmoe_compiler as lmoe
from lmoe_compiler import report
from lmoe_compiler.dry_run import scaling, unroll
from lmoe_compiler.dry_run.capture import Compiled, compile_ranks
from lmoe_compiler.dry_run.memory import memory
from lmoe_compiler.dry_run.presets import PRESETS, Setting
from lmoe_compiler.dry_run.replay import COMPUTE, WEIGHTS, Replay, replay
from lmoe_compiler.dry_run.sizes import Sizes as Lengths
from lmoe_compiler.dry_run.unroll import AFTER, BEFORE
from lmoe_compiler.errors import InvalidOption
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.passes import planner
from lmoe_compiler.passes.base import GraphRecord, Record
from lmoe_compiler.passes.schedule import reordered
from lmoe_compiler.passes.traffic import collectives
from lmoe_compiler.runtime.mesh import axis_of
from lmoe_compiler.runtime.topology import SCHEDULES, TOPOLOGIES

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


# -- whole models: bytes, plans, memory, time ---------------------------------------------------------

TOKENS, ELEMENT = 64, 2
STATE = CONFIG.linear_heads * CONFIG.key_dim * CONFIG.value_dim * 4
MAP = CONFIG.linear_heads * CONFIG.key_dim * CONFIG.key_dim * 4
OTHERS = RANKS - 1


@cache
def dry(schedule: str, pattern: str = "LN") -> tuple[Compiled, Replay]:
    mixers = dict.fromkeys("LM", "gated_delta_rule") | {"N": "attention"}
    config = replace(CONFIG, layer_pattern=pattern, num_layers=len(pattern), mixers=mixers)
    compiled = compile_ranks(Setting(config, RANKS, TOKENS, TOPOLOGIES["h100"], schedule))
    return compiled, replay(compiled)


@pytest.mark.parametrize("schedule", ["all_gather", "transpose"])
def test_bytes_counted_from_the_graphs_are_those_of_the_formulas(schedule: str) -> None:
    """Per rank and layer, forward and backward; every collective of the graphs is in the list."""
    _, replayed = dry(schedule)
    share = OTHERS / RANKS
    exchange = {
        "all_gather": (OTHERS * (MAP + STATE),) * 2,
        "transpose": ((MAP + 2 * STATE) * share, 2 * STATE * share),
    }
    channels = CONFIG.linear_heads * (2 * CONFIG.key_dim + CONFIG.value_dim)
    halo = (CONFIG.conv_size - 1) * channels * ELEMENT
    keys = OTHERS * TOKENS * CONFIG.num_kv_heads * 2 * CONFIG.head_dim * ELEMENT
    rows = 2 * TOKENS * CONFIG.top_k * share * CONFIG.hidden_size * ELEMENT
    counts = CONFIG.num_experts * 8 * share
    # Loads and probabilities of E experts and the square of the router's logits.
    statistics = 2 * share * (8 * CONFIG.num_experts + 4 * CONFIG.num_experts + 4)
    expected = {
        (0, "tokens", "halo"): (halo, halo),
        (0, "state", schedule): exchange[schedule],
        (1, "tokens", "keys, values"): (keys, 2 * keys),  # again, and their gradients
        **{(layer, "experts", "rows"): (rows, rows) for layer in (0, 1)},
        **{(layer, "experts", "counts"): (counts, 0) for layer in (0, 1)},
        **{(layer, "numbers", "statistics"): (statistics, 0) for layer in (0, 1)},
        (BEFORE, "numbers", "statistics"): (8 * OTHERS, 0),  # tokens of every rank
        (AFTER, "numbers", "statistics"): (2 * share * 2 * 4, 0),  # the loss, and its labels
    }
    counted: dict[tuple[int, str, str], list[float]] = {}
    for event in replayed.events:
        if event.lane not in (COMPUTE, WEIGHTS):
            place = counted.setdefault((event.layer, event.lane, event.what), [0.0, 0.0])
            place[event.backward] += event.volume
    assert counted.keys() == expected.keys()
    for place, volumes in counted.items():
        assert volumes == pytest.approx(expected[place]), place


def test_keys_and_values_of_all_ranks_are_not_kept_for_the_backward() -> None:
    compiled, _ = dry("transpose")
    (output,) = (n for n in compiled.forward.graph.nodes if n.op == "output")
    kept = [x for x in output.args[0][compiled.num_outputs :] if isinstance(x, fx.Node)]
    sizes = Lengths(compiled.token, TOKENS, (compiled.forward, compiled.backward))
    lengths = [
        max(map(sizes.length, x.meta["val"].shape), default=0)
        for x in kept
        if isinstance(x.meta["val"], Tensor)
    ]
    assert max(lengths) == TOKENS * CONFIG.top_k < RANKS * TOKENS
    again = [c for c in collectives(compiled.backward.graph.nodes) if c.kind == "all_gather"]
    assert [c.layer for c in again] == ["model.layers.1.mixer"]


def test_the_planner_says_the_same_bytes_as_the_graph() -> None:
    for schedule in ("all_gather", "transpose"):
        compiled, replayed = dry(schedule)
        (choice,) = compiled.choices.values()
        forward = [e for e in replayed.of(lane="state") if not e.backward]
        assert sum(e.volume for e in forward) == pytest.approx(choice.costs[schedule][0])
        assert sum(e.seconds for e in forward) == pytest.approx(choice.costs[schedule][1])


def test_one_layer_of_a_kind_stands_for_all() -> None:
    """L and M are the same mixer, so LM compiles two layers where LL compiles one."""
    (apart, every), (once, reused) = dry("transpose", "LM"), dry("transpose", "LL")
    assert (apart.setting.kinds, once.setting.kinds) == ("LM", "L")
    shown = [
        [(e.layer, e.lane, e.what, e.backward, e.volume) for e in r.events] for r in (every, reused)
    ]
    assert shown[0] == shown[1]
    times = [[(e.start, e.seconds, e.exposed) for e in r.events] for r in (every, reused)]
    torch.testing.assert_close(*map(torch.tensor, times))
    assert memory(apart).peak == pytest.approx(memory(once).peak, rel=0.02)


@pytest.mark.parametrize("backward", [False, True])
def test_collectives_are_where_the_passes_after_autograd_put_them(backward: bool) -> None:
    """With every layer compiled, the whole model is the graph itself, layer by layer, as RaiseStarts orders it."""
    compiled, _ = dry("transpose", "LM")
    graph = (compiled.backward if backward else compiled.forward).graph
    parts = unroll.segments(graph, backward)
    places = [BEFORE, 0, 1, AFTER]
    as_made = [node for place in places[:: -1 if backward else 1] for node in parts[place]]
    assert sorted(as_made, key=id) == sorted(
        (n for n in graph.nodes if n.op.startswith("call")), key=id
    )
    copies: dict[fx.Node, fx.Node] = {}
    copied = fx.Graph()
    inputs = [n for n in graph.nodes if not n.op.startswith("call") and n.op != "output"]
    for node in (*inputs, *as_made):
        copies[node] = copied.node_copy(node, copies.__getitem__)
    copied.output(())
    originals = {copy: node for node, copy in copies.items()}
    moved = [originals[node] for node in reordered(copied) if node.op.startswith("call")]
    assert [step.compiled for step in compiled.steps(backward)] == moved
    assert moved != as_made


def test_moved_collectives_wait_less(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, moved = dry("transpose", "LL")
    monkeypatch.setattr(unroll, "reordered", lambda graph: list(graph.nodes))
    as_made = replay(replace(compiled))
    exposed = [sum(e.exposed for e in r.events if e.lane == "experts") for r in (moved, as_made)]
    assert exposed[0] < exposed[1]
    volumes = [sum(e.volume for e in r.events) for r in (moved, as_made)]
    assert volumes[0] == pytest.approx(volumes[1])


def test_waits_and_work_fill_the_step() -> None:
    _, replayed = dry("transpose")
    lanes = {lane: replayed.of(lane=lane) for lane in {e.lane for e in replayed.events}}
    for events in lanes.values():
        ordered = sorted(events, key=lambda e: e.start)
        assert all(a.start + a.seconds <= b.start + 1e-12 for a, b in itertools.pairwise(ordered))
    work = sum(e.seconds for e in lanes[COMPUTE])
    waits = sum(e.exposed for e in replayed.events)
    assert work + waits == pytest.approx(replayed.seconds)


def test_a_schedule_that_is_only_priced_takes_the_place_of_the_executed_one() -> None:
    compiled, _ = dry("transpose")
    planned = {layer: replace(c, planned="ring") for layer, c in compiled.choices.items()}
    asked = replace(compiled.setting, schedule="ring")
    replayed = replay(replace(compiled, setting=asked, choices=planned))
    forward = [e for e in replayed.of(lane="state", what="ring") if not e.backward]
    assert sum(e.volume for e in forward) == STATE


def test_data_parallel_groups_have_a_sequence_each() -> None:
    compiled, one = dry("transpose")
    more = replace(compiled.setting, ranks=4 * RANKS, data=4)
    assert more.sequence == RANKS
    four = replay(replace(compiled, setting=more))
    state = [sum(e.volume for e in r.of(lane="state")) for r in (one, four)]
    gradients = [sum(e.volume for e in r.of(lane=WEIGHTS)) for r in (one, four)]
    assert state[0] == state[1]
    assert gradients[0] < gradients[1]
    with pytest.raises(InvalidOption, match="8 ranks in 3 data-parallel groups"):
        replace(compiled.setting, ranks=8, data=3)


def test_memory_has_weights_states_and_what_the_backward_needs() -> None:
    compiled, _ = dry("transpose")
    found = memory(compiled)
    numel = sum(p.numel() for p in compiled.parameters.values())
    assert (found.weights, found.optimiser) == (numel * ELEMENT, numel * 12)
    longer = memory(compiled, 2 * TOKENS)
    assert longer.weights == found.weights
    # What a recurrence keeps grows with the tokens, but for the entry state and its map.
    assert 1.9 * found.kept[0] < longer.kept[0] < 2 * found.kept[0]
    # Softmax by keys keeps everybody's, but nothing for pairs of queries and keys.
    assert 1.9 * found.kept[1] < longer.kept[1] <= 2 * found.kept[1]


def test_explain_prints_the_plan_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "small", CONFIG)
    path = tmp_path / "small.png"
    arguments = ["small", "--ranks", "16", "--tokens", "64", "--longest", "65", "--out", str(path)]
    assert report.main(arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "a sequence of 1024 tokens, documents of at most 65 tokens; experts cut over 8",
        "8 heads are padded to 16",
        "state: ",
        "peak memory, at most",
        "wait for other ranks",
        str(path),
    ):
        assert words in printed
    assert path.read_bytes().startswith(b"\x89PNG")


def test_scaling_is_read_off_one_compilation(tmp_path: Path) -> None:
    compiled, replayed = dry("transpose")
    assert scaling.point(compiled, TOKENS * RANKS).seconds == pytest.approx(replayed.seconds)
    here, longer = (scaling.point(compiled, length) for length in scaling.LENGTHS[:2])
    # Softmax layers grow with the square of the sequence, recurrent ones with the sequence at most.
    assert longer.seconds > here.seconds
    assert longer.recurrences < 4 * here.recurrences
    weak = [scaling.point(compiled, n * RANKS) for n in scaling.PER_RANK]
    scaling.draw("small", [here, longer], weak, tmp_path / "scaling.svg")
    assert "recurrent ms" in scaling.table([here, longer])
    assert (tmp_path / "scaling.svg").exists()


# -- the planner -------------------------------------------------------------------------------------

SIZES_OF = {"state": 1 << 20, "map_": 1 << 20, "heads": 16}


def plan(asked: str, ranks: int, topology: str = "h100", **more: Any) -> planner.Choice:
    return planner.choose(asked, ranks, topology=TOPOLOGIES[topology], **SIZES_OF | more)


def test_the_planner_follows_ranks_topology_and_state() -> None:
    assert plan("auto", 8).schedule == "transpose"
    assert plan("auto", 2, state=64, map_=64).schedule == "all_gather"
    assert plan("auto", 64).planned == "hierarchical"
    assert plan("auto", 64, topology="nvl72", heads=64).planned == "transpose"
    # Documents that span two ranks need one hop of a ring.
    assert plan("auto", 1024, span=2).planned == "ring"
    assert "16 heads are padded to 1024" in str(plan("auto", 1024))


def test_hidden_time_is_not_counted() -> None:
    """Where everything is hidden, the fewest bytes win."""
    busy = plan("auto", 8, hidden=1.0)
    assert all(busy.exposed(name) == 0 for name in busy.costs)
    assert busy.planned == min(busy.costs, key=lambda name: busy.costs[name][0])
    assert plan("all_gather", 8).schedule == "all_gather"


def test_one_node_and_one_rank_a_node_are_ends_of_one_formula() -> None:
    cost = {x.name: x.cost for x in SCHEDULES}
    inside = cost["hierarchical"].at(TOPOLOGIES["h100"], 8, H=16, s=1024.0, m=1024.0)
    assert inside == pytest.approx(
        cost["transpose"].at(TOPOLOGIES["h100"], 8, H=16, s=1024.0, m=1024.0)
    )
