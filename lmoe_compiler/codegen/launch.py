"""Runs a plan: allocates what its kernels store, launches them, and keeps what a repeated launch can reuse."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.codegen.addresses import identifier
from lmoe_compiler.codegen.load import load_module
from lmoe_compiler.codegen.plan import Kernel, Plan, Value
from lmoe_compiler.codegen.triton import function_name, print_module

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its interpreter (on CPU tensors): fixed when triton is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Extent:
    """The lengths of one call: `sequences` is B, or the number of packed documents."""

    batch: int
    length: int
    sequences: int
    varlen: bool

    def slots(self, tokens: int) -> int:
        """Parts of so many tokens in all sequences; packed documents leave at most one slot each unused."""
        if self.varlen:
            return self.length // tokens + self.sequences
        return self.batch * -(-self.length // tokens)


def shape_of(value: Value, plan: Plan, extent: Extent) -> tuple[int, ...]:
    if value.parts:
        return (value.parts, *shape_of(replace(value, parts=0), plan, extent))
    sizes = plan.size_of | {"s": plan.chunk}
    axes = [sizes[a.rstrip("'")] for a in value.axes]
    if value.per == "row":
        return (extent.batch, extent.length, plan.heads, *axes)
    if value.per == "vector":
        return (plan.heads, extent.batch * extent.length)
    if value.per == "chunk":
        return (extent.slots(plan.chunk), plan.heads, *axes)
    if value.per == "span":
        return (extent.slots(value.span), plan.heads, *axes)
    return (extent.sequences, plan.heads, *axes)


class Launcher:
    """One kernel of a loaded module. The first launch of a binding goes through Triton's JIT, later ones do not."""

    def __init__(self, plan: Plan, kernel: Kernel, module: ModuleType, printer: Any) -> None:
        self.plan, self.kernel = plan, kernel
        self.function = getattr(module, function_name(plan, kernel))
        self.names = tuple(printer.args)
        self.needs_tokens = printer.needs_tokens
        self.constants = _constants(plan, printer.constant_names())
        self.compiled: Any = None
        self.tiles = 1
        for axis, block in kernel.tiles:
            self.tiles *= -(-plan.size_of[axis] // block)
        tuning = kernel.tuning
        self.options: dict[str, Any] = {
            "num_warps": tuning.num_warps,
            "num_stages": tuning.num_stages,
        }

    def __call__(
        self, tensors: Mapping[str, Tensor], extent: Extent, cu_seqlens: Tensor | None
    ) -> None:
        part = self.plan.chunk if self.kernel.order == "parallel" else self.kernel.span
        programs = extent.slots(part) if part else extent.sequences
        grid = (programs * self.plan.heads * self.tiles,)
        if grid[0] == 0:
            return
        args: list[Any] = [tensors[name] for name in self.names]
        aligned = all(x.data_ptr() % 16 == 0 for x in args)
        tokens = extent.batch * extent.length
        if cu_seqlens is not None:
            args += [cu_seqlens, extent.sequences]
        if self.needs_tokens:
            args.append(tokens)
        args.append(extent.length)
        # Compiled for aligned pointers and 32-bit lengths: anything else goes the long way.
        if aligned and tokens < 2**31 and self.compiled is not None:
            self.compiled[(grid[0], 1, 1)](*args, *self.constants.values())
            return
        compiled = self.function[grid](*args, **self.constants, **self.options)
        if aligned and tokens < 2**31 and not interpreting():
            self.compiled = compiled


def _constants(plan: Plan, names: Mapping[str, int | str]) -> dict[str, Any]:
    import triton.language as tl

    half = plan.dtype != "fp32"
    settings = {
        "DOT": tl.float32
        if interpreting()
        else {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[plan.dtype],
        # tf32 has the mantissa of fp16: where fp16 is not enough, neither is tf32.
        "PRECISION": "ieee" if interpreting() else "tf32" if plan.dtype == "bf16" else "tf32x3",
        "INVERSE": "ieee" if interpreting() else "tf32" if half else "tf32x3",
        # Scaled operands stay within the range of the products' type: exp(80) = 5e34, exp(10) = 2e4.
        "NEAR": 10.0 if plan.dtype == "fp16" else 80.0,
        "SPLIT": half and not interpreting(),
    }
    return {
        name: settings[name] if isinstance(value, str) else value for name, value in names.items()
    }


class Executable:
    """A plan with its kernels loaded."""

    def __init__(self, plan: Plan, header: Sequence[str]) -> None:
        self.plan = plan
        self.text, printers = print_module(plan, header)
        module = load_module(identifier(plan.program.name), self.text)
        self.launchers = [Launcher(plan, k, module, printers[k.name]) for k in plan.kernels]
        self.dot = torch.float32 if interpreting() else TORCH_DTYPE[plan.dtype]

    def __call__(
        self,
        inputs: dict[str, Tensor],
        given: Mapping[str, torch.dtype],
        extent: Extent,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Tensor]:
        """All tensors by name after the kernels have run; `given` has the dtypes of values for the caller."""
        tensors = inputs
        device = next(iter(inputs.values())).device
        for launcher in self.launchers:
            for value in _stored(launcher.kernel):
                dtype = {"dot": self.dot, "fp32": torch.float32}.get(value.dtype) or given[
                    value.name
                ]
                shape = shape_of(value, self.plan, extent)
                make = torch.zeros if value.per == "chunk" and extent.varlen else torch.empty
                tensors[identifier(value.name)] = make(shape, dtype=dtype, device=device)
            launcher(tensors, extent, cu_seqlens)
            for value in _stored(launcher.kernel):
                if value.parts:
                    tensors[identifier(value.name)] = tensors[identifier(value.name)].sum(0)
        return tensors


def _stored(kernel: Kernel) -> list[Value]:
    return [
        *(s.value for s in kernel.stores),
        *(c.end for c in kernel.carries if c.end is not None),
    ]
