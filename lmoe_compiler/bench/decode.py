"""`lmoe bench decode`: one decode step, eager and in a CUDA graph, ours and the library's fused recurrent kernels.

The floor is the memory's: every state read once and written once. A step of ours is timed with a new state a call and
in place; the library allocates a new state. All calls are made in this process, one after the other.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.bench.measure import COPY_BANDWIDTH, relative_rms, require_device, versions
from lmoe_compiler.bench.workloads import WORKLOADS, bytes_of, make_inputs
from lmoe_compiler.models import RECURRENCES

OPS = ("gated_delta_rule", "simple_gla", "gla")
BATCHES = (1, 64, 256)
STEPS = 50
"""Steps that one timing covers: one after the other in eager mode, all in one graph else."""

GATES = {"gated_delta_rule": "g", "simple_gla": "g", "gla": "gk"}
"""What the library calls our `g`."""

TOLERANCE = 0.005

COLUMNS: tuple[str, ...] = ("op", "B", "floor")
COLUMNS += ("eager", "in place", "fla", "ratio", "graph", "in place", "fla", "ratio", "error")


@dataclass
class Cell:
    """One op and batch: inputs [B, H, ...] of a token and a state."""

    op: str
    inputs: dict[str, Tensor]
    state: Tensor

    @classmethod
    def make(cls, op: str, batch: int, heads: int, size: int) -> Cell:
        made = make_inputs(WORKLOADS[op], (batch, 1, heads, size), torch.bfloat16, "cuda")
        inputs = {name: x.detach()[:, 0].contiguous() for name, x in made.items()}
        return cls(op, inputs, torch.randn(batch, heads, size, size, device="cuda"))

    def ours(self, inplace: bool) -> Callable[[], Any]:
        step, state = RECURRENCES[self.op].with_options(implementation="triton").step, self.state
        values = tuple(self.inputs.values())
        return lambda: step(*values, state=state, inplace=inplace)

    def library(self) -> Callable[[], Any]:
        module = importlib.import_module(f"fla.ops.{self.op}")
        function = getattr(module, f"fused_recurrent_{self.op}")
        named = {n: x.unsqueeze(1) for n, x in self.inputs.items()}
        named[GATES[self.op]] = named.pop("g")
        named |= {"initial_state": self.state}
        return lambda: function(**named, scale=1.0, output_final_state=True)

    def error(self) -> float:
        """The worse relative error of output and state against the definition in float64."""
        rows = {n: x.unsqueeze(1).double() for n, x in self.inputs.items()}
        exact = RECURRENCES[self.op].reference(
            **rows, initial_state=self.state.double(), return_state=True
        )
        output, state = self.ours(inplace=False)()
        return max(relative_rms(output, exact[0][:, 0]), relative_rms(state, exact[1]))

    @property
    def floor_us(self) -> float:
        moved = 2 * bytes_of(self.state) + bytes_of(*self.inputs.values(), self.inputs["v"])
        return 1e6 * moved / COPY_BANDWIDTH


def timed_us(run: Callable[[], Any], steps: int, repeats: int = 15) -> float:
    """Microseconds of a step: the median of several runs of so many, launches and Python included."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * begin.elapsed_time(end) / steps)
    return statistics.median(times[3:])


def eager_us(step: Callable[[], Any]) -> float:
    def run() -> None:
        for _ in range(STEPS):
            step()

    return timed_us(run, STEPS)


def graphed_us(step: Callable[[], Any]) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(STEPS):
            step()
    return timed_us(graph.replay, STEPS)


@torch.no_grad()
def measure(op: str, batch: int, heads: int, size: int, library: bool) -> dict[str, Any]:
    cell = Cell.make(op, batch, heads, size)
    row: dict[str, Any] = {"op": op, "batch": batch, "heads": heads, "size": size}
    row["floor_us"], row["error"] = cell.floor_us, cell.error()
    sides = {"ours": cell.ours(False), "in_place": cell.ours(True)}
    if library:
        sides["fla"] = cell.library()
    for name, step in sides.items():
        row[f"{name}_eager_us"], row[f"{name}_graph_us"] = eager_us(step), graphed_us(step)
    return row


def line(row: dict[str, Any]) -> str:
    cells = [row["op"], str(row["batch"]), f"{row['floor_us']:.1f}"]
    for mode in ("eager", "graph"):
        times = [row.get(f"{side}_{mode}_us") for side in ("ours", "in_place", "fla")]
        cells += ["-" if t is None else f"{t:.1f}" for t in times]
        cells.append("-" if times[2] is None else f"{times[2] / times[0]:.2f}")
    cells.append(f"{row['error']:.1e}")
    return " ".join(f"{cell:>{17 if i == 0 else 9}}" for i, cell in enumerate(cells))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench decode", description=__doc__)
    parser.add_argument("--against", choices=["fla"], help="also time flash-linear-attention")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="K = V")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/decode.json"))
    chosen = parser.parse_args(argv)
    require_device(library=chosen.against is not None)
    print(" ".join(f"{name:>{17 if i == 0 else 9}}" for i, name in enumerate(COLUMNS)), flush=True)
    rows = []
    for op in chosen.ops:
        for batch in chosen.batches:
            row = measure(op, batch, chosen.heads, chosen.size, chosen.against is not None)
            rows.append(row)
            print(line(row), flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps({**versions(), "rows": rows}, indent=1))
    wrong = [row for row in rows if not row["error"] < TOLERANCE]
    return 1 if wrong else 0
