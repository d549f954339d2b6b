"""Picks a plan's parameters from shapes, dtype and the program's structure."""

from __future__ import annotations

from lmoe_compiler.codegen.partition import Call
from lmoe_compiler.codegen.plan import Choice, Tuning
from lmoe_compiler.ir.nodes import Program, Step


def choose(program: Program, direction: str, call: Call, batch: int, length: int) -> Choice:
    """The default choice: chunks of 64 (32 in fp32), factors prepared where there is a solve or a vector decay."""
    steps = [s for s in program.body if isinstance(s, Step)]
    heavy = any(s.feedbacks or any(d.factor.axes for d in s.decays) for s in steps)
    half = call.dtype != "fp32"
    chunk = 64 if half else 32
    wide = Tuning(block=0, num_warps=8, num_stages=1)
    scan = Tuning(block=64, num_warps=4, num_stages=2)
    return Choice(
        chunk=chunk,
        prepare=heavy,
        default=scan,
        kernels=(("gradients", wide), ("prepare", Tuning(block=0, num_warps=4, num_stages=1))),
    )
