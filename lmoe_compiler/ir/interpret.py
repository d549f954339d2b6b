"""Evaluates named-axis expressions with plain torch: the meaning of the IR, and the oracle of every lowering.

A value is a tensor `[*batch, *axes]` with its axis names; batch dimensions broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.ir.nodes import BINARY, UNARY, Node, topological

POINTWISE: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "exp": torch.exp, "log": torch.log, "log1p": torch.log1p,
    "sigmoid": torch.sigmoid, "logsigmoid": F.logsigmoid, "softplus": F.softplus,
    "tanh": torch.tanh, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "recip": torch.reciprocal,
    "abs": torch.abs, "sign": torch.sign, "relu": torch.relu, "sin": torch.sin, "cos": torch.cos,
    "erf": torch.erf, "isfinite": lambda x: torch.isfinite(x).to(x.dtype),
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum,
    "gt": lambda x, y: (x > y).to(x.dtype), "ge": lambda x, y: (x >= y).to(x.dtype),
    "lt": lambda x, y: (x < y).to(x.dtype), "le": lambda x, y: (x <= y).to(x.dtype),
    "eq": lambda x, y: (x == y).to(x.dtype),
    "where": lambda c, x, y: torch.where(c != 0, x, y),
}  # fmt: skip
assert set(POINTWISE) == UNARY | BINARY | {"where"}


@dataclass(frozen=True)
class Value:
    """A tensor whose last `len(axes)` dimensions are named."""

    tensor: Tensor
    axes: tuple[str, ...] = ()

    def to(self, axes: tuple[str, ...]) -> Tensor:
        """The tensor laid out as `[*batch, *axes]`, size 1 where an axis is missing."""
        if self.axes == axes:
            return self.tensor
        present = [a for a in axes if a in self.axes]
        assert len(present) == len(self.axes), (self.axes, axes)
        batch = self.tensor.dim() - len(self.axes)
        order = [batch + self.axes.index(a) for a in present]
        tensor = self.tensor.permute(*range(batch), *order)
        for position, axis in enumerate(axes):
            if axis not in self.axes:
                tensor = tensor.unsqueeze(batch + position)
        return tensor


Rule = Callable[[Node, list[Value]], Value]


def evaluate(
    roots: Iterable[Node],
    env: Mapping[Node, Value],
    sizes: Mapping[str, int],
    rules: Mapping[str, Rule] | None = None,
) -> list[Value]:
    """Values of `roots`. `env` gives the leaves (or any inner node); `sizes` the axis lengths; `rules` further ops."""
    roots = list(roots)
    values: dict[Node, Value] = dict(env)
    like = next(iter(env.values())).tensor
    for node in topological(roots):
        if node not in values:
            values[node] = _apply(node, [values[a] for a in node.args], sizes, like, rules or {})
    return [values[root] for root in roots]


def _apply(
    node: Node, args: list[Value], sizes: Mapping[str, int], like: Tensor, rules: Mapping[str, Rule]
) -> Value:
    op = node.op
    if op in POINTWISE:
        return Value(POINTWISE[op](*(a.to(node.axes) for a in args)), node.axes)
    if op == "const":
        return Value(torch.full((), node["value"], dtype=like.dtype, device=like.device))  # type: ignore[arg-type]
    if op == "size":
        return Value(torch.full((), sizes[str(node["axis"])], dtype=like.dtype, device=like.device))
    if op == "delta":
        n = sizes[node.axes[0].rstrip("'")]
        return Value(torch.eye(n, dtype=like.dtype, device=like.device), node.axes)
    if op == "cast":
        return args[0]
    if op == "rename":
        axes = tuple(str(node["new"]) if a == node["old"] else a for a in args[0].axes)
        return Value(args[0].tensor, axes)
    if op == "index":
        axis, x = str(node["axis"]), args[0]
        position = x.tensor.dim() - len(x.axes) + x.axes.index(axis)
        return Value(x.tensor.select(position, int(node["at"])), tuple(a for a in x.axes if a != axis))  # type: ignore[arg-type]
    if op in ("sum", "max"):
        axis, x = str(node["axis"]), args[0]
        rest = tuple(a for a in x.axes if a != axis)
        if axis not in x.axes:
            return x if op == "max" else Value(x.tensor * sizes[axis.rstrip("'")], x.axes)
        position = x.tensor.dim() - len(x.axes) + x.axes.index(axis)
        return Value(x.tensor.sum(position) if op == "sum" else x.tensor.amax(position), rest)
    if op == "dot":
        return _dot(str(node["axis"]), *args)
    return rules[op](node, args)


def _dot(axis: str, a: Value, b: Value) -> Value:
    """sum over `axis` of a * b, as one batched matmul."""
    rest_a = [x for x in a.axes if x != axis]
    rest_b = [x for x in b.axes if x != axis]
    both = tuple(x for x in rest_a if x in rest_b)
    rows = tuple(x for x in rest_a if x not in both)
    columns = tuple(x for x in rest_b if x not in both)
    left, right = a.to((*both, *rows, axis)), b.to((*both, axis, *columns))
    if len(rows) == 1 and len(columns) == 1:
        return Value(left @ right, (*both, *rows, *columns))
    if len(rows) == 0 and len(columns) == 1:
        return Value((left.unsqueeze(-2) @ right).squeeze(-2), (*both, *columns))
    if len(rows) == 1 and len(columns) == 0:
        return Value((left @ right.unsqueeze(-1)).squeeze(-1), (*both, *rows))
    axes = (*both, *rows, *columns, axis)
    return Value((a.to(axes) * b.to(axes)).sum(-1), axes[:-1])
