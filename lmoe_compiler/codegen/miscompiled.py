"""What a version of Triton was seen to compile wrongly on a device, and the plan that is right.

Triton before 3.7: the backward's `states` of recurrences with a solve. In a loop of several stages it left wrong states
at some chunks, others each time: DeltaNet and KDA, bf16, T = 16384, H = 16, K = V = 128 on an H200 (3.6.0; 3.7.1 is
right with the same tiles). With one stage it is right; a backward of DeltaNet then takes 1.48 ms, not 1.40.
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


@cache
def _before(*version: int) -> bool:
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) < version
