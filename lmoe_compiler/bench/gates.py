"""The bars of issue 3 ("Fast"), and what was measured against each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmoe_compiler.bench.workloads import GATE, GATE_SHAPES, WIDE, WIDE_SHAPES, Workload

Cells = Mapping[tuple[str, tuple[int, ...], str], Mapping[str, Any]]

MEANS = {"scalar": 1.6, "gla": 2.0, "delta": 1.3}
"""Geometric means of library over ours, by family, forward and forward+backward."""

SMALL_SHAPES, SMALL_BAR = ((4, 2048, 16, 128), (8, 1024, 8, 64)), 3.0
PEAK, COLD, WARM = 0.5, 10.0, 1.0
DIRECTIONS = {"forward_us": "forward", "both_us": "forward+backward"}


@dataclass(frozen=True)
class Verdict:
    gate: str
    bar: str
    measured: float
    passed: bool

    @property
    def cells(self) -> tuple[str, str, str, str]:
        return self.gate, self.bar, f"{self.measured:.2f}", "pass" if self.passed else "FAIL"


def verdicts(cells: Cells) -> list[Verdict]:
    """A verdict for every gate that something was measured for."""
    return [*_every_cell(cells), *_means(cells), *_peaks(cells), *_first_calls(cells)]


def _ratio(cells: Cells, op: str, shape: tuple[int, ...], key: str) -> float | None:
    """The library's number over ours."""
    ours, other = cells.get((op, shape, "ours"), {}), cells.get((op, shape, "fla"), {})
    return float(other[key]) / float(ours[key]) if key in ours and key in other else None


def _every_cell(cells: Cells) -> Iterator[Verdict]:
    for workloads, shapes in ((GATE, GATE_SHAPES), (WIDE, WIDE_SHAPES)):
        for workload in workloads:
            for shape in shapes:
                bar = SMALL_BAR if shape in SMALL_SHAPES else 1.0
                for key, direction in DIRECTIONS.items():
                    ratio = _ratio(cells, workload.name, shape, key)
                    if ratio is not None:
                        gate = f"{workload.name} {', '.join(map(str, shape))} {direction}"
                        yield Verdict(gate, f">= {bar:.1f}x", ratio, ratio >= bar)


def _means(cells: Cells) -> Iterator[Verdict]:
    for family, bar in MEANS.items():
        for key, direction in DIRECTIONS.items():
            found = [
                ratio
                for workload in GATE
                for shape in GATE_SHAPES
                if workload.family == family
                and (ratio := _ratio(cells, workload.name, shape, key)) is not None
            ]
            if found:
                mean = math.exp(sum(map(math.log, found)) / len(found))
                gate = f"geometric mean, {family}, {direction}, {len(found)} cells"
                yield Verdict(gate, f">= {bar:.1f}x", mean, mean >= bar)


def _peaks(cells: Cells) -> Iterator[Verdict]:
    """Our peak of forward+backward over the library's; the worst cell of each op."""
    for workload in (*GATE, *WIDE):
        found = [
            1 / ratio
            for shape in GATE_SHAPES
            if (ratio := _ratio(cells, workload.name, shape, "peak_mib")) is not None
        ]
        if found:
            gate = f"peak memory over FLA's, {workload.name}, worst of {len(found)}"
            yield Verdict(gate, f"<= {PEAK}", max(found), max(found) <= PEAK)


def _first_calls(cells: Cells) -> Iterator[Verdict]:
    """The slowest first call of each op; forward, and the first backward."""
    for state, bar, prefix in (("cold", COLD, "cold_"), ("warm", WARM, "")):
        for workload in (*GATE, *WIDE):
            for key, direction in (("first_call_s", "forward"), ("first_backward_s", "backward")):
                found = _of(cells, workload, prefix + key)
                if found:
                    gate = f"first {direction} of {workload.name}, {state} cache, s"
                    yield Verdict(gate, f"< {bar:.0f}", max(found), max(found) < bar)


def _of(cells: Cells, workload: Workload, key: str) -> list[float]:
    return [
        float(row[key])
        for (op, _, side), row in cells.items()
        if (op, side) == (workload.name, "ours") and key in row
    ]
