"""Short convolutions and token shifts on a sharded sequence: the last W - 1 tokens of the rank before,
and no more.

    short_conv(x, weight, cu_seqlens)  ->  short_conv(x, weight, cu_seqlens - offset, halo(x, W - 1))
    pad(x, (0, 0, n, -n))              ->  shift(x, halo(x, n))

Forward sends W - 1 rows to the next rank, backward sends their gradient back. `cu_seqlens - offset`
may be negative: a document that began on an earlier rank sees its own tokens in the halo, and no
other does. A rank between others has to hold W - 1 tokens, and where it does not, every rank stops with an error: those
that only a rank further away has would need a gather over all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from lmoe_compiler.errors import NotShardable
from lmoe_compiler.passes import token_axis
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.shard import Shard
from lmoe_compiler.passes.splice import Editor, layer_of, where
from lmoe_compiler.passes.token_axis import axes_with
from lmoe_compiler.runtime import sequence
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class Halo:
    """Gives every `lmoe::short_conv`, and every shift, its history."""

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
        for node, count in shard.tokens.shifts.items():
            _shift(shard, node, count)
            report.add("shifts", f"{layer_of(node)}: {count} tokens from the rank before")
        if report.counts:
            Editor(gm, self.name).finish()
        return report


def _shift(shard: Shard, node: fx.Node, count: int) -> None:
    edit = Editor(shard.gm, "halo")
    edit.anchor = node
    (x,) = (n for n in node.all_input_nodes if shard.tokens.in_(n.meta["example_value"]))
    moved = edit.call(sequence.shift, x, _received(shard, edit, x, count))
    node.replace_all_uses_with(moved)
    node.graph.erase_node(node)


def _received(shard: Shard, edit: Editor, x: fx.Node, count: int) -> fx.Node:
    """The last tokens of the rank before."""
    axis, value = shard.axis, x.meta["example_value"]
    if 1 not in axes_with(value, shard.tokens.symbol):
        raise NotShardable(
            f"tokens are shifted along another dimension than 1 of {tuple(value.shape)}",
            where=where(edit.anchor),
            why="halos are rows of [B, T, ...]",
            try_="the token axis second",
        )
    shard.history(count, layer_of(edit.anchor))
    return edit.call(
        sequence.halo, x, count, shard.rank(), axis.index, axis.size, axis.groups["tokens"]
    )


def _give_history(shard: Shard, node: fx.Node) -> int:
    x, weight, documents, history = (*node.args, None, None)[:4]
    if history is not None:
        raise NotShardable(
            "a short convolution with a history in a sequence that is cut over ranks",
            where=where(node),
            why="its history is the tokens of the rank before",
            try_="torch.ops.lmoe.short_conv(x, weight, cu_seqlens)",
        )
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    taps = int(weight.meta["example_value"].shape[1])
    if taps == 1:
        return taps
    edit = Editor(shard.gm, "halo")
    edit.anchor = node
    received = _received(shard, edit, x, taps - 1)
    if documents is not None:
        documents = edit.call(sequence.shifted_documents, documents, shard.offset())
    node.args = (x, weight, documents, received)
    return taps
