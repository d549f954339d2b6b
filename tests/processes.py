"""Real processes, joined by gloo or by NCCL: `run_processes(2, worker)` calls worker(rank, size) in each."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lmoe_compiler.runtime.join import join, variables

PATIENCE = timedelta(minutes=5)


def _enter(
    rank: int, size: int, port: int, device: str, worker: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(variables(rank, size, port))
    torch.set_num_threads(1)
    join(device, PATIENCE)
    # Not after an error: NCCL would wait for what the others have begun, and the process ends anyway.
    worker(rank, size, *args)
    dist.destroy_process_group()


def run_processes(size: int, worker: Callable[..., Any], *args: Any, device: str = "cpu") -> None:
    """An error in one of them is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, (size, port, device, worker, args), nprocs=size)


def device() -> str:
    """Of the process that asks: what run_processes was told."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def mesh_of(**axes: int) -> DeviceMesh:
    """All processes as a mesh with these axes."""
    return init_device_mesh(device(), tuple(axes.values()), mesh_dim_names=tuple(axes))


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    """fp32 rounding of sums that were taken in another order; tensor cores make products of three tf32 ones, whose
    rounding depends on where chunks begin.
    """
    error = (got - want).norm() / want.norm().clamp_min(1e-6)
    assert error < (1e-4 if got.is_cuda else 2e-5), (name, float(error))
