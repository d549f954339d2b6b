"""Expert parallelism of every marked expert block whose weights `lmoe.parallelize` has cut over an
axis.

    y = experts(x, weights, ids, gate_up, down)
      ->
    sent = send(x, ids)                    counts and rows to the experts' ranks
    back = compute(sent, gate_up, down)    grouped matmuls, rows back
    y    = combine(back, weights)          sum on the tokens' own rank

Three nodes, so that what does not depend on them can run between them (overlap.py). Exact: no token
is dropped.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from lmoe_compiler.passes.match import find
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor, layer_of
from lmoe_compiler.runtime import dispatch
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class ExpertParallel:
    """Puts all-to-alls round every `lmoe::experts`."""

    axis: Axis
    name: str = "expert_parallel"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        for node in find(gm, torch.ops.lmoe.experts):
            local = _spread(gm, node, self.axis)
            where = f"{layer_of(node)}: {local} experts on each of {self.axis.size} ranks"
            report.add("expert blocks", where)
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _spread(gm: fx.GraphModule, node: fx.Node, axis: Axis) -> int:
    x, weights, ids, gate_up, down = node.args
    for weight in (gate_up, down):
        _mark(weight)
    assert isinstance(gate_up, fx.Node)
    local = int(gate_up.meta["example_value"].shape[0])
    group = axis.groups["experts"]
    edit = Editor(gm, "expert_parallel")
    edit.anchor = node
    sent = edit.call(dispatch.send, x, ids, local, axis.size, group)
    parts = [edit.call(operator.getitem, sent, i) for i in range(len(dispatch.Sent._fields))]
    rows, order, inverse, received, out, in_ = parts
    back = edit.call(dispatch.compute, rows, received, out, in_, gate_up, down, group)
    y = edit.call(dispatch.combine, back, weights, order, inverse, x)
    node.replace_all_uses_with(y)
    gm.graph.erase_node(node)
    return local


def _mark(weight: object) -> None:
    """Note at the parameter, behind casts, that it holds this rank's experts."""
    while isinstance(weight, fx.Node):
        weight.meta["lmoe_experts"] = True
        weight = weight.all_input_nodes[0] if weight.all_input_nodes else None
