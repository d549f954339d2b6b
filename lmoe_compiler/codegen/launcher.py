"""One kernel of a loaded module: its parameters, its compile-time constants, and its way through Triton's JIT."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from types import ModuleType
from typing import Any

from lmoe_compiler.codegen.fit import DoesNotFit
from lmoe_compiler.codegen.plan import Kernel, Plan
from lmoe_compiler.codegen.triton import function_name


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its interpreter (on CPU tensors): fixed when triton is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class Launcher:
    """One kernel of a loaded module. Its first launch on a device goes through Triton's JIT, later ones do not."""

    def __init__(self, plan: Plan, kernel: Kernel, module: ModuleType, printer: Any) -> None:
        self.kernel = kernel
        self.function = getattr(module, function_name(plan, kernel))
        self.names = tuple(printer.args)
        self.needs_tokens = printer.needs_tokens
        self.constants = _constants(plan, printer.constant_names())
        tuning = kernel.tuning
        self.options: dict[str, Any] = {
            "num_warps": tuning.num_warps,
            "num_stages": tuning.num_stages,
        }
        if tuning.registers:
            self.options["maxnreg"] = tuning.registers
        # By device; compiled for aligned pointers and 32-bit lengths.
        self.compiled: dict[int | None, Any] = {}
        # Bytes that a thread keeps in memory for want of registers, as last compiled.
        self.spilled = 0

    def begin(self, args: Sequence[Any]) -> None:
        """Have Triton compile it for such arguments, in one of the threads of `compile_together`."""
        self.function.warmup(*args, grid=(1,), **self.constants, **self.options)

    def compile(self, grid: int, args: Sequence[Any], device: int | None, keep: bool) -> None:
        """Launch through Triton's JIT, and keep what it compiled."""
        from triton.runtime.errors import OutOfResources

        try:
            compiled = self.function[(grid,)](*args, **self.constants, **self.options)
        except OutOfResources as error:
            raise DoesNotFit(
                self.kernel.tuned_as, error.name, error.required, error.limit
            ) from None
        if not interpreting():
            self.spilled = 4 * compiled.n_spills
            if keep:
                self.compiled[device] = compiled


def compile_together(calls: Iterable[tuple[Launcher, Sequence[Any]]]) -> None:
    """Compile what a first call launches in threads: Triton's passes and the assembler run without Python's lock."""
    import triton

    def begin() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as threads, triton.AsyncCompileMode(threads):
            for launcher, args in calls:
                launcher.begin(args)

    # Triton allows one such mode in a context, and a caller may be in one.
    Context().run(begin)


def _constants(plan: Plan, names: Mapping[str, int | str]) -> dict[str, Any]:
    import triton.language as tl

    from lmoe_compiler.codegen.device import FULL

    full = FULL.value
    half = plan.dtype != "fp32" and not plan.walks
    settings = {
        "DOT": {"bf16": tl.bfloat16, "fp16": tl.float16}[plan.dtype] if half else tl.float32,
        # tf32 has the mantissa of fp16: where fp16 is not enough, neither is tf32.
        "PRECISION": "tf32" if half and plan.dtype == "bf16" else full,
        "INVERSE": "tf32" if half else full,
        # Scaled operands stay within the range of the products' type: exp(80) = 5e34, exp(8) = 3e3.
        # In fp32 an error of their exponents (1e-7 of the sum) may not show.
        "NEAR": {"bf16": 80.0, "fp16": 8.0, "fp32": 64.0}[plan.dtype],
        "SPLIT": half,
    }
    if interpreting():
        settings |= {"DOT": tl.float32, "PRECISION": "ieee", "INVERSE": "ieee", "SPLIT": False}
    return {
        name: settings[name] if isinstance(value, str) else value for name, value in names.items()
    }
