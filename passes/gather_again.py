"""Keys and values of all ranks are gathered again for the backward of softmax layers, not kept from the forward.

    forward     gather(k, v) -> attention                     kept: this rank's k and v
    backward    gather(k, v) -> attention's backward -> reduce-scatter

Gathered they are P times as many, in every such layer: what grows with the sequence on each rank. The gather waits
for no gradient, so schedule.py starts it before the layer's own backward. Which nodes are computed twice is said to
AOTAutograd's partitioner, as activation checkpoints say it (`inner="eager"` has none, and keeps them). Of the 7B preset
on 64 ranks, half a million tokens (lmoe explain A1B-7B --ranks 64): 16 of 44 GiB less are kept, 3 % more time; with
disable="gather_again" they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import layer_of
from lmoe_compiler.passes.token_axis import operator
from lmoe_compiler.passes.traffic import collectives, depends_on


@dataclass(frozen=True)
class GatherAgain:
    """A pass over the joint graph. `group`: name of the group over which tokens of a sequence travel."""

    group: str
    name: str = "gather_again"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        behind = depends_on(gm.graph, "tangents")
        forward = [node for node in gm.graph.nodes if node not in behind]
        if not behind:
            return report
        gathers = {
            c.node for c in collectives(forward) if c.kind == "all_gather" and c.group == self.group
        }
        for node in _between(gathers, forward):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            if node in gathers:
                report.add("gathers", layer_of(node))
        return report


def _between(gathers: set[fx.Node], forward: list[fx.Node]) -> set[fx.Node]:
    """What leads from a gather to keys or values of an attention, with the gather."""
    reached, needed = set(gathers), set[fx.Node]()
    for node in forward:
        if not _attends(node) and any(x in reached for x in node.all_input_nodes):
            reached.add(node)
    for node in reversed(forward):
        if _attends(node):
            needed.update(x for x in node.args[1:3] if isinstance(x, fx.Node))
        elif node in needed:
            needed.update(node.all_input_nodes)
    return reached & needed


def _attends(node: fx.Node) -> bool:
    # By name: the op is a model's, which need not be there.
    return operator(node) == "document_attention"
