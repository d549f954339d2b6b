"""What a version of Triton compiles wrongly, and the plan that is right.

Triton before 3.7, recurrences with a solve (seen with 3.6.0 on an H200, H = 16, K = V = 128):

  half precision  the backward's `states` in a loop of several stages: LLVM adds bits of the thread's number to the rows
                  that a chunk reads and writes (seen in the PTX), and gradients of DeltaNet and KDA were wrong. With
                  one stage addresses are those of 3.7.1 again, and a backward of DeltaNet takes 1.48 ms, not 1.40.
                  Loops over tiles of keys have one stage too: several have not been shown right.
  fp32            DeltaNet, its gated form and TTT-Linear failed the test that compares them with half precision over
                  8192 tokens; their addresses are right, and it is not known what is not. They get the plan of one
                  stage, with products of three tf32 ones, that passed it before.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lmoe_compiler.codegen.plan import Call, Choice, Tuning
from lmoe_compiler.ir.nodes import Program, Step

LOOPS = ("states", "prepare", "gradients")


def avoided(choice: Choice, program: Program, call: Call) -> Choice:
    """The choice without what the Triton at hand compiles wrongly."""
    if not affected(program):
        return choice
    if call.dtype == "fp32":
        return _one_stage(program)
    kernels = dict(choice.kernels)
    for name in LOOPS:
        kernels[name] = replace(choice.tuning(name), num_stages=1)
    return replace(choice, kernels=tuple(kernels.items()))


def notes(choice: Choice, program: Program, call: Call) -> list[str]:
    """What is changed in a backward's choice, and why, for `explain`."""
    if avoided(choice, program, call) == choice:
        return []
    if call.dtype == "fp32":
        return [
            "chunks of 16 tokens and loops of one stage: Triton before 3.7 compiles other plans wrongly"
        ]
    return [
        f"{', '.join(LOOPS)} have loops of one stage: Triton before 3.7 compiles several wrongly"
    ]


def affected(program: Program) -> bool:
    """Whether the Triton at hand compiles kernels of this recurrence wrongly."""
    return _before(3, 7) and any(isinstance(s, Step) and s.feedbacks for s in program.body)


def _one_stage(program: Program) -> Choice:
    steps = [item for item in program.body if isinstance(item, Step)]
    vector = any(d.factor.axes for s in steps for d in s.decays)
    return Choice(
        chunk=16,
        prepare=True,
        prepare_rows=vector,
        default=Tuning(block=64, num_warps=4, num_stages=1),
        kernels=(
            ("prepare", Tuning(0, 0, 4 if vector else 1, 1)),
            ("gradients", Tuning(32, 0, 4, 1)),
        ),
    )


@cache
def _before(*version: int) -> bool:
    try:
        import triton
    except ImportError:
        return False
    return tuple(map(int, triton.__version__.split(".")[:2])) < version
