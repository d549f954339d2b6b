"""What a version of Triton compiles wrongly, and the plan that is right.

Triton before 3.7: the backward's `states` of recurrences with a solve, in a loop of several stages. Its LLVM adds bits
of the thread's number to the rows that a chunk reads and writes; seen in the PTX of 3.6.0 for DeltaNet and KDA (bf16,
H = 16, K = V = 128, T = 16384), whose gradients were wrong on an H200. With one stage addresses are those of 3.7.1, and
a backward of DeltaNet takes 1.48 ms instead of 1.40.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lmoe_compiler.codegen.plan import Choice
from lmoe_compiler.ir.nodes import Program, Step


def avoided(choice: Choice, program: Program) -> Choice:
    """The choice without what the Triton at hand compiles wrongly."""
    solves = any(isinstance(item, Step) and item.feedbacks for item in program.body)
    states = choice.tuning("states")
    if not solves or states.num_stages == 1 or not _before(3, 7):
        return choice
    kernels = {**dict(choice.kernels), "states": replace(states, num_stages=1)}
    return replace(choice, kernels=tuple(kernels.items()))


def notes(choice: Choice, program: Program) -> list[str]:
    """What is changed in a backward's choice, and why, for `explain`."""
    if avoided(choice, program) == choice:
        return []
    return ["states have a loop of one stage: Triton before 3.7 compiles one of several wrongly"]


@cache
def _before(*version: int) -> bool:
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) < version
