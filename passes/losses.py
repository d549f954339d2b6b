"""Numbers about the whole sequence: losses, statistics, positions and counts are those of one rank
with all tokens.

    sum or mean over tokens      local sum, then the sum over ranks (its backward is the identity:
                                 one loss, not P)
    cross_entropy(...)           the same; its mean divides by the labels that count on all ranks
    arange(T)                    arange(T) + offset
    x / (k T), x * T, ...        T is the global count, as a tensor

Every rank ends with the same loss, and its gradients are this rank's share of the gradients of that
one loss. What comes after a reduction is computed on every rank alike, so it may not have
parameters. Ranks that hold other rows of the batch count like ranks that hold other tokens:
reductions over tokens are over all of them.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lmoe_compiler.errors import NotShardable
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.shard import Shard
from lmoe_compiler.passes.splice import Editor, layer_of, where
from lmoe_compiler.passes.token_axis import axes_with, expression
from lmoe_compiler.runtime import sequence
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class GlobalNumbers:
    """Rewrites reductions over tokens, losses, positions and counts. `axis`: all ranks that hold
    other tokens; `cut`: whether the sequence is cut over ranks, so that positions move.
    """

    axis: Axis
    sequence_dim: int = 1
    cut: bool = True
    name: str = "losses"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        shard = Shard.of(gm, self.axis, self.sequence_dim)
        for kind, nodes, rewrite in (
            ("losses", shard.tokens.losses, _loss),
            ("reductions", shard.tokens.reductions, _reduction),
            ("positions", shard.tokens.positions if self.cut else [], _position),
            ("counts", shard.tokens.counts, _count),
        ):
            for node in nodes:
                rewrite(shard, self.axis, node)
                report.add(kind, f"{layer_of(node)}: {node.name}")
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _editor(shard: Shard, node: fx.Node) -> Editor:
    edit = Editor(shard.gm, "losses")
    edit.anchor = node
    return edit


def _replace(node: fx.Node, new: fx.Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _arguments(node: fx.Node, function: Callable[..., Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _loss(shard: Shard, axis: Axis, node: fx.Node) -> None:
    given = _arguments(node, F.cross_entropy)
    if given["reduction"] == "none":
        return
    new = _editor(shard, node).call(
        sequence.cross_entropy,
        given["input"],
        given["target"],
        given["weight"],
        given["ignore_index"],
        given["reduction"],
        given["label_smoothing"],
        axis.groups["numbers"],
    )
    _replace(node, new)


def _sum_signature(
    self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> None: ...


def _reduction(shard: Shard, axis: Axis, node: fx.Node) -> None:
    name = str(getattr(node.target, "__name__", node.target))
    if name not in ("sum", "mean"):
        raise NotShardable(
            f"{name} reduces over tokens",
            where=where(node),
            why="sums and means over tokens become global; this is neither",
            try_="x.sum(dim) and x.mean(dim)",
        )
    kwargs = {"self" if k == "input" else k: v for k, v in node.kwargs.items()}
    bound = inspect.signature(_sum_signature).bind(*node.args, **kwargs)
    bound.apply_defaults()
    x, dim, keepdim, dtype = bound.arguments.values()
    value = x.meta["example_value"]
    dims = list(range(value.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    edit, group = _editor(shard, node), axis.groups["numbers"]
    if dtype is not None:
        x = edit.call(Tensor.to, x, dtype)
    if name == "sum":
        _replace(node, edit.call(sequence.sum_over_tokens, x, dims, keepdim, group))
        return
    length = edit.call(Tensor.size, shard.tokens.source, shard.tokens.dim)
    counts = shard.counts(axis)
    _replace(node, edit.call(sequence.mean_over_tokens, x, dims, keepdim, counts, length, group))


def _position(shard: Shard, _: Axis, node: fx.Node) -> None:
    if (
        node.target is not torch.arange
        or len(node.args) != 1
        or "start" in node.kwargs
        or "step" in node.kwargs
    ):
        raise NotShardable(
            "arange over tokens with a start or a step",
            where=where(node),
            why="on a shard, positions are arange(T) plus the shard's offset",
            try_="torch.arange(T, device=...)",
        )
    edit = Editor(shard.gm, "losses")
    offset = shard.offset()
    edit.anchor = node.next
    moved = edit.call(operator.add, node, offset)
    node.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)


def _count(shard: Shard, axis: Axis, node: fx.Node) -> None:
    symbol = shard.tokens.symbol
    counts = shard.counts(axis)
    edit = _editor(shard, node)

    def as_tensor(argument: fx.Node) -> fx.Node:
        value = argument.meta["example_value"]
        if isinstance(value, Tensor) or not axes_with(value, symbol):
            return argument
        factor = sympy.simplify(expression(value) / symbol)
        if not factor.is_Integer:
            raise NotShardable(
                f"the number {expression(value)} of tokens in arithmetic",
                where=where(node),
                why="only multiples of the token count have a global meaning",
                try_="x / (k * T)",
            )
        return edit.call(sequence.global_count, counts, int(factor))

    node.args = fx.node.map_arg(node.args, as_tensor)
    node.kwargs = fx.node.map_arg(node.kwargs, as_tensor)
