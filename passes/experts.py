"""Lowers the marked expert block where the experts of a layer are all on this rank.

    y = experts(x, weights, ids, gate_up, down)
      ->
    order, inverse, offsets = sort by expert                  route
    rows = dispatch(x, order)                                 gather
    h    = silu(grouped_mm(rows, gate)) * grouped_mm(rows, up)
    y    = collect(grouped_mm(h, down) * weights)             weighted sum per token

The nodes are those of `swiglu_experts`, traced: from here on any pass can see and move them. With a
capacity they are those of capacity.py. Invariant: no mark is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from lmoe_compiler import capacity
from lmoe_compiler.experts import swiglu_experts
from lmoe_compiler.passes.match import find, replace
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import layer_of


@dataclass(frozen=True)
class LowerExperts:
    """Replaces every `lmoe::experts` by what it does. `factor`: of the capacity; None: exact."""

    factor: float | None = None
    name: str = "lower_experts"

    @property
    def changes_numerics(self) -> bool:
        return self.factor is not None

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        seen: dict[str, fx.GraphModule] = {}
        exact = self.factor is None
        function = (
            swiglu_experts if exact else partial(capacity.swiglu_experts, factor=self.factor)
        )
        for node in find(gm, torch.ops.lmoe.experts):
            experts, hidden, width = node.args[3].meta["example_value"].shape  # type: ignore[union-attr]
            report.add(
                "expert blocks", f"{layer_of(node)}: {experts} experts, {width} -> {hidden // 2}"
            )
            replace(gm, node, function, self.name, seen)
        if report.counts:
            gm.recompile()
        return report
