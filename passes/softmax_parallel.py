"""Softmax attention on a sharded sequence: every rank's queries meet everybody's keys and values.

    attention(q, k, v, cu_seqlens)  ->  attention(q, gather(k), gather(v), cu_seqlens, offset)

Keys and values travel as one tensor; with grouped heads they are few. Backward: reduce-scatter.
Needs as many tokens on every rank.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from lmoe_compiler.errors import NotShardable
from lmoe_compiler.passes import token_axis
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.shard import Shard
from lmoe_compiler.passes.splice import Editor, layer_of, where
from lmoe_compiler.runtime import sequence
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class SoftmaxParallel:
    """Gives every `lmoe::attention` the keys and values of all ranks."""

    axis: Axis
    sequence_dim: int = 1
    name: str = "softmax_parallel"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        shard = Shard.of(gm, self.axis, self.sequence_dim)
        for node in shard.tokens.marked:
            if token_axis.operator(node) == "attention":
                _gather(shard, node)
                report.add("attentions", f"{layer_of(node)}: keys and values of all ranks")
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _gather(shard: Shard, node: fx.Node) -> None:
    q, k, v, documents, offset = (*node.args, None, None)[:5]
    if offset is not None:
        raise NotShardable(
            "an attention with offset= in a sequence that is cut over ranks",
            where=where(node),
            why="the pass says where the queries stand",
            try_="torch.ops.lmoe.attention(q, k, v, cu_seqlens)",
        )
    axis = shard.axis
    edit = Editor(shard.gm, "softmax_parallel")
    edit.anchor = node
    both = edit.call(sequence.gather_keys_values, k, v, axis.size, axis.groups["tokens"])
    keys, values = (edit.call(operator.getitem, both, i) for i in (0, 1))
    node.args = (q, keys, values, documents, shard.offset())
