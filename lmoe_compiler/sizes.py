"""The lengths of dims while a step is traced. Used by recorder.py.

Each dim has a prime that no other has, so K and V cannot be confused. Most steps never look at a size: for them the
primes are the sizes (Numbers). For a step that does, each dim is a symbol (symbols.py).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.overrides import TorchFunctionMode

from lmoe_compiler.ir.nodes import Loc, Node, Var, const
from lmoe_compiler.ir.spec import base
from lmoe_compiler.operations import Axis, NoMeaning, another

PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
TORCH = str(Path(torch.__file__).parent)
READS = {
    Tensor.shape.__get__, Tensor.nbytes.__get__,  # type: ignore[attr-defined]
    Tensor.size, Tensor.numel, Tensor.nelement, Tensor.stride,
    Tensor.__len__, torch.numel,
}  # fmt: skip


class Sizes:
    """The lengths of the dims of `variables`; static dims have theirs."""

    def __init__(self, variables: Sequence[Var], static: Mapping[str, int]) -> None:
        self.variables, self.static = variables, static
        self.of: dict[str, int] = dict(static)
        axes = (base(a) for v in variables for a in v.axes)
        self.free = [dim for dim in dict.fromkeys(axes) if dim not in static]

    def running(self) -> AbstractContextManager[object]:
        """The mode under which the step runs on tensors of these sizes."""
        raise NotImplementedError

    def arguments(self) -> list[Tensor]:
        """A tensor for each variable."""
        return [torch.ones([self.length(base(a)) for a in v.axes]) for v in self.variables]

    def length(self, dim: str) -> int | SymInt:
        return self.of[dim]

    def axis(self, size: int | SymInt) -> str | None:
        """The dim of a size; None for 1."""
        if size == 1:
            return None
        dims = [dim for dim, length in self.of.items() if length == size]
        if len(dims) != 1:
            raise NoMeaning(f"a tensor of the fixed size {size}")
        return dims[0]

    def axes(self, shape: Sequence[int | SymInt]) -> tuple[Axis, ...]:
        """Distinct names for the dimensions of a tensor."""
        names: list[Axis] = []
        for axis in map(self.axis, shape):
            names.append(axis if axis is None else another(axis, names))
        return tuple(names)

    def number(self, value: Any, loc: Loc | None) -> Node:
        """A Python number, possibly computed from sizes, as an expression."""
        return const(float(value), loc)

    def spell(self, text: str) -> str:
        """Torch's names of sizes replaced by the dims'."""
        return text

    def refuse_questions(self) -> None:
        """Raise MixedDims if the step itself asked for a size."""

    def refuse_guards(self, where: str) -> None:
        """Raise MixedDims if a size was taken for a number, or for another dim."""


class Numbers(Sizes):
    """Every dim is a prime. After the run, `reads.any` says whether what was traced may hold for these only."""

    def __init__(
        self, variables: Sequence[Var], static: Mapping[str, int], primes: Sequence[int] = PRIMES
    ) -> None:
        super().__init__(variables, static)
        free = (prime for prime in primes if prime not in static.values())
        self.of |= zip(self.free, free, strict=False)
        self.reads = Reads()

    def running(self) -> AbstractContextManager[object]:
        return self.reads


class Reads(TorchFunctionMode):
    """Notes whether code outside torch asked for the size of a tensor."""

    any = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in READS and not sys._getframe(1).f_code.co_filename.startswith(TORCH):
            self.any = True
        return func(*args, **(kwargs or {}))
