"""`lmoe bench table results.jsonl`: the table in markdown, the gates of issue 3, time per kernel, and the picture."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lmoe_compiler.bench.gates import verdicts
from lmoe_compiler.bench.plot import bars

Row = dict[str, Any]
Key = tuple[str, tuple[int, ...], str]

COLUMNS = (
    "op", "B, T, H, K=V", "forward us", "of floor", "FLA", "ratio", "both us", "of floor", "FLA", "ratio",
    "kernels (FLA)", "peak MiB (FLA)", "first call s: cold, warm", "FLA",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench table", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--profile", action="store_true", help="also every kernel's time")
    chosen = parser.parse_args(argv)
    cells = read(chosen.results)
    text = "\n".join(document(cells, chosen.profile))
    print(text)
    chosen.results.with_suffix(".md").write_text(text + "\n")
    bars(cells, chosen.results.with_suffix(".png"))
    return (
        0
        if all(cell.get("forward_us") for (_, _, side), cell in cells.items() if side == "ours")
        else 1
    )


def read(path: Path) -> dict[Key, Row]:
    """Cells by op, shape and side; of rows for one cell the last one counts. A first call's row has its own columns."""
    cells: dict[Key, Row] = {}
    for text in path.read_text().splitlines():
        row: Row = json.loads(text)
        cell = cells.setdefault((row["op"], tuple(row["shape"]), row["side"]), {})
        if row["what"] == "first":
            named = ("first_call_s", "first_backward_s", "error")
            cell |= {k: row[k] for k in ("dtype", "device", "torch", "triton") if k in row}
            cell |= {f"cold_{k}": row[k] for k in named if k in row}
        else:
            kept = {k: v for k, v in cell.items() if k.startswith("cold_")}
            cells[row["op"], tuple(row["shape"]), row["side"]] = kept | row
    return cells


def document(cells: dict[Key, Row], profile: bool = False) -> list[str]:
    any_row = next(iter(cells.values()), {})
    told = ", ".join(f"{any_row.get(k, '?')}" for k in ("device",)) + "".join(
        f", {k} {any_row.get(k, '?')}" for k in ("torch", "triton")
    )
    dtypes = sorted({row["dtype"] for row in cells.values()})
    lines = [
        f"{told}; {' and '.join(dtypes)}, medians",
        "",
        *markdown(COLUMNS, map(_cells, *_pairs(cells))),
    ]
    softmax = [(op, shape, row) for (op, shape, side), row in cells.items() if side == "softmax"]
    if softmax:
        lines += ["", "Softmax attention (torch SDPA, causal) on the same q, k and v:", ""]
        rows = [
            (_shape(shape), _us(row, "forward"), _us(row, "both"), _number(row, "peak_mib"))
            for _, shape, row in softmax
        ]
        lines += markdown(("B, T, H, K=V", "forward us", "both us", "peak MiB"), rows)
    judged = verdicts(cells)
    if judged:
        lines += ["", *markdown(("gate", "bar", "measured", ""), [v.cells for v in judged])]
    lines += notes(cells)
    if profile:
        lines += time_per_kernel(cells)
    return lines


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def _pairs(cells: dict[Key, Row]) -> tuple[list[Key], list[Row], list[Row]]:
    keys = [key for key in cells if key[2] == "ours"]
    return keys, [cells[k] for k in keys], [cells.get((*k[:2], "fla"), {}) for k in keys]


def _cells(key: Key, ours: Row, fla: Row) -> list[str]:
    cells = [key[0], _shape(key[1])]
    for direction in ("forward", "both"):
        cells += [_us(ours, direction), _share(ours, direction), _us(fla, direction)]
        cells.append(_ratio(ours, fla, f"{direction}_us"))
    counts = [
        f"{_number(row, 'forward_kernels')}/{_number(row, 'both_kernels')}" for row in (ours, fla)
    ]
    peaks = [_number(row, "peak_mib") for row in (ours, fla)]
    for first, second in (counts, peaks):
        cells.append(f"{first} ({second})" if fla else first)
    return [*cells, _first(ours), _first(fla)]


def _shape(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _us(row: Row, direction: str) -> str:
    if "error" in row:
        return "error"
    return _number(row, f"{direction}_us")


def _number(row: Row, key: str, places: int = 0) -> str:
    return f"{row[key]:.{places}f}" if key in row else "-"


def _share(row: Row, direction: str) -> str:
    key = f"{direction}_us"
    return f"{row[f'{direction}_floor_us'] / row[key]:.0%}" if key in row else "-"


def _ratio(ours: Row, fla: Row, key: str) -> str:
    return f"{fla[key] / ours[key]:.2f}" if key in ours and key in fla else "-"


def _first(row: Row) -> str:
    both = [_number(row, key, 1) for key in ("cold_first_call_s", "first_call_s")]
    return ", ".join(both)


def notes(cells: dict[Key, Row]) -> list[str]:
    """What a reader of the table has to know: failed cells, outputs that differ, choices that were not carried."""
    lines = []
    for (op, shape, side), row in cells.items():
        where = f"{side} {op} {_shape(shape)}"
        lines += [f"{where}: {row[k]}" for k in ("error", "cold_error") if k in row]
        if "what" not in row:
            lines.append(f"{where}: not measured")
        if row.get("searched"):
            lines.append(f"{where}: searched {len(row['searched'])} kernels in the timed process")
        if not row.get("finite", True):
            lines.append(f"{where}: results are not finite")
        ours, other = cells.get((op, shape, "ours"), {}).get("sample"), row.get("sample")
        if side == "fla" and ours and other:
            off = math.dist(ours, other) / max(math.hypot(*other), 1e-30)
            if not off < 0.05:
                lines.append(f"{where}: output differs from ours by {off:.1%}")
    return ["", *lines] if lines else []


def time_per_kernel(cells: dict[Key, Row]) -> list[str]:
    """Measured, and what of it bytes, arithmetic and the dependent chain must take (of our kernels)."""
    lines = []
    head = ("kernel", "launches", "us", "share", "bytes us", "arithmetic us", "chain us")
    for (op, shape, side), row in cells.items():
        limits = row.get("bounds", {})
        for direction, kernels in row.get("kernels", {}).items():
            total = sum(us for _, _, us in kernels) or 1.0
            cell = f"{side} {op} {_shape(shape)} {direction}: {total:.0f} us in kernels"
            busy = row.get(f"{direction}_busy_us", total)
            lines += ["", f"{cell}, {busy:.0f} us with one running at least", ""]
            lines += markdown(
                head,
                [
                    (
                        name[:80],
                        str(n),
                        f"{us:.0f}",
                        f"{us / total:.0%}",
                        *_limits(limits.get(name)),
                    )
                    for name, n, us in kernels
                ],
            )
    return lines


def _limits(found: Row | None) -> list[str]:
    return [_number(found or {}, key) for key in ("bytes", "arithmetic", "latency")]
