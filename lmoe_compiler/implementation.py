"""Which code runs an op: ATen (lower/execute.py), Triton (codegen/run.py) or the interpreter.

The choice depends on program, device and options alone, so a fake tensor gets the same answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lmoe_compiler.config import Options
from lmoe_compiler.errors import FallbackWarning, ImplementationUnavailable
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.layout import Measured, Saved, Tensors

TORCH, TRITON = "lmoe_compiler.lower.execute", "lmoe_compiler.codegen.run"
INTERPRETER = "lmoe_compiler.interpreted"


class Implementation(Protocol):
    """What lower/execute.py (ATen) and codegen/run.py (Triton) provide. Arguments are checked."""

    def scan(
        self,
        program: Program,
        inputs: Tensors,
        states: Tensors | None,
        cu_seqlens: Tensor | None,
        options: Options,
    ) -> Saved: ...

    def scan_backward(
        self,
        program: Program,
        inputs: Tensors,
        states: Tensors | None,
        cu_seqlens: Tensor | None,
        saved: Tensors,
        d_output: Tensor,
        d_states: Sequence[Tensor | None],
        options: Options,
    ) -> tuple[list[Tensor], list[Tensor] | None]: ...

    def span_map(
        self, program: Program, inputs: Tensors, cu_seqlens: Tensor | None, options: Options
    ) -> tuple[list[Tensor | None], list[Tensor]]: ...

    def span_map_backward(
        self,
        program: Program,
        inputs: Tensors,
        cu_seqlens: Tensor | None,
        d_maps: Sequence[Tensor | None],
        d_ends: Sequence[Tensor | None],
        options: Options,
    ) -> list[Tensor]: ...

    def step(
        self, program: Program, inputs: Tensors, states: Tensors | None, options: Options
    ) -> tuple[Tensor, list[Tensor]]: ...

    def step_(
        self, program: Program, inputs: Tensors, states: Tensors, options: Options
    ) -> Tensor: ...


def choose(
    function: str, program: Program, inputs: Sequence[Measured], options: Options
) -> Callable[..., Any]:
    """The function that runs this call; raises where `triton` was asked for and cannot run."""
    wanted = options.implementation
    if wanted == "reference":
        return _function(INTERPRETER, function)
    if wanted == "torch" or (wanted == "auto" and inputs[0].device.type != "cuda"):
        return _function(TORCH, function)
    reason = kernels_or_reason(function, program, inputs, options)
    if not isinstance(reason, str):
        return _function(TRITON, function)
    if wanted == "triton":
        raise ImplementationUnavailable(
            f'implementation="triton" cannot run {program.name} here',
            why=reason,
            try_='r.with_options(implementation="auto")',
        )
    _say_once(f"{program.name} runs with torch instead of generated kernels: {reason}")
    return _function(TORCH, function)


def keeper(program: Program, inputs: Tensors, options: Options) -> Callable[..., list[Tensor]]:
    """What allocates the tensors that `scan` keeps for its backward, of the implementation that runs it."""
    scan = choose("scan", program, inputs, options)
    keeps = getattr(_module(scan.__module__), "saved", None)
    return keeps or _nothing


def _nothing(*_: Any) -> list[Tensor]:
    return []


def kernels_or_reason(
    function: str, program: Program, inputs: Sequence[Measured], options: Options
) -> Any:
    """The module of generated kernels, or the reason (a str) why it does not run this call."""
    shapes, dtypes = tuple([x.shape for x in inputs]), tuple([x.dtype for x in inputs])
    # A program is compared as an object, because its hash walks all of it; what is kept keeps it alive.
    key = (function, id(program), shapes, dtypes, inputs[0].device, options.text)
    try:
        known = _known.get(key)
    except TypeError:  # symbolic sizes cannot be looked up
        return _kernels_or_reason(function, program, inputs, options)
    if known is None:
        if len(_known) >= MOST:
            _known.clear()
        known = program, _kernels_or_reason(function, program, inputs, options)
        _known[key] = known
    return known[1]


MOST = 4096
_known: dict[tuple[Any, ...], tuple[Program, Any]] = {}


def forget() -> None:
    """Drops what was decided, so that the next call decides again."""
    _known.clear()


def _kernels_or_reason(
    function: str, program: Program, inputs: Sequence[Measured], options: Options
) -> Any:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'lmoe-compiler[gpu]')"
    device = inputs[0].device
    if device.type != "cuda" and not _interpreted():
        return f"the inputs are on {device}, and kernels run on CUDA devices only" + _no_gpu()
    kernels = _module(TRITON)
    if not hasattr(kernels, function):
        return f"there is no generated kernel for {function}"
    reason = kernels.unsupported(program, inputs, options)
    return kernels if reason is None else reason


def _no_gpu() -> str:
    return "" if torch.cuda.is_available() else " (torch sees no CUDA device on this machine)"


def _function(module: str, name: str) -> Callable[..., Any]:
    """A function of an implementation; what the chunked one does not have, the interpreter does."""
    found = getattr(_module(module), name, None) or getattr(_module(INTERPRETER), name)
    return found


@cache
def _interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=2)


@cache
def _module(name: str) -> Any:
    return importlib.import_module(name)
