"""How the kernel of one decode step is tiled. It reads and writes every state once, and does little else.

Wide tiles make wide loads; but a small batch needs many programs to keep every SM's memory requests in flight, and
four warps a program: gated delta rule, H200, B256 H32 K = V = 128, tiles of 64: 260 us; with 8 warps 294, of 32 267.
"""

from __future__ import annotations

from math import prod

from lmoe_compiler.codegen.cost import device
from lmoe_compiler.codegen.plan import Call, Choice, Tuning, padded
from lmoe_compiler.ir.nodes import Program

WIDEST, NARROWEST = 64, 16
PROGRAMS_PER_SM = 8


def choose(program: Program, call: Call, batch: int, *, in_place: bool) -> Choice:
    """The widest tile of values that still gives enough programs.

    In place, a state without the tiled axis would be read by one program and overwritten by another.
    """
    sizes = dict(call.sizes)
    last = [var.axes[-1] for var in program.states if var.axes]
    if not last or (in_place and any(last[0] not in var.axes for var in program.states)):
        return Choice(default=Tuning(block=0, num_warps=4, num_stages=1))
    width = sizes[last[0]]
    block = min(WIDEST, padded(width))
    enough = PROGRAMS_PER_SM * device().sms
    while block > NARROWEST and batch * call.heads * -(-width // block) < enough:
        block //= 2
    rest = max(prod(padded(sizes[a]) for a in var.axes if a != last[0]) for var in program.states)
    warps = 1 << max(0, min(2, (block * rest // 1024).bit_length() - 1))
    return Choice(default=Tuning(block=block, num_warps=warps, num_stages=1))
