"""Two GPUs joined by NCCL (`pytest -m gpu tests/test_gpu_ranks.py`) compute what one does.

The workers are those of test_ranks.py and test_together.py. NCCL_NVLS_ENABLE=0 stays set where the machine wants it:
processes inherit it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import close, device, mesh_of, run_processes
from small_model import SMALL
from test_bench import measured_schedules
from test_ranks import KINDS, recurrence, train
from test_together import Layout, all_layouts
from test_train import flags, losses, text  # noqa: F401
from test_train_ranks import torchrun
from torch import Tensor

import lmoe_compiler as lmoe
from lmoe_compiler.models.linear_moe import Block

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed"),
]
on_gpus = partial(run_processes, device="cuda")

LAYOUTS = {
    "DDP": Layout(data="b", wrapper="ddp"),
    "FSDP2": Layout(data="b", wrapper="fsdp2", inner="inductor", layers="L"),
    "TP": Layout(tensor="b"),
    "EP": Layout(expert="b", layers="L"),
    "EP DDP": Layout(data="b", expert="b", wrapper="ddp", layers="N"),
    "SP, EP, FSDP2 on one axis": Layout(sequence="b", expert="b", wrapper="fsdp2"),
}


def recurrences(rank: int, size: int, inner: str) -> None:
    """Forward and backward of one of each kind, cut evenly and not, by both schedules."""
    for name in KINDS:
        for uneven in (False, True):
            for schedule in ("all_gather", "transpose"):
                torch._dynamo.reset()
                recurrence(rank, size, name, uneven, schedule=schedule, inner=inner)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_recurrences(inner: str) -> None:
    on_gpus(2, recurrences, inner)


def hybrid(rank: int, size: int, kv_heads: int, inner: str, options: dict[str, object]) -> None:
    train(rank, size, True, True, inner, kv_heads=kv_heads, **options)


@pytest.mark.parametrize(
    ("kv_heads", "inner", "options"),
    [
        (1, "inductor", {"schedule": "transpose"}),  # keys are gathered, and again for the backward
        (4, "aot_eager", {"schedule": "all_gather"}),  # heads travel
        (1, "inductor", {"expert_capacity": 2.0, "even_tokens": True}),
    ],
)
def test_a_packed_hybrid_with_experts_on_the_ranks_of_the_sequence(
    kv_heads: int, inner: str, options: dict[str, object]
) -> None:
    """Three optimiser steps; without a capacity one rank has one token, later none."""
    on_gpus(2, hybrid, kv_heads, inner, options)


def test_wrappers_and_axes() -> None:
    on_gpus(2, all_layouts, LAYOUTS)


def block_on_ranks(size: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A compiled block, its experts with a static capacity on the ranks of the sequence: its result and the drops."""
    torch.manual_seed(0)
    block = Block(SMALL, "L").to(device())
    mesh = mesh_of(sp=size)
    lmoe.parallelize(block, mesh, expert_parallel="sp")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        y, routing = block(x)
        return y, routing.dropped

    return lmoe.compile(
        run,
        mesh=mesh,
        sequence_parallel="sp",
        expert_parallel="sp",
        expert_capacity=0.75,
        even_tokens=True,
        inner="aot_eager",
    )


def captured(rank: int, size: int) -> None:
    """The block in a CUDA graph, replayed on other numbers."""
    compiled = block_on_ranks(size)
    x = torch.randn(1, 16, SMALL.hidden_size).to(device())
    with torch.no_grad():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                compiled(x)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks events of its own thread meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y, dropped = compiled(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            expected, counted = compiled(x)
            close(y, expected, "block")
            assert torch.equal(dropped, counted)
    torch.cuda.synchronize()
    dist.barrier()
    del graph  # before its communicators


def test_a_block_with_a_static_capacity_in_a_cuda_graph() -> None:
    on_gpus(2, captured)


@pytest.mark.parametrize("flag", [(), ("--expert-capacity", "2")])
def test_training_has_the_curve_of_one_gpu(text, tmp_path: Path, flag: tuple[str, ...]) -> None:  # noqa: F811
    same = ("--batch-size", "2", "--steps", "4", "--evaluations", "2", "--compiler", "aot_eager")
    alone, many = tmp_path / "alone", tmp_path / "many"
    for size, out, layout in ((1, alone, ()), (2, many, ("--sp", "2", "--ep", "2"))):
        argv = flags(text, out, *same, *layout, *flag, "--device", "cuda")
        done = torchrun(size, "-m", "lmoe_compiler.cli", "train", *argv)
        assert not done.returncode, done.stderr
    assert losses(many) == pytest.approx(losses(alone), rel=1e-4)
    assert json.loads((many / "result.json").read_text())["bits_per_byte"] == pytest.approx(
        json.loads((alone / "result.json").read_text())["bits_per_byte"], rel=1e-4
    )


def test_schedules_are_measured_side_by_side(tmp_path: Path) -> None:
    found = measured_schedules(tmp_path, "--device", "cuda", "--shape", "1", "512", "4", "64")
    assert found["backend"] == "nccl"
    assert all(row["error"] < 0.05 for row in found["rows"])
