"""`lmoe bench tune`: tries plans on this GPU and writes the fastest right ones to the table that the package ships.

Every candidate is checked first, many at a time; then each is timed, alone on the device. Trials run in processes of
their own: a miscompiled kernel can end in an illegal access, after which a process is lost.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.bench.trial import STEPS
from lmoe_compiler.bench.workloads import GATE, GATE_SHAPES, STEP_SHAPES, WORKLOADS, Shape, shape_of
from lmoe_compiler.codegen import tuned
from lmoe_compiler.codegen.compiled import Request
from lmoe_compiler.codegen.cost import device
from lmoe_compiler.codegen.plan import Choice, Tuning
from lmoe_compiler.codegen.rules import BESIDE, Kind, by_rule
from lmoe_compiler.models import RECURRENCES

DIRECTIONS = ("forward", "backward", *STEPS)
GROUP = 3
"""Candidates that one process checks: importing takes it as long as checking one or two."""
TOLERANCE = 0.02
"""Relative RMS error above which a plan is wrong; right ones in bf16 are at 0.002 to 0.004, gates below 0.01."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lmoe bench tune", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=sorted(WORKLOADS))
    parser.add_argument(
        "--shapes",
        nargs="+",
        help="B,T,H,D; default: the gate grid, for steps those of bench decode",
    )
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--limit", type=int, default=120, help="seconds for the checks of one call")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--out", type=Path, help="default: the table in the package")
    chosen = parser.parse_args(argv)
    given = [shape_of(text) for text in chosen.shapes or ()]
    name = tuned.FILES.get(device().name)
    path = chosen.out or (tuned.FOLDER / name if name else Path("tuned.json"))
    empty: dict[str, Any] = {"device": device().name, "rows": {}}
    table = json.loads(path.read_text()) if path.exists() else empty
    ops = chosen.ops or [w.name for w in GATE]
    cells = [
        Cell(op, shape, direction)
        for op, direction in itertools.product(ops, chosen.directions)
        for shape in given or (STEP_SHAPES if direction in STEPS else GATE_SHAPES)
    ]
    with ThreadPoolExecutor(chosen.workers) as pool:
        checks = [cell.check(pool, chosen.limit) for cell in cells]
    for cell, check in zip(cells, checks, strict=True):
        errors = {number: value for part in check for number, value in part.result().items()}
        row = cell.fastest(errors, chosen.limit)
        if row is not None:
            table["rows"][cell.key] = row
            path.write_text(json.dumps(table, indent=1) + "\n")
    return 0


def candidates(request: Request) -> Iterator[Choice]:
    """The rule's choice first, then its neighbours: one thing changed."""
    first = request.rule()
    yield first
    if not request.is_step:
        yield from _otherwise_cut(request, first)
    for kernel in (k for k in request.plan(first).kernels if k.levels != "far"):
        scan = kernel.order != "parallel"
        loops = scan or bool(kernel.inner)
        for tuning in neighbours(first.tuning(kernel.name), loops=loops, scan=scan):
            changed = {**dict(first.kernels), kernel.name: tuning}
            yield replace(first, kernels=tuple(changed.items()))


def _otherwise_cut(request: Request, first: Choice) -> Iterator[Choice]:
    """Other chunks, spans and sections, and more or less of what is stored before a scan, or for gradients."""
    call, (batch, length) = request.call, request.lengths
    kind = Kind.of(request.program, call)
    solves = kind.solves
    for chunk in {32, 64} - {first.chunk}:
        yield replace(first, chunk=chunk)
    if first.prepare:
        yield replace(first, prepare_rows=not first.prepare_rows)
    else:
        yield replace(first, prepare=True)
    if first.recompute:
        if not kind.still:
            yield replace(first, products=not first.products)
        yield by_rule(request.program, request.tuned_as, call, batch, length, may_recompute=False)
        if first.section:
            yield replace(first, section=0, overlap=False)
        elif solves and length > BESIDE:
            yield replace(first, section=BESIDE, overlap=True, span=0)
    if not solves or first.recompute or not request.is_backward:
        whole = 1 << ((first.section or length) - 1).bit_length()
        for span in {0, (first.span or whole) // 2, 2 * first.span} - {first.span}:
            if span == 0 or 2 * first.chunk <= span < whole:
                yield replace(first, span=span)


def neighbours(tuning: Tuning, *, loops: bool, scan: bool = False) -> Iterator[Tuning]:
    """Twice and half the warps, the tiles, or both; in a loop over chunks or tiles one stage more and one less; in a
    scan all loads ahead or not; other registers.
    """
    for half in (True, False):
        scaled = [_scaled(tuning, "num_warps", half, range(1, 9))]
        for name in ("block", "inner"):
            tile = _scaled(tuning, name, half, range(16, 129))
            scaled += [tile, tile and _scaled(tile, "num_warps", half, range(1, 9))]
        yield from filter(None, scaled)
    for stages in (tuning.num_stages - 1, tuning.num_stages + 1):
        if loops and 1 <= stages <= 4:
            yield replace(tuning, num_stages=stages)
    if scan:
        yield replace(tuning, ahead=not tuning.ahead)
    yield replace(tuning, registers=0 if tuning.registers else 168)


def _scaled(tuning: Tuning, name: str, half: bool, allowed: range) -> Tuning | None:
    """With half or twice of one number, where that is allowed."""
    size = getattr(tuning, name)
    other = size // 2 if half else 2 * size
    return replace(tuning, **{name: other}) if other in allowed else None


class Cell:
    """One op, shape and direction, with its numbered candidates."""

    def __init__(self, op: str, shape: Shape, direction: str) -> None:
        program = RECURRENCES[op].program()
        request = request_of(program, direction, shape)
        self.task = {"op": op, "shape": shape, "direction": direction}
        self.numbered = list(enumerate(candidates(request)))
        self.key = tuned.key(request.program, request.tuned_as, request.call, *request.lengths)

    def check(self, pool: ThreadPoolExecutor, limit: int) -> list[Future[dict[int, Any]]]:
        """Every candidate against float64, a few to a process (which also fills Triton's cache)."""
        task = self.task | {"what": "check"}
        groups = [self.numbered[i : i + GROUP] for i in range(0, len(self.numbered), GROUP)]
        return [pool.submit(trials, task, group, limit) for group in groups]

    def fastest(self, errors: dict[int, Any], limit: int) -> dict[str, Any] | None:
        """The table's row: the fastest candidate whose numbers are right."""
        right = [(n, c) for n, c in self.numbered if _number(errors.get(n)) < TOLERANCE]
        times = trials(self.task | {"what": "time"}, right, limit)
        for number, choice in self.numbered:
            print(
                *self.task.values(),
                errors.get(number),
                times.get(number),
                _brief(choice),
                flush=True,
            )
        measured = {n: t for n, t in times.items() if isinstance(t, float)}
        if not measured:
            return None
        best = min(measured, key=lambda n: measured[n])
        found = {"us": measured[best], "rule_us": measured.get(0), "error": errors[best]}
        encoded = tuned.encode(dict(self.numbered)[best])
        return {"op": self.task["op"], "shape": self.task["shape"], **found, "choice": encoded}


def _number(value: Any) -> float:
    return value if isinstance(value, float) else float("inf")


def _brief(choice: Choice) -> str:
    kernels = " ".join(
        f"{n}:{t.block},{t.inner},w{t.num_warps},s{t.num_stages}" for n, t in choice.kernels
    )
    return f"C{choice.chunk} span {choice.span} stages {choice.default.num_stages} {kernels}"


def trials(
    task: dict[str, Any], numbered: Sequence[tuple[int, Choice]], limit: int
) -> dict[int, Any]:
    """Values by number; a choice whose process died or hung has the reason. The rest goes on in a new process."""
    found: dict[int, Any] = {}
    left = list(numbered)
    while left:
        rows = [[number, tuned.encode(choice)] for number, choice in left]
        command = [sys.executable, "-m", "lmoe_compiler.bench.trial"]
        # On its standard input: a hundred choices are too long for an argument.
        work = json.dumps(task | {"choices": rows})
        try:
            done = subprocess.run(
                command, input=work, capture_output=True, text=True, timeout=limit, check=False
            )
            output, reason = done.stdout, (done.stderr.strip().splitlines() or ["died"])[-1]
        except subprocess.TimeoutExpired as expired:
            output = expired.stdout.decode() if isinstance(expired.stdout, bytes) else ""
            reason = f"more than {limit} s"
        for text in output.splitlines():
            number, value = json.loads(text)
            found[number] = reason if value == "begin" else value
        if not any(number in found for number, _ in left):
            return found | {number: reason for number, _ in left}
        left = [(number, choice) for number, choice in left if number not in found]
    return found
