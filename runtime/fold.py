"""Composition of span maps over ranks, as one op with its own backward; no graph is unrolled over
ranks.

Rank j turns a state S into M_j S + E_j. The state in which each rank starts is the exclusive fold

    X_0 = 0,  X_{j+1} = M_j X_j + E_j

and its adjoint is the same fold in the other direction, with the transpose of every M:

    Y_{P-1} = 0,  Y_{j-1} = M_j^T Y_j + dX_j;   dE_j = Y_j,  dM_j = Y_j X_j^T

A document that begins inside rank j makes M_j zero. M has named axes, as the state has: none is the
identity, "" a scalar, "K" a diagonal, "K K'" dense (row K, column K'), "K V" elementwise. Notation:
P ranks, B batch, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.flops import flop_formula


def equation(axes: str, map_axes: str) -> tuple[str, str, str]:
    """Einsum letters of (M, the state it reads, the state it gives): "K V", "K K'" -> ("ab", "bc",
    "ac").
    """
    letters: dict[str, str] = {}
    for name in (*map_axes.split(), *axes.split()):
        letters.setdefault(name, chr(ord("a") + len(letters)))
    given = "".join(letters[name] for name in axes.split())
    read = "".join(letters.get(name + "'", letters[name]) for name in axes.split())
    return "".join(letters[name] for name in map_axes.split()), read, given


def apply(map_: Tensor | None, state: Tensor, axes: str, map_axes: str, transposed: bool) -> Tensor:
    """M S, or M^T S; leading axes are batch."""
    if map_ is None:
        return state
    m, read, given = equation(axes, map_axes)
    source, target = (given, read) if transposed else (read, given)
    return torch.einsum(f"...{m},...{source}->...{target}", map_, state)


def outer(given: Tensor, read: Tensor, axes: str, map_axes: str) -> Tensor:
    """The gradient of M where M S has gradient `given` and S is `read`: summed to M's axes."""
    m, r, g = equation(axes, map_axes)
    return torch.einsum(f"...{g},...{r}->...{m}", given, read)


@torch.library.custom_op("lmoe::fold", mutates_args=())
def fold(
    maps: Tensor | None, ends: Tensor, axes: str, map_axes: str, reverse: bool = False
) -> Tensor:
    """maps [P, ..., *map_axes], ends [P, ..., *axes] -> entry states [P, ..., *axes].

    `reverse` runs from the last rank to the first with transposed maps.
    """
    out = torch.zeros(ends.shape, dtype=ends.dtype, device=ends.device)
    last = ends.shape[0] - 1
    for here in range(last, 0, -1) if reverse else range(last):
        m = None if maps is None else maps[here]
        step = apply(m, out[here], axes, map_axes, reverse)
        torch.add(step, ends[here], out=out[here - 1 if reverse else here + 1])
    return out


@fold.register_fake
def _(maps: Tensor | None, ends: Tensor, axes: str, map_axes: str, reverse: bool = False) -> Tensor:
    return ends.new_empty(ends.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, ctx.axes, ctx.map_axes, ctx.reverse = inputs
    ctx.save_for_backward(maps, output)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
    maps, out = ctx.saved_tensors
    d_ends = fold(maps, d_out, ctx.axes, ctx.map_axes, not ctx.reverse)
    d_maps = None
    if maps is not None:
        given, read = (out, d_ends) if ctx.reverse else (d_ends, out)
        d_maps = outer(given, read, ctx.axes, ctx.map_axes)
    return d_maps, d_ends, None, None, None


fold.register_autograd(_backward, setup_context=_setup)


@flop_formula(torch.ops.lmoe.fold)
def _flops(
    maps: Sequence[int] | None,
    ends: Sequence[int],
    axes: str,
    map_axes: str,
    *_: object,
    **__: object,
) -> int:
    contracted = [name for name in map_axes.split() if name.endswith("'")]
    return 2 * math.prod(ends) * (maps[-1] if maps and contracted else 1)
