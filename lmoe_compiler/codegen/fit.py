"""What happens when a kernel needs more than the device has: the next smaller plan, or more warps, and a note."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lmoe_compiler.codegen.plan import Choice, Kernel
from lmoe_compiler.errors import ImplementationUnavailable
from lmoe_compiler.ir.nodes import Program

SMALLEST = 16
SPILLED = 1024
"""Bytes that a thread may keep in memory for want of registers before its kernel gets more warps."""
MOST_WARPS = 8


class DoesNotFit(Exception):
    """A compiled kernel cannot be loaded. `resource` is what it needs too much of, as Triton says it."""

    def __init__(self, kernel: str, resource: str, required: int, limit: int) -> None:
        super().__init__(f"{kernel}: {required} of {resource}, limit {limit}")
        self.kernel, self.resource, self.required, self.limit = kernel, resource, required, limit

    @property
    def note(self) -> str:
        return (
            f"a larger plan was left: its kernel {self.kernel} needs {self.required} of {self.resource},"
            f" this device has {self.limit}"
        )


def smaller(choice: Choice, kernel: str) -> Choice | None:
    """The next choice to try after one whose `kernel` did not fit: fewer stages, then chunks, then tiles."""
    tuning = choice.tuning(kernel)
    if tuning.num_stages > 1:
        return _tuned(choice, kernel, num_stages=tuning.num_stages - 1)
    if choice.chunk > SMALLEST:
        return replace(choice, chunk=choice.chunk // 2)
    for name in ("inner", "block", "block_second"):
        size = getattr(tuning, name)
        if size > SMALLEST:
            return _tuned(choice, kernel, **{name: size // 2})
    return None


def relieved(choice: Choice, spills: Iterable[tuple[Kernel, int]]) -> tuple[Choice, list[str]]:
    """The choice with twice the warps for kernels that spill more than a little, and why; else as given.

    A far kernel has twice the warps of its near kernel already, and runs seldom.
    """
    notes = []
    for kernel, spilled in spills:
        warps = 2 * kernel.tuning.num_warps
        if spilled > SPILLED and warps <= MOST_WARPS and kernel.levels != "far":
            choice = _tuned(choice, kernel.tuned_as, num_warps=warps)
            notes.append(
                f"{kernel.name} has {warps} warps: with half of them a thread spilled {spilled} B"
            )
    return choice, notes


def _tuned(choice: Choice, kernel: str, **changes: Any) -> Choice:
    kernels = dict(choice.kernels)
    kernels[kernel] = replace(choice.tuning(kernel), **changes)
    return replace(choice, kernels=tuple(kernels.items()))


def too_large(program: Program, reason: DoesNotFit) -> ImplementationUnavailable:
    return ImplementationUnavailable(
        f"no plan of generated kernels for {program.name} fits this device",
        why=f"the smallest one's kernel {reason.kernel} needs {reason.required} of {reason.resource}, "
        f"and the device has {reason.limit}",
        try_='r.with_options(implementation="torch"), or smaller axes',
    )
