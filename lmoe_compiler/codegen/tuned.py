"""The shipped table of tuned choices: h200.json, written by `lmoe bench tune`, read once.

A row is entered only after its outputs and gradients were checked on the device against the reference. Its key is
the structure of the program (not its name), direction, dtype, axis lengths, and how many chunks of 64 and heads a
call has, rounded to powers of two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from lmoe_compiler.codegen.plan import Call, Choice, Tuning
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.ir.text import print_program

FOLDER = Path(__file__).parent
FILES = {"NVIDIA H200": "h200.json"}


def key(program: Program, direction: str, call: Call, batch: int, length: int) -> str:
    """One line that names the calls which share a row."""
    sizes = ",".join(f"{axis}{size}" for axis, size in sorted(call.sizes))
    heads = (batch * call.heads).bit_length()
    return f"{structure(program)} {direction} {call.dtype} {sizes} BH2^{heads} T2^{length.bit_length()}"


def structure(program: Program) -> str:
    """Digest of the recurrence without its name: two spellings of one recurrence share their tuning."""
    _, _, body = print_program(program, lines=False).partition("\n")
    return hashlib.sha256(body.encode()).hexdigest()[:12]


_forced: dict[str, Choice] = {}


@contextmanager
def forced(direction: str, choice: Choice) -> Iterator[None]:
    """Every call of this direction gets `choice`: how plans are tried."""
    _forced[direction] = choice
    try:
        yield
    finally:
        del _forced[direction]


def lookup(
    device: str, program: Program, direction: str, call: Call, batch: int, length: int
) -> Choice | None:
    if direction in _forced:
        return _forced[direction]
    rows = _rows(device)
    if not rows or call.varlen:
        return None
    row = rows.get(key(program, direction, call, batch, length))
    return None if row is None else decode(row["choice"])


@cache
def _rows(device: str) -> dict[str, Any]:
    name = FILES.get(device)
    if name is None or not (FOLDER / name).exists():
        return {}
    table: dict[str, Any] = json.loads((FOLDER / name).read_text())["rows"]
    return table


def encode(choice: Choice) -> dict[str, Any]:
    return asdict(choice)


def decode(row: dict[str, Any]) -> Choice:
    kernels = tuple((name, Tuning(**tuning)) for name, tuning in row["kernels"])
    return Choice(**{**row, "default": Tuning(**row["default"]), "kernels": kernels})
