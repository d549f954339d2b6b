"""`lmoe bench library`: what the autotuner of flash-linear-attention chooses for every cell, into one small file.

Compiling is nearly all of that time, so all cores compile; an op is searched as soon as its kernels are compiled,
one op at a time on the device. Cells that the file already has are left alone: a run that was cut short goes on.
What was found for the grids on an H200 is in the package (SHIPPED), for the versions that it names.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from lmoe_compiler.bench.measure import require_device, versions
from lmoe_compiler.bench.processes import Answer, Process, Task, in_advance
from lmoe_compiler.bench.workloads import GATE, GATE_SHAPES, WIDE, WIDE_SHAPES, Shape, tuned_as

# Seconds that one shape takes with an empty cache and one core. In the order of the search.
SECONDS = {
    "kda": 250, "gla": 260, "gated_delta_rule": 140, "delta_rule": 105, "simple_gla": 125,
    "linear_attention": 90, "rwkv7": 450, "retention": 90,
}  # fmt: skip

SHIPPED = Path(__file__).parent / "library_h200.json"
SEARCH_LIMIT = 180.0
"""Seconds for the search of one op, all shapes."""


BY_NAME = {w.name: w for w in (*GATE, *WIDE)}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench library", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=sorted(SECONDS), default=list(SECONDS))
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--cache", type=Path, default=Path("runs/bench/library_cache"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/library.json"))
    chosen = parser.parse_args(argv)
    require_device(library=True)
    if chosen.out.exists() and not made_here(chosen.out):
        parser.error(
            f"{chosen.out} was made on another device or with other versions: --out another file"
        )
    clock = Clock(60 * chosen.minutes)
    found = load_choices(chosen.out if chosen.out.exists() else None)
    variables = {"TRITON_CACHE_DIR": str(chosen.cache.absolute())}
    todo = {op: missing(op, found) for op in chosen.ops if missing(op, found)}
    searches = [
        Task({"what": "search", "op": op, "shapes": shapes}, variables)
        for op, shapes in todo.items()
    ]
    with ThreadPoolExecutor(chosen.workers) as pool:
        compiled = [
            [pool.submit(run, Task(work, variables), clock) for work in shares(op, shapes)]
            for op, shapes in todo.items()
        ]
        for i, process in enumerate(in_advance(searches)):
            answers = [future.result() for future in compiled[i]]
            if all(answer.error for answer in answers):
                process.end()
                pool.shutdown(cancel_futures=True)
                print(f"nothing could be compiled: {answers[0].error}", file=sys.stderr)
                return 1
            answers.append(process.run(min(clock.left, SEARCH_LIMIT)))
            for row in answers[-1].rows:
                found[tuned_as(BY_NAME[row["op"]], tuple(row["shape"]))] = row["chosen"]
            save(found, chosen.out)
            print(
                f"{clock.seconds:6.0f} s  {searches[i].work['op']}: {report(answers)}", flush=True
            )
    return 1 if any(missing(op, found) for op in chosen.ops) else 0


class Clock:
    """Seconds since it was made, and how many of `limit` are left."""

    def __init__(self, limit: float) -> None:
        self.begin, self.limit = time.monotonic(), limit

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def left(self) -> float:
        return max(1.0, self.limit - self.seconds)


def run(task: Task, clock: Clock) -> Answer:
    return Process(task).run(clock.left)


def missing(op: str, found: dict[str, Any]) -> list[Shape]:
    """The op's shapes without a choice."""
    workload = BY_NAME[op]
    shapes = GATE_SHAPES if workload in GATE else WIDE_SHAPES
    return [shape for shape in shapes if tuned_as(workload, shape) not in found]


def shares(op: str, shapes: Sequence[Shape]) -> list[dict[str, Any]]:
    """The compilations of an op: shapes that differ in their lengths only use the same kernels."""
    kinds = {
        (batch == 1, heads, size): (batch, length, heads, size)
        for batch, length, heads, size in shapes
    }
    count = -(-SECONDS[op] // 60)
    return [
        {"what": "compile", "op": op, "shape": shape, "share": (i, count)}
        for shape in kinds.values()
        for i in range(count)
    ]


def report(answers: Sequence[Answer]) -> str:
    *compilations, search = answers
    kernels = [sum(map(len, row["chosen"].values())) for row in search.rows]
    errors = " ".join(answer.error for answer in answers if answer.error)
    counts = f"{len(compilations)} compilations, choices {kernels}"
    return f"{counts} {errors}".rstrip()


def load_choices(path: Path | None) -> dict[str, Any]:
    """By cell; none without a path."""
    found: dict[str, Any] = {} if path is None else json.loads(path.read_text())["choices"]
    return found


def save(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"of": machine(), "choices": found}, indent=0, sort_keys=True)
    path.write_text(text + "\n")


def machine() -> dict[str, str]:
    """What the library's choices depend on."""
    found = versions()
    return {
        "device": found["device"],
        "triton": found["triton"],
        "fla": metadata.version("fla-core"),
    }


def made_here(path: Path) -> bool:
    """Whether a file's choices were made with this device and these versions."""
    return bool(json.loads(path.read_text())["of"] == machine())


def shipped() -> Path | None:
    """The package's choices, where they are for this machine."""
    return SHIPPED if made_here(SHIPPED) else None
