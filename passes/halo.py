"""Short convolutions on a sharded sequence: the last W - 1 tokens of the rank before, and no more.

    short_conv(x, weight, cu_seqlens)  ->  short_conv(x, weight, cu_seqlens - offset, halo(x, W -
                                           1))

Forward sends W - 1 rows to the next rank, backward sends their gradient back. `cu_seqlens - offset`
may be negative: a document that began on an earlier rank sees its own tokens in the halo, and no
other does.
"""

from __future__ import annotations

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
class Halo:
    """Gives every `lmoe::short_conv` its history."""

    axis: Axis
    sequence_dim: int = 1
    name: str = "halo"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        shard = Shard.of(gm, self.axis, self.sequence_dim)
        for node in shard.tokens.marked:
            if token_axis.operator(node) == "short_conv":
                taps = _give_history(shard, node)
                report.add(
                    "convolutions", f"{layer_of(node)}: {taps - 1} tokens from the rank before"
                )
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _give_history(shard: Shard, node: fx.Node) -> int:
    x, weight, documents, history = (*node.args, None, None)[:4]
    if history is not None:
        raise NotShardable(
            "a short convolution with a history in a sequence that is cut over ranks",
            where=where(node),
            why="its history is the tokens of the rank before",
            try_="torch.ops.lmoe.short_conv(x, weight, cu_seqlens)",
        )
    assert isinstance(weight, fx.Node)
    taps = int(weight.meta["example_value"].shape[1])
    if taps == 1:
        return taps
    axis = shard.axis
    edit = Editor(shard.gm, "halo")
    edit.anchor = node
    received = edit.call(
        sequence.halo, x, taps - 1, shard.rank(), axis.index, axis.size, axis.groups["tokens"]
    )
    if documents is not None:
        documents = edit.call(sequence.shifted_documents, documents, shard.offset())
    node.args = (x, weight, documents, received)
    return taps
