"""Gradients as kernels write them, brought to the shapes and dtypes of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_compiler.ir.nodes import Program


def gathered(program: Program, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a head parameter's gradient, and the heads of a group, are summed in a fixed order."""
    found = []
    for var, x, grad in zip(program.inputs, inputs, grads, strict=True):
        if var.kind == "head":
            grad = grad.sum(0)
            if grad.shape[0] != x.shape[0]:
                grad = grad.reshape(x.shape[0], -1, *x.shape[1:]).sum(1)
        elif grad.shape != x.shape:
            grad = grad.reshape(*x.shape[:3], -1, *x.shape[3:]).sum(3)
        found.append(cast(grad, x.dtype))
    return found


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)
