"""What all passes over a sharded sequence share: the axis, what was found, and nodes for the
shard's place.

The first pass opens it, the others find it at the graph. Its nodes (rank, token counts of all
ranks, offset) are made once, on first use, at the head of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lmoe_compiler.passes.splice import Editor, device_of
from lmoe_compiler.passes.token_axis import Tokens, analyse
from lmoe_compiler.runtime import collectives, sequence
from lmoe_compiler.runtime.mesh import Axis

_KEY = "lmoe_shard"


@dataclass
class Shard:
    """A graph whose inputs hold this rank's tokens only."""

    gm: fx.GraphModule
    axis: Axis
    tokens: Tokens
    _nodes: dict[str, fx.Node] = field(default_factory=dict)

    @classmethod
    def of(cls, gm: fx.GraphModule, axis: Axis, sequence_dim: int) -> Shard:
        """The graph's shard; the graph is analysed the first time."""
        found = gm.meta.get(_KEY)
        if found is None:
            found = gm.meta[_KEY] = cls(gm, axis, analyse(gm, sequence_dim))
        assert isinstance(found, Shard)
        return found

    def rank(self) -> fx.Node:
        """[1] int64: this rank's place on the axis."""
        index = torch.tensor([self.axis.index], device=device_of(self._source))
        return self._once("rank", lambda head: head.data("lmoe_rank", index))

    def counts(self, axis: Axis | None = None) -> fx.Node:
        """[P] int64: tokens of every rank, of this axis or of another."""
        axis = axis or self.axis

        def make(head: Editor) -> fx.Node:
            flight = head.call(
                sequence.start_counts,
                self.tokens.source,
                self.tokens.dim,
                axis.size,
                axis.groups["numbers"],
            )
            return head.call(collectives.wait, flight)

        return self._once(f"counts_{axis.name}", make)

    def offset(self) -> fx.Node:
        """[1] int64: tokens on the ranks before this one."""
        counts, rank = self.counts(), self.rank()
        return self._once("offset", lambda head: head.call(sequence.token_offset, counts, rank))

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
