"""With a fixed capacity: every expert block says how many rows it leaves out.

    dropped = dropped_rows(ids)   ->   dropped = count of rows without a place, of all ranks

A block whose choices have no such node, or one that no output depends on, is refused: nothing is
dropped in silence. Comes before the passes that replace the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from lmoe_compiler import capacity
from lmoe_compiler.errors import DropsInSilence
from lmoe_compiler.passes.match import find
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor, layer_of, where
from lmoe_compiler.runtime import capacity as on_ranks
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class CountDropped:
    """Replaces every `lmoe::dropped_rows`. `everyone`: the ranks with other tokens, if any."""

    factor: float
    everyone: Axis | None = None
    name: str = "count_dropped"
    changes_numerics: bool = True

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        marks = find(gm, torch.ops.lmoe.dropped_rows)
        told = {mark.args[0] for mark in marks if _reaches_output(mark)}
        for block in find(gm, torch.ops.lmoe.experts):
            if block.args[2] not in told:
                raise DropsInSilence(
                    f"expert_capacity={self.factor}, and no output says what {block.name} drops",
                    where=where(block) or layer_of(block),
                    why="the model does not return dropped_rows of these choices",
                    try_="dropped = lmoe_compiler.experts.dropped_rows(ids, num_experts)  # return it",
                )
        for mark in marks:
            self._count(gm, mark)
            report.add("counts", f"{layer_of(mark)}: {self.factor} of a balanced load has a place")
        if report.counts:
            Editor(gm, self.name).finish()
        return report

    def _count(self, gm: fx.GraphModule, mark: fx.Node) -> None:
        edit = Editor(gm, self.name)
        edit.anchor = mark
        ids, num_experts = mark.args
        assert isinstance(ids, fx.Node)
        # What the mark said besides: passes that need it find it here.
        ids.meta["lmoe_num_experts"] = num_experts
        if self.everyone is None:
            count = edit.call(capacity.dropped_rows, ids, num_experts, self.factor)
        else:
            group = self.everyone.groups["numbers"]
            count = edit.call(on_ranks.dropped_rows, ids, num_experts, self.factor, group)
        mark.replace_all_uses_with(count)
        gm.graph.erase_node(mark)


def _reaches_output(node: fx.Node) -> bool:
    seen, ahead = {node}, [node]
    while ahead:
        for user in ahead.pop().users:
            if user.op == "output":
                return True
            if user not in seen:
                seen.add(user)
                ahead.append(user)
    return False
