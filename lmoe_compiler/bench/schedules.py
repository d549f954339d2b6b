"""`lmoe bench schedules`: state exchanges side by side on real processes, and what they are measured against.

    transpose, all_gather     lmoe.compile(..., sequence_parallel="sp", schedule=...)
    states, eager             all-gather of (M, E), waited for at once and folded in a loop; autograd does the rest
    inputs, eager             all-gather of everybody's k, v and gates; every rank runs the whole sequence

By gloo, or by NCCL with a GPU each; torchrun starts the processes, or this does:

    lmoe bench schedules --ranks 4
    torchrun --nproc-per-node 2 -m lmoe_compiler.cli bench schedules --ops gla kda

Time is of one forward and backward, the slowest rank's median; bytes are what a rank receives in it. Outputs and
gradients of all are compared with the last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_compiler.backend import compile
from lmoe_compiler.bench.measure import versions
from lmoe_compiler.config import INNER
from lmoe_compiler.definition import Recurrence
from lmoe_compiler.layout import map_axes, split_maps
from lmoe_compiler.models import RECURRENCES
from lmoe_compiler.passes.planner import size as bytes_
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.traffic import kind_of, operand_of
from lmoe_compiler.runtime import attention, collectives
from lmoe_compiler.runtime.fold import apply
from lmoe_compiler.runtime.join import join, variables
from lmoe_compiler.runtime.topology import COLLECTIVES, TOPOLOGIES

Function = Callable[..., Tensor]
SIDES = ("transpose", "all_gather", "states, eager", "inputs, eager")
PATIENCE = timedelta(seconds=120)
DEFAULT = ("simple_gla", "gla", "gated_delta_rule")


@dataclass(frozen=True)
class Row:
    """One way of one recurrence. `error`: largest difference of output and gradients, relative to their largest."""

    op: str
    side: str
    milliseconds: float
    received: float
    error: float


@dataclass(frozen=True)
class Setting:
    """What is measured and where; `shape` is B, T of each rank, H, K = V."""

    device: str
    ops: tuple[str, ...]
    shape: tuple[int, int, int, int]
    steps: int
    inner: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench schedules", description=__doc__)
    parser.add_argument(
        "--ranks", type=int, help="processes, without torchrun (default: 4, or a GPU each)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--ops", nargs="+", choices=sorted(RECURRENCES), default=DEFAULT)
    parser.add_argument(
        "--shape", type=int, nargs=4, metavar=("B", "T", "H", "D"),
        help="T tokens on each rank, K = V = D (default: 1 512 8 32 on CPUs, 1 16384 16 128 on GPUs)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=7, help="timed steps (default: 7)")
    parser.add_argument(
        "--inner", choices=INNER, help="compiler (default: aot_eager on CPUs, inductor on GPUs)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given = parser.parse_args(argv)
    gpus = torch.cuda.device_count() if given.device != "cpu" else 0
    device = "cuda" if gpus or given.device == "cuda" else "cpu"
    shape = given.shape or ((1, 16384, 16, 128) if device == "cuda" else (1, 512, 8, 32))
    inner = given.inner or ("inductor" if device == "cuda" else "aot_eager")
    setting = Setting(device, tuple(given.ops), tuple(shape), given.steps, inner)
    if "WORLD_SIZE" in os.environ:
        _process(setting, given.out)
    else:
        measure(given.ranks or gpus or 4, setting, given.out)
    return 0


def measure(ranks: int, setting: Setting, out: Path) -> None:
    """Start the processes; the first of them prints and saves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_start, (ranks, port, setting, out), nprocs=ranks)


def _start(rank: int, ranks: int, port: int, setting: Setting, out: Path) -> None:
    os.environ.update(variables(rank, ranks, port))
    torch.set_num_threads(1)
    _process(setting, out)


def _process(setting: Setting, out: Path) -> None:
    device = join(setting.device, PATIENCE)
    rows = [row for op in setting.ops for row in _sides(RECURRENCES[op], setting, device)]
    if dist.get_rank() == 0:
        _leave(rows, setting, device, out)
    dist.destroy_process_group()


def _leave(rows: Sequence[Row], setting: Setting, device: torch.device, out: Path) -> None:
    ranks, backend = dist.get_world_size(), dist.get_backend()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a thread each"
    shape = "B{} T{} H{} K=V={}".format(*setting.shape)
    kind = str(setting.dtype).removeprefix("torch.")
    print(f"{ranks} {backend} processes, {name}, {shape} on each rank, {kind}, {setting.inner}")
    print(table(rows))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "schedules.json"
    where = {"ranks": ranks, "backend": backend, "device": name, "cores": os.cpu_count()}
    found = {**versions(), **where, **asdict(setting), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(found, indent=1))
    print(f"saved: {path}", flush=True)


def table(rows: Sequence[Row]) -> str:
    head = f"{'op':<18} {'exchange':<14} {'ms a step':>10} {'received':>12} {'error':>9}"
    lines = [
        f"{r.op:<18} {r.side:<14} {r.milliseconds:>10.1f} {bytes_(r.received):>12} {r.error:>9.1e}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def _sides(recurrence: Recurrence, setting: Setting, device: torch.device) -> list[Row]:
    world = dist.group.WORLD
    assert world is not None
    rank, size, group = dist.get_rank(), dist.get_world_size(), world.group_name
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("sp",))
    inputs = _inputs(recurrence, setting, rank, device)
    found: dict[str, tuple[float, float, list[Tensor]]] = {}
    for side in SIDES:
        volume = _Volume(size)
        if side == "states, eager":
            function = _by_states(recurrence, rank, size, group)
        elif side == "inputs, eager":
            function = _by_inputs(recurrence, rank, size, group)
        else:
            torch._dynamo.reset()
            function = compile(
                lambda *xs: recurrence(*xs),
                mesh=mesh,
                sequence_parallel="sp",
                schedule=side,
                even_tokens=True,
                inner=setting.inner,
                after_aot=(volume,),
                inductor={"force_disable_caches": True},  # a graph from a cache is not counted
            )
        results = _step(function, inputs)
        if side.endswith("eager"):
            with volume:
                _step(function, inputs)
        found[side] = (_time(function, inputs, setting.steps), volume.received, results)
    *_, exact = found[SIDES[-1]]
    return [
        Row(recurrence.name, side, milliseconds, received, _error(results, exact))
        for side, (milliseconds, received, results) in found.items()
    ]


def _inputs(
    recurrence: Recurrence, setting: Setting, rank: int, device: torch.device
) -> list[Tensor]:
    """Values as models give them: keys of length one, log decays below zero, rates in (0, 1)."""
    batch, length, heads, width = setting.shape
    generator = torch.Generator().manual_seed(rank)
    inputs = []
    for var in recurrence.inputs:
        leading = (batch, length, heads) if var.kind == "token" else (heads,)
        x = torch.randn(*leading, *(width for _ in var.axes), generator=generator)
        if var.name in ("k", "kappa"):
            x = torch.nn.functional.normalize(x, dim=-1)
        elif var.name in ("g", "gamma", "dt"):
            x = torch.nn.functional.logsigmoid(x) / 16
        elif var.name in ("beta", "a", "eta"):
            x = x.sigmoid()
        inputs.append(x.to(device, setting.dtype).requires_grad_())
    return inputs


def _step(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def _time(function: Function, inputs: list[Tensor], steps: int) -> float:
    """Median milliseconds of a step, of the slowest rank: by events where a device works by itself."""
    on_device = inputs[0].is_cuda
    taken = []
    for _ in range(steps):
        dist.barrier(device_ids=[inputs[0].device.index] if on_device else None)
        if on_device:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            _step(function, inputs)
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            _step(function, inputs)
            taken.append(1e3 * (time.perf_counter() - started))
    return _worst(statistics.median(taken))


def _error(results: list[Tensor], exact: list[Tensor]) -> float:
    """Of the output and every gradient, relative to its largest number; infinite where anything is not a number."""
    errors = [
        float((x.double() - y).abs().max() / y.abs().max().clamp_min(1e-12))
        for x, y in zip(results, exact, strict=True)
    ]
    return _worst(max(e if math.isfinite(e) else math.inf for e in errors))


def _worst(value: float) -> float:
    """The largest of all ranks."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    found = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return float(found)


def _by_states(recurrence: Recurrence, rank: int, size: int, group: str) -> Function:
    """The published way without overlap (LASP-2): gather span maps, wait, fold what lies before."""
    text, program = recurrence.text(), recurrence.ir
    axes = map_axes(program)

    def run(*inputs: Tensor) -> Tensor:
        span = torch.ops.lmoe.span_map(text, list(inputs), None, "")
        gathered = [
            collectives.wait(collectives.start_all_gather(x[None], size, group)) for x in span
        ]
        maps, ends = split_maps(program, gathered)
        states = []
        for var, m, own, end in zip(program.states, maps, axes, ends, strict=True):
            state = torch.zeros_like(end[0])
            for j in range(rank):
                state = (
                    apply(
                        None if m is None else m[j],
                        state,
                        " ".join(var.axes),
                        " ".join(own or ()),
                        False,
                    )
                    + end[j]
                )
            # Every rank uses all that it gathered: the backward's collectives are then the same.
            states.append(state + 0 * sum(x.sum() for x in (m, end) if x is not None))
        output: Tensor = torch.ops.lmoe.scan(text, list(inputs), states, None, "")[0]
        return output

    return run


def _by_inputs(recurrence: Recurrence, rank: int, size: int, group: str) -> Function:
    """What needs no idea of a state: everybody has all inputs and runs the whole sequence."""

    def run(*inputs: Tensor) -> Tensor:
        whole = [
            attention.gather_tokens(x, size, group) if var.kind == "token" else x
            for var, x in zip(recurrence.inputs, inputs, strict=True)
        ]
        length = inputs[0].shape[1]
        output: Tensor = recurrence(*whole)
        return output.narrow(1, rank * length, length)

    return run


class _Volume(TorchDispatchMode):
    """Bytes that this rank receives: counted while eager code runs, or as a pass over compiled graphs."""

    name = "volume"
    changes_numerics = False

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.received = ranks, 0.0

    def __repr__(self) -> str:
        return "volume"

    def __call__(self, gm: fx.GraphModule) -> Report:
        for node in gm.graph.nodes:
            args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            self._count(node.target, args, node.meta.get("val"))
        return Report(self.name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(func, args, out)
        return out

    def _count(self, target: Any, args: Any, out: Any) -> None:
        kind = kind_of(target, args)
        if kind:
            operand = operand_of(kind, args, out)
            volume, _ = COLLECTIVES[kind].at(TOPOLOGIES["cpu"], self.ranks, w=operand)
            self.received += volume
