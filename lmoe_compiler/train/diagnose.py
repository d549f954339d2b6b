"""Where a NaN or an infinity arose first, for the error that stops a run.

The batch is run again through the uncompiled model, with a look at every module's output in the
order of execution; the first that is not finite although its inputs are is the one to name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmoe_compiler.errors import NonFiniteLoss


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _finite(value: Any) -> bool:
    return all(bool(t.isfinite().all()) for t in _tensors(value) if t.is_floating_point())


def first_non_finite(model: nn.Module, *inputs: Tensor) -> str:
    """A sentence on the parameter or module where the first non-finite number is."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"parameter {name} holds a value that is not finite"
    found: list[str] = []
    handles: list[RemovableHandle] = []
    for name, module in model.named_modules():

        def look(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if not found and not _finite(output):
                found.append(
                    f"module {name or 'the model'} ({type(module).__name__}) gave the first output "
                    f"that is not finite{'' if _finite(args) else ', of an input that is not'}"
                )

        handles.append(module.register_forward_hook(look))
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "every module's output is finite: it arose in the backward pass"


def first_non_finite_gradient(model: nn.Module) -> str:
    """The parameter nearest the loss whose gradient is not finite: backward reaches it first."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name} is the first that is not finite"
    return "every gradient is finite, their norm overflows"


def non_finite(what: str, step: int, where: str, checkpoint: str) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"{what} at step {step}",
        where=where,
        why=f"the step was not taken; last good checkpoint: {checkpoint or 'none yet'}",
        try_="a lower --learning-rate, a smaller --clip, or --dtype fp32",
    )
