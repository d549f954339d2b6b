"""Removes what does nothing: casts to the same type, contiguous() of what is, dropout that drops nothing, dead code.

    x.to(float32) of a float32 x   ->   x          (torch returns x itself, so no alias is lost)
    y = x * 2, never used          ->   gone

The passes after this one see fewer spellings of the same graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lmoe_compiler.passes.base import operation
from lmoe_compiler.passes.report import Report

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Canonicalize:
    """One sweep forward for no-ops, one backward for dead code."""

    name: str = "canonicalize"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        for node in list(gm.graph.nodes):
            if _does_nothing(node):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
                report.add(f"no-op {operation(node)}")
        for node in reversed(gm.graph.nodes):
            if not node.users and _pure(node):
                gm.graph.erase_node(node)
                report.add(f"dead {operation(node)}")
        if report.counts:
            gm.recompile()
        return report


def _does_nothing(node: fx.Node) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    x = node.args[0].meta.get("example_value")
    if not isinstance(x, Tensor):
        return False
    if node.op == "call_method" and len(node.args) == 1 and not node.kwargs:
        if node.target in _CASTS:
            return x.dtype == _CASTS[str(node.target)]
        return node.target == "contiguous" and x.is_contiguous()
    if node.op == "call_method" and node.target == "to" and not node.kwargs:
        return node.args[1:] == (x.dtype,)
    if node.target is F.dropout:
        return _argument(node, 1, "p", 0.5) == 0 or _argument(node, 2, "training", True) is False
    return False


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


_PURE: set[Callable[..., Any]] = {
    operator.getitem, operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.neg,
    getattr,
}  # fmt: skip


def _pure(node: fx.Node) -> bool:
    """Certain to have no effect but its result: an op whose schema changes nothing, or arithmetic."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        tags = node.target.tags
        return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in tags
    return node.target in _PURE
