"""A collective that fails says which one it was: `layers.0.mixer: exchange.start`, not a socket's address.

The label travels as the group's name, which is the one piece of text that every collective keeps on its way through
autograd, AOTAutograd and Inductor. `named` gives a process group another name; `explained` reads it off the code that
raised. passes/label.py does the naming.
"""

from __future__ import annotations

import linecache
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from lmoe_compiler.errors import CollectiveFailed

_SIGN = " @"
_LABEL = re.compile(r"""(["'])([^"']+) @[^"']*\1""")
_OPERATION = re.compile(r"_c10d_functional(?:_autograd)?\.(\w+)")
_WAITED = re.compile(r"wait_tensor(?:\.default)?\((\w+)")


def named(group: str, label: str) -> str:
    """A name of the process group `group` that says what it is used for here.

    Where ranks are simulated and no group is registered, it is `group`.
    """
    if not dist.is_initialized() or dist.get_backend() in ("fake", "threaded"):
        return group
    name = label + _SIGN + group_of(group)
    registry: Any = torch._C._distributed_c10d
    try:
        registry._resolve_process_group(name)
    except RuntimeError:
        registry._register_process_group(name, registry._resolve_process_group(group))
    return name


def group_of(name: str) -> str:
    """The group's own name."""
    return name.rpartition(_SIGN)[2]


@contextmanager
def explained() -> Iterator[None]:
    """Raise CollectiveFailed, which names operation and layer, in the place of what a back end says.

    Gloo raises when its time-out is over or a rank is gone. NCCL waits on the device: a dead rank's peers are ended by
    torchrun; a late one's by NCCL's watchdog, which ends the process and names the group, as mesh.py described it (axis
    and kind of traffic). With TORCH_NCCL_BLOCKING_WAIT=1 it raises here too, and every wait is one of the host.
    """
    try:
        yield
    except RuntimeError as error:
        found = _failed(error.__traceback__)
        if found is None or isinstance(error, CollectiveFailed):
            raise
        operation, label = found
        message = " ".join(str(error).split())
        late = "imed out" in message
        raise CollectiveFailed(
            f"{operation} {'was not finished in time' if late else 'failed'} on rank {dist.get_rank()}",
            where=label,
            why=message,
            try_="look for a rank that ended, hangs or is much slower than the others"
            + ("; more time: init_process_group(timeout=...)" if late else ""),
        ) from error


def _failed(trace: TracebackType | None) -> tuple[str, str] | None:
    """(operation, label) of the collective whose call raised, from the innermost frame outwards."""
    frames = list(traceback.walk_tb(trace))[::-1]
    for frame, line in frames:
        if found := _in_code(frame, line) or _in_variables(frame):
            operation, label = found
            backward = any(frame.f_code.co_name == "backward" for frame, _ in frames)
            return operation, f"{label}, in the backward pass" if backward else label
    return _in_torch(frames)


def _in_code(frame: FrameType, number: int) -> tuple[str, str] | None:
    """From a line of a compiled graph: it starts a collective, or waits for one of a line above."""
    lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)[:number]
    if not lines or "_c10d_functional" not in lines[-1]:
        return None
    waited = _WAITED.search(lines[-1])
    for line in reversed(lines):
        label, operation = _LABEL.search(line), _OPERATION.search(line)
        if label and operation and (not waited or re.search(rf"\b{waited[1]}\b", line)):
            return operation[1], label[2]
    return None


def _in_torch(frames: Sequence[tuple[FrameType, int]]) -> tuple[str, str] | None:
    """From a call of torch.distributed that has no label: who made it."""
    operation = ""
    for frame, line in frames:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("torch.distributed."):
            operation = function if function != "wrapper" else operation
        elif operation and not module.startswith("torch."):
            return operation, f"{module}.{function}, line {line}"
    return None


def _in_variables(frame: FrameType) -> tuple[str, str] | None:
    """From a function that was given a named group."""
    group = frame.f_locals.get("group")
    if isinstance(group, str) and _SIGN in group:
        return frame.f_code.co_name, group.rpartition(_SIGN)[0]
    return None
