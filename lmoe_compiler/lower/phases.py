"""How a chunk graph is run over many chunks: everything batched over chunks, but for short loops over what is carried.

`Carry(leaf, following)` is a value handed from chunk to chunk: `following`, computed in one chunk, is the next
chunk's `leaf` (states go forward, their gradients backward). Each carry has a loop of its own over the few
nodes between leaf and following; all others are evaluated for all chunks at once, with batch dimensions [N, B, H].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lmoe_compiler.ir.interpret import Value, apply_op
from lmoe_compiler.ir.nodes import Node, topological
from lmoe_compiler.lower.hoist import dependent
from lmoe_compiler.lower.ops import RULES, decayed_gradients, siblings

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
class Phase:
    """Nodes evaluated for all chunks, then the loop of a carry. `dead[i]` are not needed after node i."""

    order: tuple[Node, ...]
    dead: tuple[tuple[Node, ...], ...]
    carry: Carry | None


@dataclass(frozen=True)
class Phases:
    """Carries in an order in which each depends on earlier ones only, and the values wanted of every chunk."""

    carries: tuple[Carry, ...]
    roots: tuple[Node, ...]

    @cached_property
    def gates(self) -> dict[Node, Node]:
        """The decayed_gate in whose pass another gradient of the same product is found."""
        wanted = [*self.roots, *(carry.following for carry in self.carries)]
        gates = [node for node in topological(wanted) if node.op == "decayed_gate"]
        return {sibling: gate for gate in gates for sibling in siblings(gate)}

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        known: set[Node] = set()
        parts: list[tuple[list[Node], Carry | None]] = []
        for carry in (*self.carries, None):
            wanted = self.roots if carry is None else carry.frontier
            order = _needed(wanted, known | {c.leaf for c in self.carries}, self.gates)
            known.update(order)
            parts.append((order, carry))
        return tuple(reversed(list(_with_deaths(parts, set(self.roots)))))

    def run(
        self, env: Env, ends: Mapping[Node, Tensor], sizes: Mapping[str, int]
    ) -> tuple[list[Value], dict[Node, Tensor]]:
        """Roots, and each carry's value after its last chunk. `env` has the other leaves; `ends` the first values."""
        finals: dict[Node, Tensor] = {}
        like = next(iter(env.values())).tensor
        for phase in self.phases:
            for node, dead in zip(phase.order, phase.dead, strict=True):
                args = [env[a] for a in node.args]
                if node.op == "decayed_gate":
                    pass_ = decayed_gradients(node, args)
                    env.update(zip((*siblings(node), node), pass_, strict=True))
                elif node not in self.gates and node.op != "input":
                    env[node] = apply_op(node, args, sizes, like, RULES)
                for done in dead:
                    del env[done]
            if phase.carry is not None:
                leaf = phase.carry.leaf
                entries, finals[leaf] = loop(phase.carry, env, ends[leaf], sizes)
                env[leaf] = Value(entries, leaf.axes)
        return [env[root] for root in self.roots], finals


def _with_deaths(
    parts: Sequence[tuple[list[Node], Carry | None]], alive: set[Node]
) -> Iterator[Phase]:
    """The phases, last first, with what dies at each node: nothing later uses it."""
    for order, carry in reversed(parts):
        if carry is not None:
            alive.update(carry.frontier)
        dead: list[tuple[Node, ...]] = []
        for node in reversed(order):
            dying = tuple(a for a in dict.fromkeys((*node.args, node)) if a not in alive)
            alive.update(dying)
            dead.append(tuple(a for a in dying if a.op != "input"))
        yield Phase(tuple(order), tuple(reversed(dead)), carry)


def _needed(roots: Sequence[Node], known: set[Node], after: Mapping[Node, Node]) -> list[Node]:
    """What must be evaluated for `roots`, operands first (and what a node comes `after`), nothing below `known`."""
    order: list[Node] = []
    seen = set(known)
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))
            if node in after:
                stack.append((after[node], False))
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
