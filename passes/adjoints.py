"""Every collective of the forward has its adjoint in the backward: checked on AOTAutograd's joint graph.

    forward                         backward, per layer in the opposite order, over the same group
    all_gather    [n] -> [P n]      reduce_scatter  [P n] -> [n]
    all_to_all    splits in, out    all_to_all      splits out, in
    state exchange                  the same schedule again, with no more bytes (exchange.py)
    all_reduce of a statistic       nothing: every rank holds the derivative of the one result (collectives.py)
    nothing                         all_reduce of a replicated parameter's gradient

A forward collective without an adjoint is a gradient that stays on the wrong rank; an adjoint without a forward, or of
another size, hangs. Both are refused with the layer's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor, fx

from lmoe_compiler.errors import WrongOnRanks
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.traffic import Collective, collectives, depends_on, num_bytes, splits


@dataclass(frozen=True)
class Adjoints:
    """A pass over the joint graph that changes nothing. `state_groups`: names of the groups of state exchanges."""

    state_groups: frozenset[str] = field(default_factory=frozenset)
    name: str = "adjoints"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        report = Report(self.name)
        behind = depends_on(gm.graph, "tangents")
        if not behind:
            return report
        differentiable = _differentiable(gm.graph, behind)
        forward, backward = _by_place(
            [
                c
                for c in collectives(gm.graph.nodes)
                if c.kind != "all_reduce" and (c.node in behind or c.node in differentiable)
            ],
            behind,
        )
        for place in dict.fromkeys((*forward, *backward)):
            pairs = zip_longest(forward.get(place, []), reversed(backward.get(place, [])))
            for ours, theirs in pairs:
                self._compare(ours, theirs)
                report.add("pairs")
        return report

    def _compare(self, ours: Collective | None, theirs: Collective | None) -> None:
        if theirs is None:
            assert ours is not None
            _refuse(ours, "has no adjoint", "gradients of what it gives stay on this rank")
        elif ours is None:
            _refuse(theirs, "has no forward", "other ranks do not expect it")
        elif ours.group in self.state_groups:
            if theirs.kind != ours.kind or theirs.operand > ours.operand:
                _refuse(ours, "has another adjoint", f"{_text(theirs)} is not its schedule again")
        elif not _is_adjoint(ours, theirs):
            _refuse(ours, "has another adjoint", f"{_text(theirs)} does not take it back")


def _is_adjoint(ours: Collective, theirs: Collective) -> bool:
    kinds = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
    if theirs.kind != kinds.get(ours.kind, ours.kind):
        return False
    if ours.node.target == theirs.node.target and splits(ours.node) != splits(theirs.node)[::-1]:
        return False
    return _shape(_operand(ours)) == _shape(theirs.node) or _unknown(theirs.node)


def _operand(collective: Collective) -> fx.Node:
    (operand, *_) = collective.node.all_input_nodes
    return operand


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(map(str, node.meta["val"].shape))


def _unknown(node: fx.Node) -> bool:
    """Whether the size is the data's own: then equal splits say it all."""
    return num_bytes(node.meta["val"]) is None


def _by_place(
    found: list[Collective], behind: set[fx.Node]
) -> tuple[dict[tuple[str, str], list[Collective]], dict[tuple[str, str], list[Collective]]]:
    """(layer, group) -> collectives, of the forward and of the backward."""
    parts: tuple[dict[tuple[str, str], list[Collective]], ...] = ({}, {})
    for c in found:
        parts[c.node in behind].setdefault((c.layer, c.group), []).append(c)
    return parts[0], parts[1]


def _differentiable(graph: fx.Graph, behind: set[fx.Node]) -> set[fx.Node]:
    """Nodes of the forward through which a gradient reaches an input that gets one."""
    inputs = [n for n in graph.nodes if n.op == "placeholder" and n not in behind]
    (output,) = (n for n in graph.nodes if n.op == "output")
    results = list(output.args[0])
    # One gradient, or None, for each input; the outputs of the forward come before them.
    grads = results[len(results) - len(inputs) :]
    found = {x for x, grad in zip(inputs, grads, strict=True) if grad is not None}
    for node in graph.nodes:
        if node not in behind and any(operand in found for operand in node.all_input_nodes):
            if any(x.is_floating_point() for x in _values(node)):
                found.add(node)
    return found


def _values(node: fx.Node) -> Iterator[Tensor]:
    value = node.meta.get("val")
    for x in value if isinstance(value, tuple | list) else [value]:
        if isinstance(x, torch.Tensor):
            yield x


def _text(collective: Collective) -> str:
    return f"{collective.kind} of {_shape(_operand(collective))}"


def _refuse(collective: Collective, what: str, why: str) -> None:
    raise WrongOnRanks(
        f"{_text(collective)} {what}",
        where=collective.layer,
        why=why,
        try_="this is a mistake of a pass; please report it",
    )
