"""Tensor parallelism of layers whose weights `lmoe.parallelize` has cut over an axis: by head, by hidden channel.

Only parameters are marked; where collectives go follows from what each value is on the ranks of the axis:

    whole     the same on every rank: the residual stream, norms, the router
    cut       this rank's heads or channels: a cut parameter, and whatever is computed with something cut
    a sum's   a parameter whose cut dimension its operation sums over (o_proj, down): the result is a part of a sum

    cut weight meets whole x      x -> sum_gradient(x)         every rank has a part of the gradient
    result of a sum's weight      y -> global_sum(y)           whole again
    rows common to all ranks      w -> sum_rows_gradient(w)    a low rank beside the heads, in one weight
    part of several ranks         w -> sum_copies_gradient(w)  a key-value head of query heads on these ranks

So a replicated weight that only meets heads (the norm of a head's output) gets its whole gradient as well. A value that
leaves the graph while cut is refused. No recurrence, attention or expert block is named here: they compute on local
tensors with fewer heads or channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from lmoe_compiler.cuts import Cut
from lmoe_compiler.errors import NotShardable
from lmoe_compiler.passes.gradients import is_parameter
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor, layer_of, parameter_name, where
from lmoe_compiler.runtime import collectives
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class TensorParallel:
    """Puts the sums over ranks round layers with cut weights. `cuts`: of the compiled module, by parameter name."""

    axis: Axis
    cuts: Mapping[str, tuple[Cut, ...]] = field(hash=False)
    name: str = "tensor_parallel"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        flow = _Flow(gm, self.axis, self.name)
        for node in list(gm.graph.nodes):
            if node.op == "placeholder" and is_parameter(node):
                for cut in self._of(node):
                    flow.parameter(node, cut)
            elif node.op in ("call_function", "call_method") and flow.operation(node):
                report.add("sums", f"{layer_of(node)}: {node.name} over {self.axis.size} ranks")
            elif node.op == "output":
                flow.refuse_cut(node)
        for value in flow.summed:
            report.add("gradients", f"{layer_of(value)}: {value.name}")
        if flow.changed:
            Editor(gm, self.name).finish()
        return report

    def _of(self, node: fx.Node) -> list[Cut]:
        """What is cut of a parameter over this axis."""
        name = parameter_name(node)
        if name is None:
            raise NotShardable(
                f"the parameter {node.target} of the graph has no name",
                where=where(node),
                why="the cuts of weights are noted by name, and this is not an attribute of a module",
                try_="keep weights as parameters of modules, and compile the module",
            )
        return [cut for cut in self.cuts.get(name, ()) if cut.axis == self.axis.name]


class _Flow:
    """One walk in the graph's order: which values are cut, and the sums that follow from it."""

    def __init__(self, gm: fx.GraphModule, axis: Axis, made_by: str) -> None:
        self.gm, self.axis, self.made_by = gm, axis, made_by
        self.group = axis.groups["tokens"]
        self.first = next(n for n in gm.graph.nodes if n.op != "placeholder")
        self.cut: set[fx.Node] = set()
        self.sums: set[fx.Node] = set()
        self.summed: dict[fx.Node, fx.Node] = {}
        self.changed = False

    def parameter(self, node: fx.Node, cut: Cut) -> None:
        trained = node.meta["example_value"].requires_grad
        if cut.common and trained:
            rows = (cut.dim, cut.common, self.group)
            self.cut.add(self._after(node, collectives.sum_rows_gradient, node, *rows))
        if cut.copies > 1 and trained:
            part = torch.tensor([self.axis.index // cut.copies])
            value = part.to(node.meta["example_value"].device)
            here = self._editor(node).data(f"lmoe_part_{cut.copies}", value)
            copies = (here, self.axis.size // cut.copies, self.group)
            self.cut.add(self._after(node, collectives.sum_copies_gradient, node, *copies))
        (self.sums if cut.summed else self.cut).add(node)

    def operation(self, node: fx.Node) -> bool:
        """Whether the node's result is summed over the ranks."""
        operands = node.all_input_nodes
        if not _tensors(node.meta.get("example_value")):
            return False
        if not any(x in self.sums for x in operands):
            if any(x in self.cut for x in operands):
                self._sum_gradients(node)
                self.cut.add(node)
            return False
        if len(operands) == 1:  # a cast, a transpose: still the weight
            self.sums.add(node)
            return False
        if not any(x in self.cut for x in operands):
            self._refuse(node, "meets a value that no rank has a part of")
        if node.target is F.linear and len(operands) > 2:
            self._refuse(node, "has a bias, which every rank would add")
        self._sum_gradients(node)
        self._after(node, collectives.global_sum, node, self.group)
        return True

    def refuse_cut(self, output: fx.Node) -> None:
        for node in output.all_input_nodes:
            if node in self.cut | self.sums:
                raise NotShardable(
                    f"{node.name} leaves the graph with this rank's part only",
                    where=where(node),
                    why="it was computed with weights that are cut over ranks, and nothing sums it",
                    try_="Part(..., summed=True) for the weight that brings heads or channels together",
                )

    def _sum_gradients(self, node: fx.Node) -> None:
        """Every whole operand with a gradient: each rank has a part of that."""
        for x in node.all_input_nodes:
            values = _tensors(x.meta.get("example_value"))
            if x in self.cut or x in self.sums or not any(v.requires_grad for v in values):
                continue
            if x not in self.summed:
                edit = self._editor(x)
                self.summed[x] = edit.call(collectives.sum_gradient, x, self.group)
                self.changed = True
            node.replace_input_with(x, self.summed[x])

    def _after(self, node: fx.Node, function: Any, *args: Any) -> fx.Node:
        """`function` on the node, in its place for everybody else."""
        new = self._editor(node).call(function, *args)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.changed = True
        return new

    def _editor(self, node: fx.Node) -> Editor:
        edit = Editor(self.gm, self.made_by)
        edit.anchor = self.first if node.op == "placeholder" else node.next
        return edit

    def _refuse(self, node: fx.Node, what: str) -> None:
        raise NotShardable(
            f"{node.name}, whose weight is cut along what it sums over, {what}",
            where=where(node),
            why="its results are parts of a sum over ranks",
            try_="linear(h, weight) without bias, h made of heads or channels that are cut as the weight is",
        )


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [x for x in values if isinstance(x, Tensor)]
