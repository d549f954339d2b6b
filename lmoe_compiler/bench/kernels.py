"""`lmoe bench kernels`: ours beside the library's, one process a cell; rows are appended to a file as they come.

1. first    every cell's first call with caches of its own that are empty, several at a time (--workers 1: alone)
2. measure  the same cell again in a fresh process and with those caches, alone on the device
3. the table, the gates of issue 3 and the picture (also `lmoe bench table`)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe_compiler.bench import table
from lmoe_compiler.bench.library import load_choices, shipped
from lmoe_compiler.bench.measure import require_device, versions
from lmoe_compiler.bench.processes import Answer, Task, one_by_one, side_by_side
from lmoe_compiler.bench.workloads import (
    DTYPES,
    GATE,
    GATE_SHAPES,
    MORE_SHAPES,
    WIDE,
    WIDE_SHAPES,
    WORKLOADS,
    Shape,
    shape_of,
    tuned_as,
)
from lmoe_compiler.config import CACHE_DIR

GRIDS = {"gate": (GATE, GATE_SHAPES), "wide": (WIDE, WIDE_SHAPES), "more": (GATE, MORE_SHAPES)}


@dataclass(frozen=True)
class Cell:
    op: str
    shape: Shape
    side: str

    @property
    def name(self) -> str:
        return f"{self.side}-{self.op}-{'x'.join(map(str, self.shape))}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench kernels", description=__doc__)
    parser.add_argument("--against", choices=["fla"], help="also time flash-linear-attention")
    parser.add_argument(
        "--chosen",
        type=Path,
        help="what `lmoe bench library` wrote; default: the package's, if they fit",
    )
    parser.add_argument("--softmax", action="store_true", help="also time softmax attention")
    parser.add_argument("--ops", nargs="+", choices=sorted(WORKLOADS), help="only these")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="bf16 unless ours are timed alone"
    )
    parser.add_argument("--grid", nargs="+", choices=list(GRIDS), default=["gate"])
    parser.add_argument("--shapes", nargs="+", help="B,T,H,D instead of the grid's")
    parser.add_argument("--limit", type=float, default=90, help="seconds of one cell, default 90")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--skip-first", action="store_true", help="no first calls without caches")
    parser.add_argument("--profile", action="store_true", help="also print every kernel's time")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--cache", type=Path, help="caches of the cells; default: in --out")
    chosen = parser.parse_args(argv)
    if chosen.dtype != "bf16" and (chosen.against or chosen.softmax):
        parser.error(f"--dtype {chosen.dtype} times our kernels alone: leave --against, --softmax")
    require_device(library=bool(chosen.against))
    chosen.out.mkdir(parents=True, exist_ok=True)
    results = chosen.out / f"results{'' if chosen.dtype == 'bf16' else f'-{chosen.dtype}'}.jsonl"
    cache = (chosen.cache or chosen.out / "cache").absolute()
    path = chosen.chosen or (shipped() if chosen.against else None)
    if chosen.against:
        print(
            f"choices of the library's autotuner: {path or 'none, it searches (lmoe bench library)'}"
        )
    choices = load_choices(path)
    cells = list(grid(chosen))
    if not chosen.skip_first:
        shutil.rmtree(cache, ignore_errors=True)
        compiled = [
            task(c, "first", cache, choices, chosen.dtype) for c in cells if c.side != "softmax"
        ]
        several = side_by_side(compiled, chosen.limit, chosen.workers)
        alone = one_by_one(compiled, chosen.limit)
        for answer in alone if chosen.workers == 1 else several:
            append(results, answer)
    measured = [task(c, "measure", cache, choices, chosen.dtype) for c in cells]
    for answer in one_by_one(measured, chosen.limit):
        append(results, answer)
    return table.main([str(results), *(["--profile"] if chosen.profile else [])])


def grid(chosen: argparse.Namespace) -> Iterator[Cell]:
    """The library where there is a gate for it; softmax once a shape, with the first op's q, k and v."""
    given = [shape_of(text) for text in chosen.shapes or ()]
    seen: set[Shape] = set()
    for name in chosen.grid:
        workloads, shapes = GRIDS[name]
        for workload in workloads:
            if chosen.ops and workload.name not in chosen.ops:
                continue
            for shape in given or shapes:
                yield Cell(workload.name, shape, "ours")
                if chosen.against and name != "more":
                    yield Cell(workload.name, shape, "fla")
                if chosen.softmax and shape not in seen:
                    seen.add(shape)
                    yield Cell("linear_attention", shape, "softmax")


def task(cell: Cell, what: str, cache: Path, choices: dict[str, Any], dtype: str = "bf16") -> Task:
    work: dict[str, Any] = {"what": what, **vars(cell), "dtype": dtype}
    if cell.side == "fla":
        work["chosen"] = choices.get(tuned_as(WORKLOADS[cell.op], cell.shape))
    own = cache / cell.name
    return Task(work, {"TRITON_CACHE_DIR": str(own), CACHE_DIR: str(own / "lmoe")})


def append(path: Path, answer: Answer) -> None:
    """One line a row; a worker that failed leaves a row with `error`."""
    work = {name: x for name, x in answer.task.work.items() if name != "chosen"}
    rows = answer.rows or [work]
    if answer.error:
        rows[-1]["error"] = answer.error
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row | versions()) + "\n")
    brief = {k: v for k, v in rows[-1].items() if k.endswith(("_us", "_s", "error"))}
    print(work["what"], work["side"], work["op"], work["shape"], brief, flush=True)
