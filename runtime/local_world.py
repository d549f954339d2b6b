"""Several ranks in one process: a thread each, real numbers, no sockets. For tests, examples and
debugging.

`run_ranks(4, f)` calls f(rank, group) on four threads whose default process group joins them, and
returns the four results. Functional collectives, autograd through them and uneven splits work;
torch.compile does not (compile first, then run the transformed graph here).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import multi_threaded_pg

Result = TypeVar("Result")


def run_ranks(size: int, function: Callable[[int, str], Result]) -> list[Result]:
    """[function(rank, name of the group of all) for each rank], run together; the first error is
    raised.
    """
    results: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []
    store = dist.HashStore()
    isolate = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
    threaded = torch.autograd.is_multithreading_enabled()
    multi_threaded_pg._install_threaded_pg()
    isolate(True)

    def work(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            world = dist.group.WORLD
            assert world is not None
            results[rank] = function(rank, world.group_name)
        except BaseException as error:
            errors.append((rank, error))
            # Wakes the ranks that wait for this one in a collective.
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
        finally:
            _leave()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        isolate(False)
        multi_threaded_pg.ProcessLocalGroup.reset()
        multi_threaded_pg._uninstall_threaded_pg()
        # torch 2.11 leaves off what it has switched off.
        torch.autograd.set_multithreading_enabled(threaded)
    if errors:
        # Ranks that were woken die of that; the first one has the cause.
        raise errors[0][1]
    return results


def _leave() -> None:
    """What is left to clear of a world that ends with its thread.

    destroy_process_group also clears `comms`, which a thread's world lacks in torch 2.11.
    """
    distributed_c10d._update_default_pg(None)
    distributed_c10d._unregister_all_process_groups()
