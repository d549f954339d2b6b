"""Expert parallelism of every marked expert block whose weights `lmoe.parallelize` has cut over an
axis.

    y = experts(x, weights, ids, gate_up, down)
      ->
    sent = send(x, ids)                    counts and rows to the experts' ranks
    back = compute(sent, gate_up, down)    grouped matmuls, rows back
    y    = combine(back, weights)          sum on the tokens' own rank

Three nodes, so that what does not depend on them can run between them (overlap.py). Exact, nothing
is dropped: how many rows go where is a value of the graph, read once a layer. With a capacity
(lmoe_compiler/capacity.py) the same three calls have fixed sizes, and read nothing.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lmoe_compiler.passes.experts import check_held
from lmoe_compiler.passes.match import find
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor, layer_of
from lmoe_compiler.runtime import capacity, dispatch
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class ExpertParallel:
    """Puts all-to-alls round every `lmoe::experts`. `factor`: of the capacity; None: exact."""

    axis: Axis
    factor: float | None = None
    name: str = "expert_parallel"

    @property
    def changes_numerics(self) -> bool:
        return self.factor is not None

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        checked: set[str] = set()
        for node in find(gm, torch.ops.lmoe.experts):
            local = self._spread(gm, node, checked)
            where = f"{layer_of(node)}: {local} experts on each of {self.axis.size} ranks"
            report.add("expert blocks", where)
        if report.counts:
            Editor(gm, self.name).finish()
        return report

    def _spread(self, gm: fx.GraphModule, node: fx.Node, checked: set[str]) -> int:
        """`checked`: numbers of rows that all ranks have been asked for."""
        x, weights, ids, gate_up, down = node.args
        for weight in (gate_up, down):
            _mark(weight)
        local = check_held(node, self.axis.size)
        size, group = self.axis.size, self.axis.groups["experts"]
        edit = Editor(gm, self.name)
        edit.anchor = node
        if self.factor is None:
            sent = edit.call(dispatch.send, x, ids, local, size, group)
            rows, order, inverse, received, out, in_ = _fields(edit, sent, dispatch.Sent)
            back = edit.call(dispatch.compute, rows, received, out, in_, gate_up, down, group)
            y = edit.call(dispatch.combine, back, weights, order, inverse, x)
        else:
            assert isinstance(ids, fx.Node)
            if (asked := str(ids.meta["example_value"].numel())) not in checked:
                checked.add(asked)
                edit.call(capacity.check_rows, ids, size, self.axis.groups["numbers"])
            sent = edit.call(capacity.send, x, ids, local, size, self.factor, group)
            rows, source, slot = _fields(edit, sent, capacity.Sent)
            back = edit.call(capacity.compute, rows, gate_up, down, size, group)
            y = edit.call(capacity.combine, back, weights, source, slot, x)
        node.replace_all_uses_with(y)
        gm.graph.erase_node(node)
        return local


def _fields(edit: Editor, sent: fx.Node, kind: Any) -> list[fx.Node]:
    return [edit.call(operator.getitem, sent, i) for i in range(len(kind._fields))]


def _mark(weight: object) -> None:
    """Note at the parameter, behind casts, that it holds this rank's experts."""
    while isinstance(weight, fx.Node):
        weight.meta["lmoe_experts"] = True
        weight = weight.all_input_nodes[0] if weight.all_input_nodes else None
