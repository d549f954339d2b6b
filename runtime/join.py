"""Joining the processes of a run: a device each, and the library that moves data between devices of that kind.

NCCL is not given a `device_id`: a process group then makes its communicator at its first collective, and those of
traffic that there is none of take no memory.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lmoe_compiler.errors import InvalidOption

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


def join(device_type: str, timeout: timedelta) -> torch.device:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); this one's
    device. Collectives give up after `timeout`. Raises InvalidOption where the machine has fewer GPUs than processes.
    """
    device = torch.device(device_type)
    if device.type == "cuda":
        index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if index >= count:
            raise InvalidOption(
                f"process {index} of this machine has no GPU of its own",
                why=f"torch sees {count}, and NCCL joins one process with each",
                try_=f"torchrun --nproc-per-node {max(1, count)} ..., or device cpu",
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    dist.init_process_group(BACKENDS[device.type], timeout=timeout)
    return device


def variables(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun would set for process `rank` of `size` on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
