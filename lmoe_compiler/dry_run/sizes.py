"""Numbers for the symbols in a graph: T of this dry run, and rows of experts in the mean.

How many rows a rank's experts get is the data's to know. Here routing is balanced: as many come as go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lmoe_compiler.passes.cost import attention_formulas
from lmoe_compiler.passes.traffic import KINDS


class Sizes:
    """Sizes of values in the graphs of one compilation, for `tokens` tokens on a rank."""

    def __init__(self, token: sympy.Symbol, tokens: int, graphs: Iterable[fx.GraphModule]) -> None:
        self._token, self._tokens = token, tokens
        self._rows: dict[object, int] = {}
        self._lengths: dict[object, int] = {}
        for gm in graphs:
            for node in gm.graph.nodes:
                self._learn(node)

    def _learn(self, node: fx.Node) -> None:
        """Rows that are sent are known; those that arrive, and go back, are as many."""
        if KINDS.get(node.target) != "all_to_all":
            return
        (given, *_) = (n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))
        sent, got = given.meta["val"].shape[0], node.meta["val"].shape[0]
        for known, other in ((sent, got), (got, sent)):
            if not _known(other) and (_known(known) or _expression(known) in self._rows):
                self._rows.setdefault(_expression(other), self.length(known))

    def length(self, size: Any) -> int:
        """One dimension."""
        expr = _expression(size)
        if not isinstance(expr, sympy.Expr):
            return int(size)
        if expr not in self._lengths:
            found = self._rows.get(expr)
            if found is None:
                value = expr.subs(self._token, self._tokens)
                found = int(value) if value.is_number else self._mean(value)
            self._lengths[expr] = found
        return self._lengths[expr]

    def _mean(self, expr: sympy.Expr) -> int:
        """Rows of an expert layer, where an expression has several of its symbols."""
        for known, rows in self._rows.items():
            if expr.free_symbols & known.free_symbols:  # type: ignore[attr-defined]
                return rows
        return 0

    def shape(self, x: Tensor) -> list[int]:
        return [self.length(size) for size in x.shape]

    def num_bytes(self, x: Tensor) -> float:
        return float(math.prod(self.shape(x)) * x.element_size())

    def plain(self, value: Any) -> Any:
        """A tensor without memory of the size that this dry run gives it; other values with their numbers."""
        if isinstance(value, Tensor):
            return torch.empty(self.shape(value), dtype=value.dtype, device="meta")
        if isinstance(value, torch.SymInt):
            return self.length(value)
        if isinstance(value, tuple | list):
            return type(value)(self.plain(x) for x in value)
        return value

    def flops(self, node: fx.Node) -> float:
        """Operations of an ATen node by torch's formulas and ours; elementwise work counts as nothing."""
        formula = _formulas().get(getattr(node.target, "overloadpacket", None))
        if formula is None:
            return 0.0
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: self.plain(n.meta["val"])
        )
        return float(formula(*args, **kwargs, out_val=self.plain(node.meta["val"])))


def _expression(size: Any) -> Any:
    node = getattr(size, "node", None)
    return size if node is None else node.expr


def _known(size: Any) -> bool:
    return not (isinstance(size, torch.SymInt) and free_unbacked_symbols(size))


@cache
def _formulas() -> dict[Any, Any]:
    from torch.utils.flop_counter import flop_registry, shape_wrapper

    ours = {op: shape_wrapper(formula) for op, formula in attention_formulas().items()}
    return {**flop_registry, **ours}
