"""Softmax attention on a sharded sequence, in one of two ways.

    keys     attention(q, k, v)  ->  attention(q, gather(k), gather(v), offset)      3 * 2 G E (P-1) numbers a token
    heads    attention(q, k, v)  ->  back(attention(heads(q), heads(k), heads(v)))   2 * (2 H + 2 G) E (P-1)/P

(numbers that a rank receives in a training step). `keys`: every rank's queries meet everybody's keys, which travel as
one tensor and are few under grouped heads; the backward gathers them again (gather_again.py) and has a reduce-scatter.
`heads`: two kinds of all-to-all, whole sequences of H/P heads; where P divides G. Ranks may hold any numbers of tokens,
which their hosts tell each other once a graph; `even`: all promise to hold as many, which saves that and a copy of the
keys, and stops with an error where it is not kept (runtime/attention.py). Notation: H query heads, G key-value heads, E
head size, P ranks.
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
from lmoe_compiler.runtime import attention
from lmoe_compiler.runtime.mesh import Axis


@dataclass(frozen=True)
class SoftmaxParallel:
    """Lets every `lmoe::attention` see all tokens. `way`: "keys", "heads", or "auto", the fewer bytes."""

    axis: Axis
    sequence_dim: int = 1
    way: str = "auto"
    even: bool = False
    name: str = "softmax_parallel"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        shard = Shard.of(gm, self.axis, self.sequence_dim)
        for node in shard.tokens.marked:
            if token_axis.operator(node) == "attention":
                way, why = self._choose(node)
                (_gather if way == "keys" else _transpose)(shard, node, self.even)
                report.add("attentions", f"{layer_of(node)}: {way}, {why}")
        if report.counts:
            Editor(gm, self.name).finish()
        return report

    def _choose(self, node: fx.Node) -> tuple[str, str]:
        """The way, and why."""
        if len(node.args) > 4 and node.args[4] is not None:
            raise NotShardable(
                "an attention with offset= in a sequence that is cut over ranks",
                where=where(node),
                why="the pass says where the queries stand",
                try_="torch.ops.lmoe.attention(q, k, v, cu_seqlens)",
            )
        q, k, v = (x.meta["example_value"].shape for x in node.args[:3])  # type: ignore[union-attr]
        ranks = self.axis.size
        keys = 3 * k[2] * (k[3] + v[3]) * (ranks - 1)
        heads = 2 * (q[2] * (q[3] + v[3]) + k[2] * (k[3] + v[3])) * (ranks - 1) / ranks
        numbers = f"{keys} numbers a token with keys, {heads:.0f} with heads"
        possible = k[2] % ranks == 0
        if self.way == "heads" and not possible:
            raise NotShardable(
                f"{k[2]} key-value heads on {ranks} ranks",
                where=where(node),
                why="by heads, each rank attends with as many of them as the others",
                try_='the way "keys"',
            )
        if self.way != "auto":
            return self.way, f"asked for; {numbers}"
        if not possible:
            return "keys", f"{ranks} ranks do not divide {k[2]} key-value heads; {numbers}"
        return ("keys" if keys <= heads else "heads"), numbers


def _editor(shard: Shard, node: fx.Node) -> Editor:
    edit = Editor(shard.gm, "softmax_parallel")
    edit.anchor = node
    return edit


def _gather(shard: Shard, node: fx.Node, even: bool) -> None:
    q, k, v, documents = (*node.args, None)[:4]
    axis = shard.axis
    call = [k, v, axis.size, axis.groups["tokens"]]
    if even:
        shard.even()
    else:
        call += [shard.counts(), *shard.most_and_total()]
    edit = _editor(shard, node)
    both = edit.call(attention.gather_keys_values, *call)
    keys, values = (edit.call(operator.getitem, both, i) for i in (0, 1))
    node.args = (q, keys, values, documents, shard.offset())


def _transpose(shard: Shard, node: fx.Node, even: bool) -> None:
    *tensors, documents = (*node.args, None)[:4]
    axis = shard.axis
    call: list[object] = [axis.size, axis.groups["tokens"]]
    if even:
        shard.even()
    else:
        call.append(shard.each())
    edit = _editor(shard, node)
    whole = [edit.call(attention.tokens_to_heads, x, *call) for x in tensors]
    # With a place of the first query it asks nothing about sizes, which without `even` only the data knows.
    first = [] if even else [edit.call(attention.first_place, whole[0])]
    node.args = (*whole, documents, *first)
    edit.anchor = node.next
    edit.refresh(node)
    back = edit.call(attention.heads_to_tokens, node, tensors[0], *call)
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
