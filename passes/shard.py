"""What all passes over a sharded sequence share: the axis, what was found, and nodes for the
shard's place.

The first pass opens it, the others find it at the graph. Its nodes (rank, token counts of all
ranks, offset) are made once, on first use, at the head of the graph.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lmoe_compiler.passes.splice import Editor, device_of
from lmoe_compiler.passes.token_axis import Tokens, analyse
from lmoe_compiler.runtime import attention, collectives, sequence
from lmoe_compiler.runtime.mesh import Axis

_KEY = "lmoe_shard"


@dataclass
class Shard:
    """A graph whose inputs hold this rank's tokens only.

    `axis`: over which sequences are cut, or where none is, the rows of the batch. `everyone`: all
    ranks with other tokens. `rows_differ`: whether some of them hold other rows of the batch.
    """

    gm: fx.GraphModule
    axis: Axis
    tokens: Tokens
    everyone: Axis
    rows_differ: bool = False
    _nodes: dict[str, fx.Node] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        axis: Axis,
        sequence_dim: int,
        everyone: Axis | None = None,
        cut: bool = True,
    ) -> Shard:
        """The graph's shard; the graph is analysed the first time."""
        found = gm.meta.get(_KEY)
        if found is None:
            found = gm.meta[_KEY] = cls(gm, axis, analyse(gm, sequence_dim, cut), axis)
        assert isinstance(found, Shard)
        if everyone is not None:
            found.everyone, found.rows_differ = everyone, True
        return found

    @property
    def rows(self) -> int:
        """Rows of the batch that a count of tokens has to take in: all, where ranks differ in
        them; else a token stands for itself in each.
        """
        if not self.rows_differ:
            return 1
        return math.prod(int(size) for size in self._source.shape[: self.tokens.dim])

    def rank(self) -> fx.Node:
        """[1] int64: this rank's place on the axis."""
        index = torch.tensor([self.axis.index], device=device_of(self._source))
        return self._once("rank", lambda head: head.data("lmoe_rank", index))

    def counts(self) -> fx.Node:
        """[P] int64: tokens of one row, on every rank of the axis."""
        return self._once("counts", lambda head: self._gather(head, self.axis, [self.tokens.dim]))

    def totals(self) -> tuple[fx.Node, int]:
        """Tokens that numbers are about: [P] int64 of everyone, and how many are here. All rows of
        the batch where ranks differ in them, else one row.
        """
        dims = list(range(self.tokens.dim + 1)) if self.rows_differ else [self.tokens.dim]
        here = sequence.number(self._source, dims)
        if not self.rows_differ:
            return self.counts(), here
        every = self._once("totals", lambda head: self._gather(head, self.everyone, dims))
        return every, here

    def _gather(self, head: Editor, axis: Axis, dims: list[int]) -> fx.Node:
        group = axis.groups["numbers"]
        source = self.tokens.source
        flight = head.call(sequence.start_counts, source, dims, axis.size, group)
        return head.call(collectives.wait, flight)

    def offset(self) -> fx.Node:
        """[1] int64: tokens on the ranks before this one."""
        counts, rank = self.counts(), self.rank()
        return self._once("offset", lambda head: head.call(sequence.token_offset, counts, rank))

    def even(self) -> fx.Node:
        """`counts`, after a check that they are all the same."""
        counts = self.counts()
        return self._once("even", lambda head: head.call(attention.check_even, counts))

    def history(self, count: int, layer: str) -> fx.Node:
        """`counts`, after a check that the `count` tokens before a rank's first are on the rank before."""
        counts = self.counts()
        return self._once(
            f"history {count}", lambda head: head.call(sequence.check_history, counts, count, layer)
        )

    def most_and_total(self) -> list[fx.Node]:
        """The most tokens that a rank holds, and those of all ranks: numbers on the host."""
        lengths = self._lengths()
        read = lambda head: head.call(attention.largest_and_total, lengths)  # noqa: E731
        return self._items("most and total", self._once("sizes", read), 2)

    def each(self) -> list[fx.Node]:
        """How many tokens each rank holds: numbers on the host."""
        lengths = self._lengths()
        node = self._once("each", lambda head: head.call(attention.each, lengths))
        return self._items("each", node, self.axis.size)

    def _lengths(self) -> fx.Node:
        def gather(head: Editor) -> fx.Node:
            call = (self.tokens.source, self.tokens.dim, self.axis.size, self.axis.groups["sizes"])
            return head.call(collectives.wait, head.call(attention.start_lengths, *call))

        return self._once("lengths", gather)

    def _items(self, name: str, node: fx.Node, count: int) -> list[fx.Node]:
        def item(i: int) -> fx.Node:
            return self._once(f"{name} {i}", lambda head: head.call(operator.getitem, node, i))

        return [item(i) for i in range(count)]

    @property
    def _source(self) -> Any:
        return self.tokens.source.meta["example_value"]

    def _once(self, name: str, make: Callable[[Editor], fx.Node]) -> fx.Node:
        """The node of that name, in the block that follows the graph's inputs."""
        if name not in self._nodes:
            head = Editor(self.gm, "shard")
            previous = list(self._nodes.values())
            inputs = [n for n in self.gm.graph.nodes if n.op in ("placeholder", "get_attr")]
            last = previous[-1] if previous else inputs[-1]
            head.anchor = last.next
            self._nodes[name] = make(head)
        return self._nodes[name]
