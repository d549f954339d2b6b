"""Prints a plan as a readable Triton module. It decides nothing: one statement per node of the tile graph.

Names follow flash-linear-attention: i_ program and loop indices, o_ offsets, m_ masks, b_ blocks.
In: plan.py's kernels. Out: text that load.py writes to a file and imports. The layers of a kernel's printer are
addresses.py, expressions.py, indices.py, parallel.py, loops.py, walk.py and the signature here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lmoe_compiler.codegen.names import axis_name, identifier
from lmoe_compiler.codegen.plan import LENGTHS, Kernel, Plan, padded
from lmoe_compiler.codegen.statements import (
    DEVICE_FUNCTIONS,
)
from lmoe_compiler.codegen.walk import Walk


class KernelPrinter(Walk):
    """The text of one kernel."""

    def print(self, function: str) -> list[str]:
        """Signature, index arithmetic, and the chunk's statements in a loop (or alone, if parallel)."""
        prints = {
            "parallel": self.print_parallel,
            "step": self.print_step,
            "tokens": self.print_tokens,
            "tokens_reverse": self.print_tokens_reverse,
        }
        body = prints.get(self.kernel.order, self.print_scan)()
        self.lines, self.depth = [], 1
        self.print_indices()
        lines = [*self.lines, *body]
        far = self.kernel.levels == "far"
        if far:
            lines = self.print_far(lines)
        params = [*self.args]
        params += ["cu_seqlens", "N"] if self.plan.varlen else []
        constants = self.constant_names()
        params += ["TOKENS"] if self.needs_tokens else []
        params += ["PROGRAMS"] if far else []
        params += ["T_0", "T_ALL"] if self.sectioned else []
        signature = ", ".join([*params, "T"])
        constexprs = ", ".join(f"{c}: tl.constexpr" for c in constants)
        skip = ", ".join(f'"{p}"' for p in [*params, "T"] if p in LENGTHS)
        return [
            f"@triton.jit(do_not_specialize=[{skip}])",
            f"def {function}(",
            f"    {signature},",
            f"    {constexprs},",
            "):",
            *lines,
        ]

    def constant_names(self) -> dict[str, int | str]:
        """Compile-time parameters and their values (types are given by the launcher)."""
        names: dict[str, int | str] = {"H": self.plan.heads, **self.constants, "C": self.plan.chunk}
        for axis in self.axes_used:
            names[axis_name(axis)] = self.sizes[axis]
            names["B" + axis_name(axis)] = self.kernel.block_sizes.get(
                axis, padded(self.sizes[axis])
            )
        return names | {
            "DOT": "DOT",
            "PRECISION": "PRECISION",
            "INVERSE": "INVERSE",
            "SPLIT": "SPLIT",
            "NEAR": "NEAR",
        }


def function_name(plan: Plan, kernel: Kernel) -> str:
    return f"{identifier(plan.program.name)}_{plan.direction}_{kernel.name}"


def print_module(plan: Plan, header: Sequence[str]) -> tuple[str, dict[str, KernelPrinter]]:
    """The module's text, and per kernel the printer that knows its parameters."""
    printers: dict[str, KernelPrinter] = {}
    functions: list[str] = []
    for kernel in plan.kernels:
        printer = KernelPrinter(plan, kernel)
        functions += ["", "", *printer.print(function_name(plan, kernel))]
        printers[kernel.name] = printer
    body = "\n".join(functions)
    used = [f for f in DEVICE_FUNCTIONS if re.search(rf"(?<![\w.]){f}\(", body)]
    imports = ["import triton", "import triton.language as tl"]
    if used:
        imports += ["", f"from lmoe_compiler.codegen.device import {', '.join(used)}"]
    text = "\n".join(['"""', *header, '"""', "", *imports]) + body + "\n"
    return text, printers
