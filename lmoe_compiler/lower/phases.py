"""How a chunk graph is run over many chunks: everything batched over chunks, but for short loops over what is carried.

`Carry(leaf, following)` is a value handed from chunk to chunk: `following`, computed in one chunk, is the next
chunk's `leaf` (states go forward, their gradients backward). Each carry has a loop of its own over the few
nodes between leaf and following; all others are evaluated for all chunks at once, with batch dimensions [N, B, H].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmoe_compiler.ir.interpret import Value, apply_op
from lmoe_compiler.ir.nodes import Node, topological
from lmoe_compiler.lower.hoist import dependent
from lmoe_compiler.lower.ops import RULES

Env = dict[Node, Value]
CHUNKS = "chunks"


@dataclass(frozen=True)
class Carry:
    """A value handed from chunk to chunk."""

    leaf: Node
    following: Node
    reverse: bool = False

    @cached_property
    def body(self) -> tuple[Node, ...]:
        """The nodes of the loop, in order."""
        inside = dependent([self.following], self.leaf)
        return tuple(n for n in topological([self.following]) if n in inside and n != self.leaf)

    @cached_property
    def frontier(self) -> tuple[Node, ...]:
        """What the loop reads of each chunk."""
        inside = {*self.body, self.leaf}
        if self.following not in inside:
            return (self.following,)
        return tuple(dict.fromkeys(a for n in self.body for a in n.args if a not in inside))


@dataclass(frozen=True)
class Phases:
    """Carries in an order in which each depends on earlier ones only, and the values wanted of every chunk."""

    carries: tuple[Carry, ...]
    roots: tuple[Node, ...]

    @cached_property
    def _order(self) -> dict[tuple[Node, ...], tuple[Node, ...]]:
        return {}

    def run(
        self, env: Env, ends: Mapping[Node, Tensor], sizes: Mapping[str, int]
    ) -> tuple[list[Value], dict[Node, Tensor]]:
        """Roots, and each carry's value after its last chunk. `env` has the other leaves; `ends` the first values."""
        finals: dict[Node, Tensor] = {}
        for carry in self.carries:
            self._evaluate(carry.frontier, env, sizes)
            entries, finals[carry.leaf] = loop(carry, env, ends[carry.leaf], sizes)
            env[carry.leaf] = Value(entries, carry.leaf.axes)
        self._evaluate(self.roots, env, sizes)
        return [env[root] for root in self.roots], finals

    def _evaluate(self, roots: tuple[Node, ...], env: Env, sizes: Mapping[str, int]) -> None:
        if roots not in self._order:
            self._order[roots] = tuple(_needed(roots, env))
        like = next(iter(env.values())).tensor
        for node in self._order[roots]:
            env[node] = apply_op(node, [env[a] for a in node.args], sizes, like, RULES)


def _needed(roots: Sequence[Node], env: Env) -> list[Node]:
    """What must be evaluated for `roots`, operands first, nothing below what is there already."""
    order: list[Node] = []
    seen = set(env)
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))
    return order


def loop(carry: Carry, env: Env, start: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    """Entry values of all chunks [N, B, H, *axes] and the last one's result, from `start` [B, H, *axes]."""
    chunks, batch = sizes[CHUNKS], start.shape[:2]
    known = {node: _per_chunk(env[node], chunks, batch) for node in carry.frontier}
    now = start
    entries = start.new_empty(chunks, *start.shape)
    axes, like = carry.leaf.axes, start
    for n in reversed(range(chunks)) if carry.reverse else range(chunks):
        entries[n] = now
        values = {node: Value(x[n], x_axes) for node, (x, x_axes) in known.items()}
        values[carry.leaf] = Value(now, axes)
        for node in carry.body:
            values[node] = apply_op(node, [values[a] for a in node.args], sizes, like, RULES)
        now = values[carry.following].to(axes).expand_as(start)
    return entries, now


def _per_chunk(value: Value, chunks: int, batch: Sequence[int]) -> tuple[Tensor, tuple[str, ...]]:
    """[N, B, H, *axes] in full, so that one chunk is one contiguous block."""
    own = value.tensor.shape[value.tensor.dim() - len(value.axes) :]
    return torch.broadcast_to(value.tensor, (chunks, *batch, *own)).contiguous(), value.axes
