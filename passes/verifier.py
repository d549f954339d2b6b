"""What must hold for a graph on one rank of many, checked on the transformed graph. It refuses, naming the layer.

state       every recurrence starts from exchanged states, every short convolution has its halo, every attention
            has everybody's keys and its queries' offset
documents   where a layer was given cu_seqlens it still is, and its span map, its map's resets, state and offsets
            know them
statistics  no sum, loss, count or position is left that knows this rank's tokens only; every collective talks over
            its axis's group for that kind of traffic; every parameter has its gradient summed over the ranks that
            hold it and other tokens
gradient    what a pass has put in gives, for autograd, a gradient to each operand that has one: to the router's
            weights at the combination of experts too
order       `signature(gm)`: the collectives with their sizes, which must be equal on all ranks

Sizes and order of what autograd makes of them are checked on the joint graph: adjoints.py.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmoe_compiler.errors import RanksDisagree, WrongOnRanks
from lmoe_compiler.passes import token_axis
from lmoe_compiler.passes.axes import Axes
from lmoe_compiler.passes.gradients import is_parameter
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import Editor, known_size, layer_of
from lmoe_compiler.runtime import attention, capacity, collectives, dispatch, exchange, sequence
from lmoe_compiler.runtime.agreement import agree, give_up

# Every call that talks to other ranks: over which of the axes (axes.py) it may, and the traffic whose group it uses.
COLLECTIVES: dict[Any, tuple[tuple[str, str], ...]] = {
    exchange.start: (("sequence", "state"),),
    exchange.finish: (("sequence", "state"),),
    sequence.start_counts: (("sequence", "numbers"), ("everyone", "numbers")),
    sequence.halo: (("sequence", "tokens"),),
    attention.start_lengths: (("sequence", "sizes"),),
    attention.gather_keys_values: (("sequence", "tokens"),),
    attention.tokens_to_heads: (("sequence", "tokens"),),
    attention.heads_to_tokens: (("sequence", "tokens"),),
    sequence.sum_over_tokens: (("everyone", "numbers"),),
    sequence.mean_over_tokens: (("everyone", "numbers"),),
    sequence.cross_entropy: (("everyone", "numbers"),),
    dispatch.send: (("experts", "experts"),),
    dispatch.compute: (("experts", "experts"),),
    dispatch.combine: (),
    capacity.check_rows: (("experts", "numbers"),),
    capacity.send: (("experts", "experts"),),
    capacity.compute: (("experts", "experts"),),
    capacity.combine: (),
    capacity.dropped_rows: (("everyone", "numbers"),),
    collectives.sum_gradient: (("summed", "gradients"), ("rest", "gradients"), ("heads", "tokens")),
    collectives.sum_rows_gradient: (("heads", "tokens"),),
    collectives.sum_copies_gradient: (("heads", "tokens"),),
    collectives.global_sum: (("heads", "tokens"),),
}

COMBINES = frozenset({dispatch.combine, capacity.combine})
# finish() carries the gradient of what start() sends, and of an end only the shape is used.
NO_GRADIENT = frozenset({exchange.start, sequence.reset_only})


@dataclass(frozen=True)
class Verifier:
    """Checks the graph, and that all ranks have the same collectives in it."""

    axes: Axes
    sequence_dim: int = 1
    name: str = "verifier"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        self.check(gm)
        text, (*axes,) = signature(gm), self.axes.agreeing
        while axes:
            try:
                agree(text, axes.pop(0))
            except RanksDisagree as error:
                for axis in axes:
                    give_up(error, axis)
                raise
        return Report(self.name)

    def check(self, gm: fx.GraphModule) -> None:
        """Raise WrongOnRanks at the first layer that would be wrong."""
        if self.axes.sequence:
            verify(gm)
        if self.axes.everyone:
            verify_statistics(gm, self.sequence_dim, cut=self.axes.sequence is not None)
        if self.axes.summed:
            self._parameters(gm)
        # Compiled for evaluation, nothing has a gradient.
        training = torch.is_grad_enabled()
        for node in gm.graph.nodes:
            if node.target in COLLECTIVES:
                self._group(node)
            if not training:
                continue
            if token_axis.operator(node) == "experts" or node.target in COMBINES:
                verify_router(node)
            if "lmoe" in node.meta and node.op.startswith("call"):
                _gradient(gm, node)

    def _group(self, node: fx.Node) -> None:
        assert callable(node.target)
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        if "group" not in bound.arguments:
            return
        given = bound.arguments["group"]
        right = {
            axis.groups[traffic]: traffic
            for name, traffic in COLLECTIVES[node.target]
            if (axis := getattr(self.axes, name))
        }
        if given not in right:
            known = " and ".join(f"{what} travel over {group!r}" for group, what in right.items())
            _refuse(
                node,
                "talks to the wrong ranks",
                f"its group is {given!r}, and {known or 'nothing is spread in this way'}",
            )

    def _parameters(self, gm: fx.GraphModule) -> None:
        """Replicated ones are summed over `summed`, experts over `rest`, besides what heads sum."""
        of_heads = self.axes.heads and self.axes.heads.groups["tokens"]
        for node in gm.graph.nodes:
            if node.op != "placeholder" or not is_parameter(node) or not node.users:
                continue
            own = bool(node.meta.get("lmoe_experts"))
            axis = self.axes.rest if own else self.axes.summed
            groups = {
                user.args[1] if user.target is collectives.sum_gradient else of_heads
                for user in node.users
            } - ({of_heads} if axis is None else set())
            if axis is None and groups:
                _refuse(
                    node,
                    "has its gradient summed",
                    "experts of this rank have had the tokens of all ranks already",
                )
            if axis is not None and groups != {axis.groups["gradients"]}:
                _refuse(
                    node,
                    "keeps a gradient of this rank's tokens",
                    f"it does not pass sum_gradient over axis {axis.name!r}",
                )


def verify(gm: fx.GraphModule) -> None:
    """Every layer that mixes tokens has what it needs from other ranks, and knows its documents."""
    for node in gm.graph.nodes:
        name = token_axis.operator(node)
        if node.meta.get("lmoe_documents") and token_axis.documents_of(node) is None:
            _refuse(node, "has lost its documents", "it was given cu_seqlens, and no longer is")
        if name == "scan":
            _recurrence(node)
        elif name == "short_conv":
            _needs(node, 3, sequence.halo, "the last tokens of the rank before")
            _document_offsets(node, 2, sequence.shifted_documents)
        elif name == "attention":
            _attention(node)
        elif node.target is sequence.shift:
            _needs(node, 1, sequence.halo, "the last tokens of the rank before")
        elif node.target is sequence.halo:
            _long_enough(node)


def verify_router(node: fx.Node) -> None:
    """The weights of an expert block have a gradient where its tokens do."""
    weights, *others = (n.meta["example_value"] for n in (node.args[1], node.args[0]))  # type: ignore[union-attr]
    if any(x.requires_grad for x in others) and not weights.requires_grad:
        _refuse(node, "has a router without a gradient", "its weights depend on no parameter")


def verify_statistics(gm: fx.GraphModule, sequence_dim: int, cut: bool = True) -> None:
    """What is left of the user's own nodes may not reduce over tokens, count them or, where a sequence is `cut`,
    number them.
    """
    left = token_axis.analyse(gm, sequence_dim, cut)
    losses = [n for n in left.losses if not left.in_(n.meta["example_value"])]
    for node in (*left.reductions, *left.counts, *losses):
        _refuse(node, "is a number of this rank's tokens", "it is not reduced over the ranks")
    for node in left.shifts:
        _refuse(node, "lacks the last tokens of the rank before", "it shifts this rank's alone")
    for node in left.positions:
        if not all(_is_moved(user) for user in node.users):
            _refuse(node, "counts from this rank's first token", "it lacks the shard's offset")


def _is_moved(user: fx.Node) -> bool:
    return user.target is operator.add and _comes_from(user.args[1], sequence.token_offset, 0)


def signature(gm: fx.GraphModule) -> str:
    """A line for each collective of a graph, in order: layer, name, and the shapes of what it gives."""
    lines = [
        f"{layer_of(n)} {n.target.__name__} {_shapes(n)}{_even(n)}"  # type: ignore[union-attr]
        for n in collectives_of(gm)
    ]
    # Symbols are numbered by each process as it likes.
    order: dict[str, str] = {}
    return re.sub(
        r"\b[su]\d+\b", lambda m: order.setdefault(m[0], f"s{len(order)}"), "\n".join(lines)
    )


def collectives_of(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes that talk to other ranks, in the graph's order."""
    return (node for node in gm.graph.nodes if node.target in COLLECTIVES)


def _shapes(node: fx.Node) -> Any:
    return [tuple(map(str, x.shape)) for x in _tensors(node.meta.get("example_value"))]


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, tuple | list) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def _even(node: fx.Node) -> str:
    """Rows that a fixed capacity starts from, as compiled: all ranks need as many tokens."""
    if node.target is not capacity.send:
        return ""
    ids = node.args[1]
    assert isinstance(ids, fx.Node)
    return f" of {known_size(ids.meta['example_value'].numel())} rows"


def _recurrence(node: fx.Node) -> None:
    states, documents = node.args[2], node.args[3]
    assert isinstance(states, tuple | list)
    if not states or not all(_comes_from(s, exchange.finish) for s in states):
        _refuse(node, "starts from zero on every rank", "its states are not exchanged")
    if documents is None:
        return
    _document_offsets(node, 3, sequence.local_documents)
    if not all(_comes_from(s, sequence.place) for s in states):
        _refuse(node, "gives every document the state of the rank before", "it is not placed")
    exchanged = next(n for s in states for n in _up(s, 3) if n.target is exchange.finish)
    axes, summaries = exchanged.args[3], exchanged.args[1]
    assert isinstance(axes, tuple)
    assert isinstance(summaries, tuple | list)
    maps, ends = summaries[: -len(axes)], summaries[-len(axes) :]
    if len(maps) < len(axes) or not all(
        isinstance(m, fx.Node) and m.target in (sequence.reset, sequence.reset_only) for m in maps
    ):
        _refuse(node, "passes states over document boundaries", "its maps are not reset")
    if not all(_comes_from(e, sequence.last_document, depth=5) for e in ends):
        _refuse(node, "passes states over document boundaries", "its span map has no documents")


def _long_enough(node: fx.Node) -> None:
    checks = (n for n in node.graph.nodes if n.target is sequence.check_history)
    if all(check.args[1] != node.args[1] for check in checks):
        _refuse(node, "may look further back than the rank before", "no rank's tokens are counted")


def _attention(node: fx.Node) -> None:
    """All tokens of some heads, or some queries with everybody's keys."""
    if all(_comes_from(x, attention.tokens_to_heads, depth=0) for x in node.args[:3]):
        if not all(user.target is attention.heads_to_tokens for user in node.users):
            _refuse(node, "gives tokens of other ranks", "its heads are not brought back")
        return
    for position in (1, 2):
        _needs(node, position, attention.gather_keys_values, "keys and values of all ranks")
    _needs(node, 4, sequence.token_offset, "the place of its queries")


def _gradient(gm: fx.GraphModule, node: fx.Node) -> None:
    """Autograd gets from what the node gives to each operand with a gradient."""
    given = node.meta["example_value"]
    if node.target in NO_GRADIENT or not any(x.is_floating_point() for x in _tensors(given)):
        return
    if _unreached(node, given):
        # A later pass may have put something between an operand and it: then its value is an old one.
        for operand in _unreached(node, Editor(gm, "verifier").value(node)):
            _refuse(
                node,
                f"gives no gradient to {operand.name}",
                "what the pass does there is not differentiable",
            )


def _unreached(node: fx.Node, given: Any) -> list[fx.Node]:
    """Operands with a gradient that none of what the node gives leads to."""
    functions = _autograd(_tensors(given))
    return [
        operand
        for operand in node.all_input_nodes
        for x in _tensors(operand.meta["example_value"])
        if x.requires_grad and not functions & _ends(x)
    ]


def _ends(x: Tensor) -> set[Any]:
    """Where a gradient of x goes: its function, or what accumulates it."""
    if x.grad_fn is not None:
        return {x.grad_fn}
    return {torch.autograd.graph.get_gradient_edge(x).node}


def _autograd(values: list[Tensor]) -> set[Any]:
    """All functions that a gradient of the values reaches."""
    waiting = [x.grad_fn for x in values if x.grad_fn is not None]
    found: set[Any] = set(waiting)
    while waiting:
        for function, _ in waiting.pop().next_functions:
            if function is not None and function not in found:
                found.add(function)
                waiting.append(function)
    return found


def _needs(node: fx.Node, position: int, source: Any, what: str) -> None:
    value = node.args[position] if position < len(node.args) else None
    if not _comes_from(value, source):
        _refuse(
            node, f"lacks {what}", f"its argument {position} does not come from {source.__name__}"
        )


def _document_offsets(node: fx.Node, position: int, source: Any) -> None:
    value = node.args[position] if position < len(node.args) else None
    if value is not None and not _comes_from(value, source):
        _refuse(node, "has offsets of the whole sequence", f"they did not pass {source.__name__}")


def _comes_from(value: object, source: Any, depth: int = 3) -> bool:
    """Whether a value is made by `source`, a few nodes up."""
    return any(node.target is source for node in _up(value, depth))


def _up(value: object, depth: int) -> Iterator[fx.Node]:
    """The node, its operands, theirs, ..., nearest first."""
    level = {value} if isinstance(value, fx.Node) else set()
    for _ in range(depth + 1):
        yield from level
        level = {operand for node in level for operand in node.all_input_nodes}


def _refuse(node: fx.Node, what: str, why: str) -> None:
    raise WrongOnRanks(
        f"{node.name} {what}",
        where=layer_of(node),
        why=why,
        try_="this is a mistake of a pass; please report it",
    )
