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

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from lmoe_compiler import capacity
from lmoe_compiler.errors import NotShardable
from lmoe_compiler.experts import swiglu_experts
from lmoe_compiler.passes.match import find, replace
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import layer_of


def check_held(block: fx.Node, ranks: int) -> int:
    """How many experts of a block are here. Raises NotShardable where `ranks` times as many are not
    those that its router chooses from, as far as the model says (`dropped_rows`).
    """
    ids, gate_up = block.args[2], block.args[3]
    assert isinstance(ids, fx.Node)
    assert isinstance(gate_up, fx.Node)
    gm = block.graph.owning_module
    assert gm is not None
    here = int(gate_up.meta["example_value"].shape[0])
    marks = find(gm, torch.ops.lmoe.dropped_rows)
    told = [mark.args[1] for mark in marks if mark.args[0] is ids]
    for chosen_from in (*told, ids.meta.get("lmoe_num_experts", here * ranks)):
        if chosen_from != here * ranks:
            raise NotShardable(
                f"{here} experts on each of {ranks} ranks, and a router that chooses from {chosen_from}",
                where=layer_of(block),
                why="lmoe.parallelize cuts experts over an axis, and lmoe.compile has to get the same",
                try_='lmoe.parallelize(model, mesh, expert_parallel="ep"), and then '
                'lmoe.compile(model, mesh=mesh, expert_parallel="ep")',
            )
    return here


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
        function: Callable[..., Tensor] = swiglu_experts
        if self.factor is not None:
            function = partial(capacity.swiglu_experts, factor=self.factor)
        for node in find(gm, torch.ops.lmoe.experts):
            check_held(node, 1)
            experts, hidden, width = node.args[3].meta["example_value"].shape  # type: ignore[union-attr]
            report.add(
                "expert blocks", f"{layer_of(node)}: {experts} experts, {width} -> {hidden // 2}"
            )
            replace(gm, node, function, self.name, seen)
        if report.counts:
            gm.recompile()
        return report
