"""What of a chunk program runs for all chunks at once, and what inside the loop over chunks.

Only what lies between the carried state and its next value waits for the chunk before. Forward is
  free   (no state)          all chunks at once
  chain  (state -> state)    chunk after chunk; every chunk's entry state is kept
  rest   (uses the state)    all chunks at once, given the entry states
and backward the same with the carried gradients, from the last chunk to the first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, input_, make, topological
from lmoe_compiler.lower import algebra as al
from lmoe_compiler.lower.adjoint import adjoint
from lmoe_compiler.lower.chunk import build
from lmoe_compiler.lower.program import gradient_name


@dataclass(frozen=True)
class Loop:
    """One scan over chunks.

    carried     leaves that hold the carried values
    following   their values after the chunk
    bounds      nodes that `following` needs and that are known for all chunks before the loop
    """

    carried: tuple[Node, ...]
    following: tuple[Node, ...]
    bounds: tuple[Node, ...]


@dataclass(frozen=True)
class Schedule:
    forward: Loop
    output: Node
    backward: Loop
    input_grads: tuple[Node, ...]


@functools.cache
def schedule(program: Program) -> Schedule | None:
    """The schedule of a program that has a chunk form, else None."""
    chunk = build(program)
    if chunk is None:
        return None
    back = adjoint(chunk)
    states = [v.node for v in program.states]
    gradients = [input_(gradient_name(v), v.axes) for v in program.states]
    roots = [chunk.output, *chunk.next_states, *back.input_grads, *back.state_grads]
    output, *rest = _with_inverses(roots, frozenset(states + gradients))
    count, inputs = len(states), len(program.inputs)
    following, grads, entering = rest[:count], rest[count : count + inputs], rest[count + inputs :]
    return Schedule(_loop(states, following), output, _loop(gradients, entering), tuple(grads))


def _loop(carried: Sequence[Node], following: Sequence[Node]) -> Loop:
    """`bounds` are the largest nodes below `following` that depend on nothing carried."""
    depends = depending(following, frozenset(carried))
    bounds: dict[Node, None] = {}
    for node in topological(following):
        if node in depends:
            bounds.update((a, None) for a in node.args if a not in depends)
    bounds.update((n, None) for n in following if n not in depends)
    return Loop(tuple(carried), tuple(following), tuple(bounds))


def depending(roots: Iterable[Node], leaves: frozenset[Node]) -> set[Node]:
    """Nodes below `roots` that depend on one of `leaves`."""
    found: set[Node] = set()
    for node in topological(roots):
        if node in leaves or any(a in found for a in node.args):
            found.add(node)
    return found


def _with_inverses(roots: list[Node], carried: frozenset[Node]) -> list[Node]:
    """Solves whose right side waits for a carried value: products with an inverse made before."""
    waiting = depending(roots, carried)
    done: dict[Node, Node] = {}
    for node in topological(roots):
        args = tuple(done[a] for a in node.args)
        lower_is_free = node.op == "solve" and node in waiting and node.args[0] not in waiting
        if lower_is_free:
            identity = make("delta", a=ROW, b=SOURCE)
            inverse = make("solve", args[0], identity, transposed=False)
            if node["transposed"]:
                done[node] = al.rename(al.dot(inverse, args[1], ROW), SOURCE, ROW)
            else:
                done[node] = al.dot(inverse, al.as_source(args[1]), SOURCE)
        else:
            done[node] = Node(node.op, args, node.attrs, node.loc) if args else node
    return [done[root] for root in roots]
