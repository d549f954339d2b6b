"""Gradients of replicated parameters: identity in the forward, a sum over ranks in the backward.

For use without a data-parallel wrapper over these axes (DDP and FSDP2 sum by themselves). Which sum
a parameter needs:

    replicated        over all ranks with other tokens: each has its share of the one loss's gradient
    experts           over the ranks with other tokens that hold the same experts; what the ranks of
                      the experts' own axes have to say came with the rows
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor
from lmoe_compiler.runtime import collectives
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class SumGradients:
    """Puts `sum_gradient` behind every parameter. `axis`: all ranks with other tokens. `rest`:
    those of them with the same experts, None if there are none.
    """

    axis: Axis
    rest: Axis | None
    name: str = "gradients"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        parameters = [n for n in gm.graph.nodes if n.op == "placeholder" and is_parameter(n)]
        inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for node in parameters:
            axis = self.rest if node.meta.get("lmoe_experts") else self.axis
            if axis is None:
                continue
            edit = Editor(gm, self.name)
            edit.anchor = inputs[-1].next
            summed = edit.call(collectives.sum_gradient, node, axis.groups["gradients"])
            node.replace_all_uses_with(summed, delete_user_cb=lambda user, s=summed: user is not s)
            report.add("parameters")
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def is_parameter(node: fx.Node) -> bool:
    """Whether an input of the graph is a trained parameter of a module."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or not value.requires_grad or not value.is_leaf:
        return False
    return isinstance(value, torch.nn.Parameter) or "_parameters_" in str(node.target)
