"""Numbers about all tokens: losses, statistics, positions and counts are those of one rank with all
tokens.

    sum or mean over tokens      local sum, then the sum over ranks (its backward is the identity:
                                 one loss, not P)
    cross_entropy(...)           the same; its mean divides by the labels that count on all ranks
    arange(T)                    arange(T) + offset, where a sequence is cut
    x / (k T), x * T, ...        T is the global count, as a tensor

Which ranks: those of the sequence's axis, and where other ranks hold other rows of the batch, those
too. There a reduction has to take all rows with it (every axis before the tokens), and a count has
to be one of all rows. Every rank ends with the same loss, and its gradients are this rank's share
of the gradients of that one loss. What comes after a reduction is computed on every rank alike, so
it may not have parameters.
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
    """Rewrites reductions over tokens, losses, positions and counts.

    `axis`: of the sequence, or where none is cut (`cut=False`) of the batch. `everyone`: all ranks
    with other tokens, where other rows of the batch are among them.
    """

    axis: Axis
    sequence_dim: int = 1
    everyone: Axis | None = None
    cut: bool = True
    name: str = "losses"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        shard = Shard.of(gm, self.axis, self.sequence_dim, self.everyone, self.cut)
        for kind, nodes, rewrite in (
            ("losses", shard.tokens.losses, _loss),
            ("reductions", shard.tokens.reductions, _reduction),
            ("positions", shard.tokens.positions if self.cut else [], _position),
            ("counts", shard.tokens.counts, _count),
        ):
            for node in nodes:
                rewrite(shard, node)
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


def _loss(shard: Shard, node: fx.Node) -> None:
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
        shard.everyone.groups["numbers"],
    )
    _replace(node, new)


def _sum_signature(
    self: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> None: ...


def _reduction(shard: Shard, node: fx.Node) -> None:
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
    if shard.rows_differ:
        _takes_all_rows(shard, node, value, dims)
    edit, group = _editor(shard, node), shard.everyone.groups["numbers"]
    if dtype is not None:
        x = edit.call(Tensor.to, x, dtype)
    if name == "sum":
        _replace(node, edit.call(sequence.sum_over_tokens, x, dims, keepdim, group))
        return
    totals, here = shard.totals()
    # Constant, and known where this rank has no token.
    each = int(sequence.number(value, dims) // here)
    _replace(node, edit.call(sequence.mean_over_tokens, x, dims, keepdim, totals, each, group))


def _takes_all_rows(shard: Shard, node: fx.Node, value: Tensor, dims: list[int]) -> None:
    first = axes_with(value, shard.tokens.symbol)[0]
    kept = set(range(first)) - {d % value.dim() for d in dims}
    if kept:
        raise NotShardable(
            f"{node.name} reduces over tokens, and keeps axis {min(kept)} of {tuple(value.shape)}",
            where=where(node),
            why="ranks hold other rows of the batch, and a number of each row is not one of all",
            try_="x.flatten(0, 1).mean(0): over all tokens at once",
        )


def _position(shard: Shard, node: fx.Node) -> None:
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


def _count(shard: Shard, node: fx.Node) -> None:
    symbol = shard.tokens.symbol
    rows = shard.rows
    edit = _editor(shard, node)
    tensors = [n.meta["example_value"] for n in node.all_input_nodes]
    of_tokens = any(isinstance(x, Tensor) and shard.tokens.in_(x) for x in tensors)

    def as_tensor(argument: fx.Node) -> fx.Node:
        value = argument.meta["example_value"]
        if isinstance(value, Tensor) or not axes_with(value, symbol):
            return argument
        factor = sympy.simplify(expression(value) / (symbol * rows))
        # With one row a rank, T next to a value per token may be the length of its sequence.
        unclear = shard.rows_differ and rows == 1 and of_tokens
        if not factor.is_Integer or unclear:
            raise NotShardable(
                f"the number {expression(value)} of tokens in arithmetic",
                where=where(node),
                why="it may be the length of one sequence: ranks hold other rows of the batch"
                if shard.rows_differ
                else "only multiples of the token count have a global meaning",
                try_="x.sum() / (k * x.numel()): divide what is summed over all tokens",
            )
        return edit.call(sequence.global_count, shard.totals()[0], int(factor))

    node.args = fx.node.map_arg(node.args, as_tensor)
    node.kwargs = fx.node.map_arg(node.kwargs, as_tensor)
