"""What must hold for a graph on one rank of many, checked on the transformed graph. It refuses, naming the layer.

state       every recurrence starts from exchanged states, every short convolution has its halo, every attention
            has everybody's keys and its queries' offset
documents   where a layer was given cu_seqlens, its span map, state and offsets know them
router      what chooses experts has a gradient: the weights of every expert block depend on a parameter
order       `signature(gm)`: the collectives with their sizes, which must be equal on all ranks
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lmoe_compiler.errors import WrongOnRanks
from lmoe_compiler.passes.report import Report
from lmoe_compiler.passes.splice import layer_of
from lmoe_compiler.passes.token_axis import operator
from lmoe_compiler.runtime import capacity, collectives, dispatch, exchange, sequence
from lmoe_compiler.runtime.agreement import agree
from lmoe_compiler.runtime.mesh import Axis

COLLECTIVES = frozenset(
    {
        exchange.start,
        exchange.finish,
        sequence.start_counts,
        sequence.halo,
        sequence.gather_keys_values,
        sequence.tokens_to_heads,
        sequence.heads_to_tokens,
        sequence.sum_over_tokens,
        sequence.mean_over_tokens,
        sequence.cross_entropy,
        dispatch.send,
        dispatch.compute,
        dispatch.combine,
        capacity.send,
        capacity.compute,
        capacity.combine,
        capacity.dropped_rows,
        collectives.sum_gradient,
        collectives.sum_rows_gradient,
        collectives.global_sum,
    }
)


@dataclass(frozen=True)
class Verifier:
    """Checks the graph, and that all ranks of the axis have the same collectives in it."""

    axis: Axis
    sequence: bool
    name: str = "verifier"
    changes_numerics: bool = False

    def __call__(self, gm: fx.GraphModule) -> Report:
        if self.sequence:
            verify(gm)
        agree(signature(gm), self.axis)
        return Report(self.name)


def verify(gm: fx.GraphModule) -> None:
    """Raise WrongOnRanks at the first layer that would be wrong when its sequence is cut over ranks."""
    for node in gm.graph.nodes:
        name = operator(node)
        if name == "scan":
            _recurrence(node)
        elif name == "short_conv":
            _needs(node, 3, sequence.halo, "the last tokens of the rank before")
            _document_offsets(node, 2, sequence.shifted_documents)
        elif name == "attention":
            _attention(node)
        elif name == "experts" or node.target in (dispatch.combine, capacity.combine):
            _router(node)


def signature(gm: fx.GraphModule) -> str:
    """A hash of the collectives of a graph, in order, with the shapes of what they give."""
    lines = [f"{node.target.__name__} {_shapes(node)}{_even(node)}" for node in collectives_of(gm)]  # type: ignore[union-attr]
    # Symbols are numbered by each process as it likes.
    order: dict[str, str] = {}
    text = re.sub(
        r"\b[su]\d+\b", lambda m: order.setdefault(m[0], f"s{len(order)}"), "\n".join(lines)
    )
    return hashlib.sha256(text.encode()).hexdigest()


def collectives_of(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes that talk to other ranks, in the graph's order."""
    return (node for node in gm.graph.nodes if node.target in COLLECTIVES)


def _shapes(node: fx.Node) -> Any:
    value = node.meta.get("example_value")
    values = value if isinstance(value, tuple | list) else [value]
    return [tuple(map(str, x.shape)) for x in values if isinstance(x, Tensor)]


def _even(node: fx.Node) -> str:
    """Rows that a fixed capacity starts from, as compiled: all ranks need as many tokens."""
    if node.target is not capacity.send:
        return ""
    ids = node.args[1]
    assert isinstance(ids, fx.Node)
    rows = ids.meta["example_value"].numel()
    return f" of {getattr(getattr(rows, 'node', None), 'hint', rows)} rows"


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
    if not all(_comes_from(s, sequence.last_document, depth=8) for s in states):
        _refuse(node, "passes states over document boundaries", "its span map has no documents")


def _attention(node: fx.Node) -> None:
    """All tokens of some heads, or some queries with everybody's keys."""
    if all(_comes_from(x, sequence.tokens_to_heads, depth=0) for x in node.args[:3]):
        if not all(user.target is sequence.heads_to_tokens for user in node.users):
            _refuse(node, "gives tokens of other ranks", "its heads are not brought back")
        return
    for position in (1, 2):
        _needs(node, position, sequence.gather_keys_values, "keys and values of all ranks")
    _needs(node, 4, sequence.token_offset, "the place of its queries")


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


def _router(node: fx.Node) -> None:
    weights = node.args[1]
    assert isinstance(weights, fx.Node)
    # Compiled for evaluation, nothing has a gradient.
    if torch.is_grad_enabled() and not weights.meta["example_value"].requires_grad:
        _refuse(node, "has a router without a gradient", "its weights depend on no parameter")


def _comes_from(value: object, source: Any, depth: int = 3) -> bool:
    """Whether a value is made by `source`, a few nodes up."""
    level = {value} if isinstance(value, fx.Node) else set()
    for _ in range(depth + 1):
        if any(node.target is source for node in level):
            return True
        level = {operand for node in level for operand in node.all_input_nodes}
    return False


def _refuse(node: fx.Node, what: str, why: str) -> None:
    raise WrongOnRanks(
        f"{node.name} {what}",
        where=layer_of(node),
        why=why,
        try_="this is a mistake of a pass; please report it",
    )
