"""`lmoe bench library`: what the autotuner of flash-linear-attention chooses for every cell, into one small file.

Compiling is nearly all of that time, so all cores compile; an op is searched as soon as its kernels are compiled,
one op at a time on the device. Cells that the file already has are left alone: a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lmoe_compiler.bench.measure import require_device
from lmoe_compiler.bench.processes import Answer, Process, Task
from lmoe_compiler.bench.workloads import GATE, GATE_SHAPES, WIDE, WIDE_SHAPES, Shape, tuned_as

# Seconds that one shape takes with an empty cache and one core. In the order of the search.
SECONDS = {
    "kda": 250, "gla": 260, "gated_delta_rule": 140, "delta_rule": 105, "simple_gla": 125,
    "linear_attention": 90, "rwkv7": 450, "retention": 90,
}  # fmt: skip

SEARCH_LIMIT = 180.0
"""Seconds for the search of one op, all shapes."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench library", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=sorted(SECONDS), default=list(SECONDS))
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--cache", type=Path, default=Path("runs/bench/library_cache"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/library.json"))
    chosen = parser.parse_args(argv)
    require_device(library=True)
    end = time.monotonic() + 60 * chosen.minutes
    found = load_choices(chosen.out if chosen.out.exists() else None)
    cells = {
        op: [s for s in shapes_of(op) if tuned_as(BY_NAME[op], s) not in found] for op in chosen.ops
    }
    cells = {op: shapes for op, shapes in cells.items() if shapes}
    variables = {"TRITON_CACHE_DIR": str(chosen.cache.absolute())}

    def left() -> float:
        return max(1.0, end - time.monotonic())

    with ThreadPoolExecutor(chosen.workers) as pool:
        compiled = {
            op: [pool.submit(_compile, work, variables, left) for work in shares(op, shapes)]
            for op, shapes in cells.items()
        }
        ready = [
            (op, Task({"what": "search", "op": op, "shapes": s}, variables))
            for op, s in cells.items()
        ]
        process = Process(ready[0][1]) if ready else None
        for i, (op, _) in enumerate(ready):
            following = Process(ready[i + 1][1]) if i + 1 < len(ready) else None
            answers = [future.result() for future in compiled[op]]
            begin = time.monotonic()
            assert process is not None
            answers.append(process.run(min(left(), SEARCH_LIMIT)))
            for row in answers[-1].rows:
                found[tuned_as(BY_NAME[op], tuple(row["shape"]))] = row["chosen"]
            save(found, chosen.out)
            _report(op, answers, begin, end - 60 * chosen.minutes)
            process = following
    missing = [
        op for op, shapes in cells.items() for s in shapes if tuned_as(BY_NAME[op], s) not in found
    ]
    return 1 if missing else 0


BY_NAME = {w.name: w for w in (*GATE, *WIDE)}


def shapes_of(op: str) -> Sequence[Shape]:
    return GATE_SHAPES if BY_NAME[op] in GATE else WIDE_SHAPES


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


def _compile(work: dict[str, Any], variables: dict[str, str], left: Any) -> Answer:
    return Process(Task(work, variables)).run(left())


def _report(op: str, answers: Sequence[Answer], begin: float, start: float) -> None:
    now = time.monotonic()
    errors = [answer.error for answer in answers if answer.error]
    kernels = [sum(map(len, row["chosen"].values())) for row in answers[-1].rows]
    print(
        f"{now - start:6.0f} s  {op}: {len(answers) - 1} compilations, search {now - begin:.0f} s,"
        f" choices {kernels} {' '.join(errors)}",
        flush=True,
    )


def load_choices(path: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if path is None else json.loads(path.read_text())
    return found


def save(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
