"""The body of a recurrence for one token as a graph: next states and output in terms of the incoming states.

For the decode step: one kernel reads the states, applies every micro-step and writes output and states.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmoe_compiler.ir.nodes import Node, Program, Read, Step, make, topological


def token_graph(program: Program) -> tuple[tuple[Node, ...], Node]:
    """(next states, output). Reads are inlined."""
    states: dict[str, Node] = {var.name: var.node for var in program.states}
    known: dict[Node, Node] = {}
    for item in program.body:
        if isinstance(item, Step):
            states[item.state] = _stepped(item, states[item.state], known)
        elif isinstance(item, Read):
            state = states[item.state]
            if item.vector is not None:
                (axis,) = item.vector.axes
                state = make("dot", _inlined(item.vector, known), state, axis=axis, loc=item.loc)
            known[item.node] = state
        else:
            incoming = known | {var.node: states[var.name] for var in program.states}
            values = [_inlined(value, incoming) for value in item.values]
            states |= dict(zip(item.states, values, strict=True))
    return tuple(states[var.name] for var in program.states), _inlined(program.output, known)


def _stepped(step: Step, state: Node, known: Mapping[Node, Node]) -> Node:
    """Decays, then all feedbacks and writes at once, each feedback reading before or after the decays."""
    decayed = state
    for decay in step.decays:
        decayed = make("mul", _inlined(decay.factor, known), decayed, loc=decay.loc)
    result = decayed
    for f in step.feedbacks:
        (axis,) = f.read.axes
        seen = state if f.point == "before" else decayed
        read = make("dot", _inlined(f.read, known), seen, axis=axis, loc=f.loc)
        value = make("mul", _inlined(f.scale, known), read, loc=f.loc)
        result = make("add", result, make("mul", _inlined(f.key, known), value), loc=f.loc)
    for w in step.writes:
        written = make("mul", _inlined(w.key, known), _inlined(w.value, known), loc=w.loc)
        result = make("add", result, written, loc=w.loc)
    return result


def _inlined(root: Node, known: Mapping[Node, Node]) -> Node:
    """`root` with reads and states replaced by what they are at this place of the body."""
    done: dict[Node, Node] = dict(known)
    for node in topological([root]):
        if node not in done:
            args = tuple(done[a] for a in node.args)
            same = all(x is y for x, y in zip(args, node.args, strict=True))
            done[node] = node if same else Node(node.op, args, node.attrs, node.loc)
    return done[root]
