"""Real processes joined by gloo: `run_processes(2, worker)` calls worker(rank, size) in each."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _enter(
    rank: int, size: int, port: int, worker: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        worker(rank, size, *args)
    finally:
        dist.destroy_process_group()


def run_processes(size: int, worker: Callable[..., Any], *args: Any) -> None:
    """An error in one of them is raised here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_enter, (size, port, worker, args), nprocs=size)
