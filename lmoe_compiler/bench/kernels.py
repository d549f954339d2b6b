"""`lmoe bench kernels`: ours and the library's forward and backward, one process a cell: table, JSON, plot."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmoe_compiler.bench.measure import versions
from lmoe_compiler.bench.plot import bars
from lmoe_compiler.bench.workloads import (
    GATE,
    GATE_SHAPES,
    MORE_SHAPES,
    WIDE,
    WIDE_SHAPES,
    WORKLOADS,
    Shape,
)

COLUMNS = (
    ("op", 17), ("B,T,H,D", 16), ("fwd us", 8), ("of floor", 9), ("both us", 8), ("of floor", 9),
    ("fla fwd", 8), ("ratio", 6), ("fla both", 9), ("ratio", 6), ("kernels", 9), ("fla", 7),
    ("peak MiB", 9), ("fla", 7), ("first s", 8), ("fla s", 7),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench kernels", description=__doc__)
    parser.add_argument("--against", choices=["fla"], help="also time flash-linear-attention")
    parser.add_argument("--ops", nargs="+", choices=sorted(WORKLOADS), help="only these")
    parser.add_argument("--grid", choices=["gate", "wide", "more"], default="gate")
    parser.add_argument("--shapes", nargs="+", help="B,T,H,D instead of the grid's")
    parser.add_argument("--limit", type=int, default=120, help="seconds of one cell, default 120")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args(argv)
    cells = list(grid(chosen.grid, chosen.ops, chosen.shapes))
    sides = ("ours", "fla") if chosen.against else ("ours",)
    rows: list[dict[str, Any]] = []
    print(header(), flush=True)
    for op, shape in cells:
        found = {side: run_cell(op, shape, side, chosen.limit) for side in sides}
        rows += found.values()
        print(line(op, shape, found), flush=True)
    print(summary(rows))
    save(rows, chosen.out)
    return 0 if all("error" not in row for row in rows if row["side"] == "ours") else 1


def grid(
    name: str, ops: Sequence[str] | None, shapes: Sequence[str] | None
) -> Iterable[tuple[str, Shape]]:
    workloads = {"gate": GATE, "wide": WIDE, "more": GATE}[name]
    default = {"gate": GATE_SHAPES, "wide": WIDE_SHAPES, "more": MORE_SHAPES}[name]
    given: Iterable[Shape] = default
    if shapes:
        given = [tuple(int(n) for n in text.split(",")) for text in shapes]  # type: ignore[misc]
    for op in ops or [w.name for w in workloads]:
        for shape in given:
            yield op, shape


def run_cell(op: str, shape: Shape, side: str, limit: int) -> dict[str, Any]:
    """The worker's row, or one with `error`. The library keeps what it tuned in Triton's cache folder."""
    if side == "fla" and WORKLOADS[op].library is None:
        return {"op": op, "shape": shape, "side": side, "error": "no library call"}
    command = [sys.executable, "-m", "lmoe_compiler.bench.worker", json.dumps([op, shape, side])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"op": op, "shape": shape, "side": side, "error": f"more than {limit} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"op": op, "shape": shape, "side": side, "error": reason[:200]}
    row: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def header() -> str:
    return " ".join(f"{name:>{width}}" for name, width in COLUMNS)


def line(op: str, shape: Shape, found: dict[str, dict[str, Any]]) -> str:
    ours, fla = found["ours"], found.get("fla", {})
    cells = [op, ",".join(map(str, shape))]
    cells += [_cell(ours, "forward_us"), _share(ours, "forward")]
    cells += [_cell(ours, "both_us"), _share(ours, "both")]
    for key in ("forward_us", "both_us"):
        cells += [_cell(fla, key), _ratio(ours, fla, key)]
    for side in (ours, fla):
        kernels = [str(side.get(k, "-")) for k in ("forward_kernels", "both_kernels")]
        cells.append("/".join(kernels))
    cells += [_cell(ours, "peak_mib"), _cell(fla, "peak_mib")]
    cells += [
        f"{side['first_call_s']:.1f}" if "first_call_s" in side else "-" for side in (ours, fla)
    ]
    errors = [f"  {side}: {row['error']}" for side, row in found.items() if "error" in row]
    table = " ".join(f"{c:>{width}}" for c, (_, width) in zip(cells, COLUMNS, strict=True))
    return "\n".join([table, *errors])


def _cell(row: dict[str, Any], key: str) -> str:
    return f"{row[key]:.0f}" if key in row else "-"


def _share(row: dict[str, Any], key: str) -> str:
    return f"{row[f'{key}_floor_us'] / row[f'{key}_us']:.0%}" if f"{key}_us" in row else "-"


def _ratio(ours: dict[str, Any], fla: dict[str, Any], key: str) -> str:
    return f"{fla[key] / ours[key]:.2f}" if key in ours and key in fla else "-"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Geometric mean of the library's time over ours, by op."""
    cells = {(r["op"], tuple(r["shape"]), r["side"]): r for r in rows if "error" not in r}
    lines = []
    for op in dict.fromkeys(r["op"] for r in rows):
        means = []
        for key in ("forward_us", "both_us"):
            ratios = [
                cells[o, s, "fla"][key] / row[key]
                for (o, s, side), row in cells.items()
                if o == op and side == "ours" and (o, s, "fla") in cells
            ]
            if ratios:
                means.append(f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x")
        if means:
            lines.append(f"{op}: {' forward, '.join(means)} forward and backward")
    return "\n".join(lines)


def save(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps({**versions(), "rows": list(rows)}, indent=1))
    bars(rows, folder / "kernels.png")
