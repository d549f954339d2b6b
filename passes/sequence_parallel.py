"""Sequence parallelism of every recurrence that has a span map.

    o = scan(inputs)                 span = span_map(inputs)
                                     flight = start(span)
                             ->      ...                         what does not need the entry state
                                                                 (overlap.py)
                                     S_in = finish(flight, span)
                                     o = scan(inputs, S_in)

With packed documents the global `cu_seqlens` becomes this shard's, the map of a span in which a
document begins is zero, and the entry state goes to the document that comes over from the rank
before; all of it is arithmetic in the graph. A recurrence without a span map is refused by name.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lmoe_compiler.errors import NotShardable
from lmoe_compiler.kernels import parse
from lmoe_compiler.layout import map_axes
from lmoe_compiler.passes import planner, token_axis
from lmoe_compiler.passes.cost import work_beside
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.shard import Shard
from lmoe_compiler.passes.splice import Editor, layer_of, where
from lmoe_compiler.runtime import exchange, sequence
from lmoe_compiler.runtime.mesh import Axis
from lmoe_compiler.runtime.topology import Topology


@dataclass(frozen=True)
class SequenceParallel:
    """Gives every `lmoe::scan` its entry state.

    `schedule`: one of topology.SCHEDULES, or "auto". `span`: over how many ranks a document spans at most. `even`:
    whether all ranks hold as many tokens.
    """

    axis: Axis
    sequence_dim: int = 1
    schedule: str = "auto"
    even: bool = False
    topology: Topology | None = None
    span: int | None = None
    name: str = "sequence_parallel"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        shard = Shard.of(gm, self.axis, self.sequence_dim)
        for node in shard.tokens.marked:
            if token_axis.operator(node) == "scan":
                choice = self._exchange(shard, node)
                report.add("recurrences", f"{layer_of(node)}: {choice}")
        if report.counts:
            Editor(gm, self.name).finish()
        return report

    def _exchange(self, shard: Shard, node: fx.Node) -> planner.Choice:
        """Put span map, exchange and entry state before one scan."""
        text, inputs, states, documents, options = node.args
        assert isinstance(text, str)
        program = parse(text)
        axes = [
            (" ".join(var.axes), None if m is None else " ".join(m))
            for var, m in zip(program.states, map_axes(program), strict=True)
        ]
        _refuse_states(node, states, len(axes))
        edit = Editor(shard.gm, self.name)
        edit.anchor = node
        token = _token_input(program, inputs)
        local, enters = None, None
        if documents is not None:
            last = edit.call(sequence.last_document, documents, shard.offset(), token)
            local, enters = (edit.call(operator.getitem, last, i) for i in (0, 1))
        span = edit.call(torch.ops.lmoe.span_map.default, text, inputs, local, options)
        parts = [edit.call(operator.getitem, span, i) for i in range(_count(axes))]
        if enters is not None:
            parts, axes = _reset(edit, parts, axes, enters)
        choice = self._choose(shard.gm, node, parts, len(axes))
        call = (choice.schedule, shard.axis.size, shard.axis.groups["state"])
        flight = edit.call(exchange.start, parts, *call)
        entries = edit.call(exchange.finish, flight, parts, shard.rank(), tuple(axes), *call)
        entries.meta["lmoe_choice"] = choice
        entry = [edit.call(operator.getitem, entries, i) for i in range(len(axes))]
        if documents is not None:
            entry = [edit.call(sequence.place, x, documents, shard.offset()) for x in entry]
            documents = edit.call(sequence.local_documents, documents, shard.offset(), token)
        node.args = (text, inputs, entry, documents, options)
        return choice

    def _choose(
        self, gm: fx.GraphModule, node: fx.Node, parts: list[fx.Node], num_states: int
    ) -> planner.Choice:
        values = [part.meta["example_value"] for part in parts]
        sizes = [x.numel() * x.element_size() for x in values]
        topology = self.topology or planner.topology_of(values[0].device.type)
        maps, states = sum(sizes[:-num_states]), sum(sizes[-num_states:])
        return planner.choose(
            self.schedule,
            self.axis.size,
            states,
            maps,
            topology,
            heads=values[-1].shape[1],
            span=self.span,
            hidden=work_beside(gm, node) / topology.flops,
            even=self.even,
        )


def _count(axes: list[tuple[str, str | None]]) -> int:
    """Results of span_map: a map of each state that has one, and an end of each."""
    return len(axes) + sum(m is not None for _, m in axes)


def _reset(edit: Editor, parts: list[fx.Node], axes: list[Any], enters: fx.Node) -> Any:
    """Maps that are zero where a document begins; the identity becomes a scalar one for that."""
    given = iter(parts)
    maps = {i: next(given) for i, (_, m) in enumerate(axes) if m is not None}
    ends = list(given)
    out = [
        edit.call(sequence.reset, maps[i], enters)
        if i in maps
        else edit.call(sequence.reset_only, end, enters)
        for i, end in enumerate(ends)
    ]
    return [*out, *ends], [(state, m or "") for state, m in axes]


def _token_input(program: Any, inputs: Any) -> fx.Node:
    return next(x for x, var in zip(inputs, program.inputs, strict=True) if var.kind == "token")


def _refuse_states(node: fx.Node, states: Any, count: int) -> None:
    """States at the ends of a cut sequence belong to other ranks."""
    ends = range(1, count + 1)
    used = [user for user in node.users if user.target is operator.getitem and user.args[1] in ends]
    if states:
        raise NotShardable(
            "a recurrence with initial_state= in a sequence that is cut over ranks",
            where=where(node),
            why="only the first rank's shard starts there",
            try_="leave initial_state out; shards pass states on by themselves",
        )
    if any(user.users for user in used):
        raise NotShardable(
            "a recurrence with return_state=True in a sequence that is cut over ranks",
            where=where(node),
            why="the final state of this rank's shard is not the sequence's",
            try_="return_state=False",
        )
