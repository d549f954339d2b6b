"""`lmoe bench`: times generated kernels, beside flash-linear-attention where that is installed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "kernels": "forward and backward on the grid of shapes; --against fla",
    "decode": "one decode step, eager and in a CUDA graph; --against fla",
    "host": "what the processor does in one call, without a GPU",
    "library": "search flash-linear-attention's configurations once, for --chosen",
    "table": "print the table, the gates and the picture of results.jsonl again",
    "schedules": "state exchanges of sequence parallelism on gloo processes, beside plain gathers",
    "resources": "registers, spills and shared memory of kernels compiled for sm_90, without a GPU",
    "tune": "search plans, check their numbers, write the table that the package ships",
}


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in COMMANDS:
        rows = "\n".join(f"  lmoe bench {name:<10}{what}" for name, what in COMMANDS.items())
        print(f"{__doc__}\n\n{rows}", file=sys.stderr if argv else sys.stdout)
        return 2 if argv else 0
    command, *rest = argv
    status: int = importlib.import_module(f"lmoe_compiler.bench.{command}").main(rest)
    return status
