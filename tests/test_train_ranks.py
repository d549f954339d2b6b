"""`lmoe train` on many processes: the curve of one, checkpoints between layouts, dead and late ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from test_train import flags, losses, tensors, text  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import ProcessException

import lmoe_compiler as lmoe
from lmoe_compiler.errors import CollectiveFailed, DamagedCheckpoint, InvalidTraining
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.linear_moe import LinearMoEForCausalLM
from lmoe_compiler.runtime import collectives
from lmoe_compiler.runtime.failures import explained
from lmoe_compiler.runtime.mesh import axis_of
from lmoe_compiler.train import checkpoint, run
from lmoe_compiler.train.config import TrainConfig
from lmoe_compiler.train.loop import make_optimiser
from lmoe_compiler.train.ranks import AXES, Ranks, check_layout, expert_axes

# Losses are means of some 60 numbers, so a few roundings of fp32 (6e-8 each), which training carries on.
BOUND = 2e-6
# The others lose their connection at once; torchrun looks ten times a second, and kills what hangs after 30 s.
END_SECONDS = 60
SIZES = ModelConfig(
    vocab_size=16,
    hidden_size=8,
    num_layers=1,
    layer_pattern="L",
    linear_heads=2,
    key_dim=4,
    value_dim=4,
    num_experts=4,
    expert_size=4,
    shared_expert_size=4,
)


# -- one run ---------------------------------------------------------------------------------------


def torchrun(size: int, *argv: object) -> subprocess.CompletedProcess[str]:
    # Standalone: on a free port.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, f"--nproc-per-node={size}", *map(str, argv)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def held_out(out: Path) -> list[float]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record["held_out"] for record in map(json.loads, lines) if "held_out" in record]


@pytest.mark.slow
def test_four_ranks_train_like_one_and_a_killed_one_resumes_on_two(text, tmp_path):  # noqa: F811
    """dp 2 x sp 2 with experts over sp; rank 3 dies in step 4; two ranks go on, experts over dp."""
    same = ("--batch-size", "4", "--steps", "5", "--evaluations", "3", "--accumulate", "2")
    alone, many = tmp_path / "alone", tmp_path / "many"
    run.main(flags(text, alone, *same))
    layout = ("--sp", "2", "--ep", "2", "--dp", "2")
    killed = torchrun(
        4, Path(__file__).with_name("torchrun_main.py"), 3, 4, tmp_path / "killed", "train",
        *flags(text, many, *same, "--compiler", "eager", *layout),
    )  # fmt: skip
    ended = time.time()
    assert killed.returncode, killed.stdout
    assert "exitcode  : -9" in killed.stderr
    told = r"CollectiveFailed: all_reduce failed on rank \d\n  where: lmoe train: "
    assert re.search(told, killed.stderr), killed.stderr
    assert ended - float((tmp_path / "killed").read_text()) < END_SECONDS
    assert losses(many) == pytest.approx(losses(alone)[:3], rel=BOUND)
    assert checkpoint.newest(many).name == "step-00000002"
    resumed = torchrun(2, "-m", "lmoe_compiler.cli", "train", "--resume", many, "--ep", 2)
    assert not resumed.returncode, resumed.stderr
    assert "2 ranks: sp 1, ep 2, dp 2" in resumed.stdout
    # Each step once, and a line of the first rank's for each.
    assert losses(many) == pytest.approx(losses(alone), rel=BOUND)
    assert held_out(many) == pytest.approx(held_out(alone), rel=BOUND)
    results = [json.loads((out / "result.json").read_text()) for out in (alone, many)]
    assert results[1]["bits_per_byte"] == pytest.approx(results[0]["bits_per_byte"], rel=BOUND)
    assert resumed.stdout.count("held-out bits per byte") == 1
    for name, value in tensors(checkpoint.newest(alone)).items():
        other = tensors(checkpoint.newest(many))[name]
        assert (other - value).norm() <= 1e-4 * value.norm() + 1e-7, name


# -- checkpoints -----------------------------------------------------------------------------------


def trained(ranks: Ranks, seed: int) -> tuple[LinearMoEForCausalLM, torch.optim.Optimizer]:
    """This rank's part of a model and its optimiser after a step whose gradients are random."""
    torch.manual_seed(seed)
    model = LinearMoEForCausalLM(SIZES)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    ranks.spread(model)
    optimiser = make_optimiser(model, TrainConfig())
    for name, parameter in model.named_parameters():
        count = len(parameter)
        start = ranks.index % (len(grads[name]) // count) * count
        parameter.grad = grads[name][start : start + count].clone()
    optimiser.step()
    optimiser.zero_grad()
    return model, optimiser


def reshard(rank: int, size: int, folder: Path) -> None:
    """EP 4 to EP 2: all save, pairs load, the first pair saves; in its next save a rank is killed."""
    ranks = Ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=AXES), AXES, rank)
    model, optimiser = trained(ranks, seed=0)
    assert len(model.layers[0].mlp.down) == 1
    checkpoint.save(folder, 1, checkpoint.state_of(model, optimiser, ranks), {}, 9, ranks)
    dist.destroy_process_group()
    pair, rank = divmod(rank, 2)
    store = f"file://{folder}/store{pair}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    ranks = Ranks(init_device_mesh("cpu", (2, 1), mesh_dim_names=AXES), ("dp",), rank)
    model, optimiser = trained(ranks, seed=1)
    state = checkpoint.state_of(model, optimiser, ranks)
    checkpoint.load(checkpoint.newest(folder), state, ranks)
    compare(model, optimiser, ranks)
    if pair:
        dist.barrier()
        return
    checkpoint.save(folder, 2, state, {}, 9, ranks)
    copy = folder / "damaged"
    ranks.by_first(lambda: shutil.copytree(checkpoint.newest(folder), copy))
    ranks.by_first(lambda: (copy / "__1_0.distcp").write_bytes(b"damaged"))
    with pytest.raises(DamagedCheckpoint, match=r"__1_0\.distcp has 7 bytes"):
        checkpoint.load(copy, state, ranks)
    if rank == 1:
        checkpoint._digest = lambda path: os.kill(os.getpid(), signal.SIGKILL)
    checkpoint.save(folder, 3, state, {}, 9, ranks)


def compare(model: LinearMoEForCausalLM, optimiser: torch.optim.Optimizer, ranks: Ranks) -> None:
    expected, moments = trained(ranks, seed=0)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimiser.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind, value in moments.state[q].items():
            assert torch.equal(optimiser.state[p][kind], value)


@pytest.mark.slow
def test_checkpoints_move_between_layouts_bit_by_bit(tmp_path):
    with pytest.raises(ProcessException, match=r"SIGKILL|closed by peer"):
        run_processes(4, reshard, tmp_path)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-00000001",
        "step-00000002",
    ]
    assert list(tmp_path.glob("unfinished-00000003-*"))
    for folder in checkpoint.checkpoints(tmp_path):
        model, optimiser = trained(Ranks(), seed=1)
        checkpoint.load(folder, checkpoint.state_of(model, optimiser))
        compare(model, optimiser, Ranks())


# -- ranks that are late ---------------------------------------------------------------------------


def late(rank: int, size: int) -> None:
    """Rank 1 sleeps before a halo of the forward pass, then before another model's backward pass."""
    forward = small_model("first", inner="eager")
    backward = small_model("second", inner="aot_eager")
    ids = torch.randint(0, 16, (1, 6))
    if rank == 1:
        start = collectives.start_all_to_all
        collectives.start_all_to_all = lambda *args: time.sleep(4) or start(*args)
        with pytest.raises(RuntimeError, match="closed"):
            forward(ids, ids)
        collectives.start_all_to_all = start
        dist.barrier()
        backward(ids, ids)
        time.sleep(7)
        return
    failures = []
    for model in (forward, backward):
        with pytest.raises(CollectiveFailed, match="imed out") as caught, explained():
            model(ids, ids).loss.backward()
        failures.append((caught.value.what, caught.value.where))
        if model is forward:
            dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    with pytest.raises(CollectiveFailed, match="imed out") as caught, explained():
        Ranks(init_device_mesh("cpu", (1, 2), mesh_dim_names=AXES), (), rank).all(rank)
    assert caught.value.what.startswith("all_gather_object was not finished in time")
    assert caught.value.where.startswith("lmoe_compiler.train.ranks.all, line")
    assert failures == [
        ("halo was not finished in time on rank 0", "layers.0.mixer: sequence.halo"),
        (
            "all_gather_into_tensor was not finished in time on rank 0",
            "layers.0.mixer: exchange.finish, in the backward pass",
        ),
    ]


def small_model(axis: str, inner: str) -> LinearMoEForCausalLM:
    """Over its own process groups, which give up after two seconds once everything is compiled."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,))
    torch.manual_seed(0)
    model = lmoe.compile(
        LinearMoEForCausalLM(SIZES),
        mesh=mesh, sequence_parallel=axis, inner=inner, schedule="all_gather",
    )  # fmt: skip
    ids = torch.randint(0, 16, (1, 6))
    model(ids, ids).loss.backward()
    for name in axis_of(mesh, axis).groups.values():
        group = dist.distributed_c10d._resolve_process_group(name)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    return model


@pytest.mark.slow
def test_a_time_out_names_operation_layer_and_direction():
    run_processes(2, late)


# -- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"sp": 2}, 1, "nproc-per-node 2 -m lmoe_compiler.cli train --sp 2 --ep 1 --dp 1"),
        ({"sp": 3}, 4, "sp=3 and dp=the rest do not make 4 processes"),
        ({"dp": 2}, 4, "sp=1 and dp=2 do not make 4 processes"),
        ({"sp": 2, "ep": 3}, 4, "ep=3 ranks"),
        ({"dp": 4, "batch_size": 6}, 4, "--batch-size 8"),
        ({"sp": 4, "sequence_length": 30}, 4, "--sequence-length 32"),
        ({"compiler": "none"}, 2, "--compiler aot_eager"),
    ],
)
def test_impossible_layouts_are_refused(change, size, message):
    with pytest.raises(InvalidTraining) as caught:
        check_layout(TrainConfig(**change), size)
    assert message in str(caught.value)


def test_experts_are_folded_over_ranks_that_are_there():
    layouts = {(2, 1): (), (2, 2): ("sp",), (2, 4): AXES, (1, 4): ("dp",), (4, 4): ("sp",)}
    for (sp, ep), axes in layouts.items():
        assert expert_axes(TrainConfig(sp=sp, ep=ep), 4) == axes
    assert expert_axes(TrainConfig(sp=4, ep=2), 8) == ("dp",)
