"""Which calls generated kernels run, and in words what is in the way of the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.layout import Measured

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LARGEST = 256


def unsupported(program: Program, inputs: Sequence[Measured], options: Options) -> str | None:
    """Why no kernels are generated for this call, or None."""
    for var, x in zip(program.inputs, inputs, strict=True):
        if x.dtype not in DTYPES:
            return f"{var.name} is {x.dtype}, and kernels compute in torch.bfloat16, torch.float16 or torch.float32"
    for name, size in axis_sizes(program, inputs).items():
        if not 1 <= size <= LARGEST:
            return (
                f"{name} = {size}, and a kernel holds axes of 1 to {LARGEST} whole"
                " (lengths that are no power of two are padded by masks)"
            )
    return None


def axis_sizes(program: Program, inputs: Sequence[Measured]) -> dict[str, int]:
    """Lengths of the program's axes in this call."""
    sizes = dict(program.static)
    for var, x in zip(program.inputs, inputs, strict=True):
        shape = x.shape[len(x.shape) - len(var.axes) :]
        sizes |= dict(zip((a.rstrip("'") for a in var.axes), shape, strict=True))
    return sizes
