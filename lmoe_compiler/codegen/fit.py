"""What happens when a kernel needs more than the device has: the next smaller plan, and a note that says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lmoe_compiler.codegen.plan import Choice
from lmoe_compiler.errors import ImplementationUnavailable
from lmoe_compiler.ir.nodes import Program

SMALLEST = 16


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
