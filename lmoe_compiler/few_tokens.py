"""Calls of a compiled model that is spread over ranks: the token axis is a symbol, for any number of tokens.

torch.compile makes graphs of their own of sizes 0 and 1, and all ranks need the same one. So an input with no token,
or one, is handed over as a stand-in of its kind with more, which carries it:

    follow_tokens    marks the token axis of a call's inputs, and puts stand-ins in the place of few tokens
    real_tokens      the compiled graph takes what the stand-ins carry, and its size

Dynamo checks its guards and captures with an ordinary size; what runs is the graph for any number of tokens. torch's
own ways do not get there (2.11 and 2.13): a size without a hint (mark_unbacked) fails in nn.RMSNorm's C++, which asks
whether it is over 1; with backed_size_oblivious that question is a guard, and Inductor's checks of strides fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

# Over any number that a graph compares its tokens with, where it is this rank's first.
_MANY = 64
_CARRIED = "_lmoe_few_tokens"


def follow_tokens(compiled: Any, sequence_dim: int) -> Any:
    """Let the token axis of the inputs be a symbol, so that passes can tell it from other axes.

    An input holds tokens if it has as many entries there as the first one that has such an axis.
    """

    def prepare(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        sizes = (x.shape[sequence_dim] for x in (*args, *kwargs.values()) if has_axis(x))
        count = next(sizes, _MANY)

        def follow(x: Any) -> Any:
            if not has_axis(x):
                return x
            x = _in_rows(x)
            if count < 2 and x.shape[sequence_dim] == count:
                x = _stand_in(x, sequence_dim)
            torch._dynamo.maybe_mark_dynamic(x, sequence_dim)
            return x

        return tuple(map(follow, args)), {name: follow(x) for name, x in kwargs.items()}

    def has_axis(x: object) -> bool:
        return isinstance(x, Tensor) and x.dim() > sequence_dim

    if isinstance(compiled, nn.Module):
        hook = lambda _, args, kwargs: prepare(args, kwargs)  # noqa: E731
        compiled.register_forward_pre_hook(hook, with_kwargs=True)
        compiled.register_forward_hook(lambda _, args, results: _without_stand_ins(results))
        return compiled

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = prepare(args, kwargs)
        return _without_stand_ins(compiled(*args, **kwargs))

    return call


def _without_stand_ins(results: Any) -> Any:
    """`results` of a call; an input that is a result as it is would still be the stand-in."""
    if is_dataclass(results) and not isinstance(results, type):
        held = {f.name: getattr(results, f.name) for f in fields(results)}
        changed = {name: _without_stand_ins(x) for name, x in held.items()}
        new = {name: x for name, x in changed.items() if x is not held[name]}
        return replace(results, **new) if new else results
    return tree_map_only(Tensor, lambda x: getattr(x, _CARRIED, x), results)


def _in_rows(x: Tensor) -> Tensor:
    """Contiguous, by the strides of axes of size one too, and no part of another tensor: a graph is one of where a
    tensor's elements lie, and ranks need the same one.
    """
    behind, rows = 1, x.storage_offset() == 0
    for size, stride in zip(reversed(x.shape), reversed(x.stride()), strict=True):
        rows &= stride == behind
        behind *= max(1, size)
    return x if rows else x.clone(memory_format=torch.contiguous_format)


def _stand_in(x: Tensor, dim: int) -> Tensor:
    more = x.new_zeros((*x.shape[:dim], _MANY, *x.shape[dim + 1 :]))
    more.requires_grad_(x.requires_grad)
    setattr(more, _CARRIED, x)
    return more


def real_tokens(
    compiled: Callable[..., Any], gm: fx.GraphModule, sequence_dim: int
) -> Callable[..., Any]:
    """`compiled`, the graph `gm` as it will be called, with the tokens that stand-ins carry."""
    inputs = [node.meta.get("example_value") for node in gm.graph.nodes if node.op == "placeholder"]
    tokens: dict[int, sympy.Expr] = {}
    counts: dict[int, sympy.Expr] = {}
    for place, value in enumerate(inputs):
        if isinstance(value, torch.SymInt):
            counts[place] = value.node.expr
        elif isinstance(value, Tensor) and value.dim() > sequence_dim:
            size = value.shape[sequence_dim]
            if isinstance(size, torch.SymInt):
                tokens[place] = size.node.expr

    def call(*given: Any) -> Any:
        carried = {i: x for i in tokens if (x := getattr(given[i], _CARRIED, None)) is not None}
        if not carried:
            return compiled(*given)
        sizes = {tokens[i]: x.shape[sequence_dim] for i, x in carried.items()}
        real = [
            carried[i] if i in carried else sizes.get(counts[i], x) if i in counts else x
            for i, x in enumerate(given)
        ]
        return compiled(*real)

    return call
