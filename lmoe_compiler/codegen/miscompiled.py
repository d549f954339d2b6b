"""What a version of Triton compiles wrongly, and the plan that is right.

Triton before 3.7: the backward's `states` of recurrences with a solve, in a loop of several stages. Its LLVM adds bits
of the thread's number to the rows that a chunk reads and writes; seen in the PTX of 3.6.0 for DeltaNet and KDA (bf16,
H = 16, K = V = 128, T = 16384), whose gradients were wrong on an H200. With one stage addresses are those of 3.7.1, and
a backward of DeltaNet takes 1.48 ms instead of 1.40.

Triton 3.7.1 (others were not tried): `gradients` of GLA in chunks of 64. Of a product whose left operand is a
transposed block of registers compute-sanitizer says that it reads shared memory out of range (bf16, K = V = 64, tiles
of 32 keys), and results differ from call to call. With K = V = 128 they did once, where sections ran side by side: not
isolated, and excluded too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lmoe_compiler.codegen.plan import Choice
from lmoe_compiler.ir.nodes import Program, Step

LONGEST = 32
"""Rows of a chunk in a backward whose decays are vectors."""


def avoided(choice: Choice, program: Program) -> Choice:
    """The choice for a backward without what the Triton at hand compiles wrongly."""
    steps = [item for item in program.body if isinstance(item, Step)]
    states = choice.tuning("states")
    if any(decay.factor.axes for s in steps for decay in s.decays):
        choice = replace(choice, chunk=min(choice.chunk, LONGEST))
    if not any(s.feedbacks for s in steps) or states.num_stages == 1 or not _before(3, 7):
        return choice
    kernels = {**dict(choice.kernels), "states": replace(states, num_stages=1)}
    return replace(choice, kernels=tuple(kernels.items()))


def notes(choice: Choice, program: Program) -> list[str]:
    """What is changed in a backward's choice, and why, for `explain`."""
    found, chosen = [], avoided(choice, program)
    if chosen.chunk < choice.chunk:
        found.append(
            f"chunks of {LONGEST} rows: Triton compiles gradients of longer ones wrongly where decays are vectors"
        )
    if chosen.tuning("states") != choice.tuning("states"):
        found.append(
            "states have a loop of one stage: Triton before 3.7 compiles one of several wrongly"
        )
    return found


@cache
def _before(*version: int) -> bool:
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) < version
