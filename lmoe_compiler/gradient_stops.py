"""A step that stops a gradient is refused: nothing of the stop would be left in the program, so it would not stop.

Seen where the user calls it. Below that, torch's own derivatives detach what they keep, which stops nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lmoe_compiler.errors import UnsupportedOperation
from lmoe_compiler.sizes import TORCH

STOPS = {
    Tensor.detach: "detach", torch.detach: "detach", Tensor.detach_: "detach_",
    torch.detach_: "detach_", Tensor.data.__get__: "data",  # type: ignore[attr-defined]
    Tensor.requires_grad_: "requires_grad_",
}  # fmt: skip


class GradientStops(TorchFunctionMode):
    """Raises UnsupportedOperation where the step detaches a tensor or turns gradients off. `where`: its line now."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._C._set_grad_enabled and not args[0]:
            self._refuse("no_grad")
        if func in STOPS and not sys._getframe(1).f_code.co_filename.startswith(TORCH):
            self._refuse(STOPS[func])
        return func(*args, **(kwargs or {}))

    def _refuse(self, name: str) -> None:
        raise UnsupportedOperation(
            f"the step stops a gradient ({name})", where=self.where(),
            why="the derived backward is that of the whole step: the gradient would flow all the same",
            try_="r(q, k.detach(), v)   # outside the step: detach what is passed to the call",
        )  # fmt: skip
