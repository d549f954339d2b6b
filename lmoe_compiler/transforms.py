"""What autocast and vmap make of an op of the family (library.py). Rules look at the program, never at its name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.errors import UnsupportedTransform
from lmoe_compiler.ir.nodes import Program

Parse = Callable[[str], Program]
# Where the ops have kernels; other devices (meta) only ask for shapes.
DEVICES = ("cpu", "cuda")
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def autocast(program: Program, inputs: list[Tensor]) -> list[Tensor]:
    """Under torch.autocast: vectors in its dtype; gates and head parameters as they are, for precision."""
    device = inputs[0].device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return inputs
    dtype = torch.get_autocast_dtype(device)
    kept = layout.gates(program) | {var.name for var in program.inputs if var.kind == "head"}
    return [
        x if var.name in kept or x.dtype not in _CAST else x.to(dtype)
        for var, x in zip(program.inputs, inputs, strict=True)
    ]


def autocast_kernel(op: Any, device: str, parse: Parse, *, cast: bool) -> Callable[..., Any]:
    """The op's kernel at the autocast key of a device: cast, then go on below that key.

    A backward casts nothing, but its own arithmetic has to be out of autocast's reach as well.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(text: str, inputs: list[Tensor], *rest: Any) -> Any:
        given = autocast(parse(text), inputs) if cast else inputs
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(text, given, *rest)

    return kernel


def vmap_rule(name: str, schema: str, parse: Parse) -> Callable[..., Any]:
    """X mapped problems are one problem with X times the heads: fold X into every head axis, call, unfold.

    Grouped heads stay right: (x, h) = x * H + h reads group (x * H + h) // factor = x * H_i + h // factor.
    What an implementation saves keeps its folded form and goes to the backward as it is.
    """
    roles = [argument.split()[-1] for argument in schema.split(", ")][1:]

    def rule(info: Any, in_dims: tuple[Any, ...], text: str, *args: Any) -> Any:
        program, size = parse(text), info.batch_size
        if name == "step_":
            raise UnsupportedTransform(
                f"vmap over an in-place step of {program.name}",
                why="mapped problems run as more heads, on a copy of the states",
                try_=f"{program.name}.step(..., state=S)",
            )
        if any(
            d is not None and r == "cu_seqlens" for r, d in zip(roles, in_dims[1:], strict=True)
        ):
            raise UnsupportedTransform(
                f"vmap over the cu_seqlens of {program.name}",
                why="mapped problems run as more heads of the same documents",
                try_="a Python loop over the packings",
            )
        axes = _head_axes(program, name)
        folded = [
            _fold_all(arg, dims, axes.get(role), size)
            for role, arg, dims in zip(roles, args, in_dims[1:], strict=True)
        ]
        results = getattr(torch.ops.lmoe, name)(text, *folded)
        positions = list(islice(chain(axes["results"], repeat(None)), len(results)))
        unfolded = [
            x if p is None else x.unflatten(p, (size, -1))
            for x, p in zip(results, positions, strict=True)
        ]
        return unfolded, positions

    return rule


def _head_axes(program: Program, name: str) -> dict[str, list[int]]:
    """Where the head axis of each tensor is, by argument; arguments that are not here stay as they are."""
    is_step = name == "step"
    inputs = [layout.leading(var, step=is_step).index("H") for var in program.inputs]
    output, states = [1 if is_step else 2], [1] * len(program.states)
    results = {
        "scan": output + states,
        "step": output + states,
        "scan_backward": inputs + states,
        "span_map_backward": inputs,
    }
    maps = [1] * (2 * len(program.states))
    return {
        "inputs": inputs,
        "states": states,
        "d_output": output,
        "d_states": states,
        "d_results": maps,
        "results": results.get(name, maps),
    }


def _fold_all(arg: Any, dims: Any, positions: list[int] | None, size: int) -> Any:
    if positions is None:
        return arg
    if isinstance(arg, Tensor):
        return _fold(arg, dims, positions[0], size)
    return [_fold(x, d, p, size) for x, d, p in zip(arg, dims, positions, strict=False)]


def _fold(x: Tensor, dim: int | None, position: int, size: int) -> Tensor:
    """[..., X, H, ...] -> [..., X * H, ...] with X moved before axis `position` (of the unmapped tensor)."""
    mapped = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return mapped.movedim(0, position).flatten(position, position + 1)
