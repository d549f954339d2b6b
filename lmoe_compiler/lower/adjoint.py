"""The adjoint of a chunk program: reverse mode over its nodes, by the vjp column of the table in ops.py.

In: the chunk program. Out: gradients of inputs and entry states as expressions over the forward's nodes, `d.o` and
`d.STATE`. The decay's gradients come out local to the chunk. `solve` stays one op. Run by execute.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lmoe_compiler.ir.nodes import ROW, Node, input_, topological
from lmoe_compiler.lower import algebra as al
from lmoe_compiler.lower.ops import VJP
from lmoe_compiler.lower.program import ChunkAdjoint, ChunkProgram, gradient_name

OUTPUT = "o"


def adjoint(chunk: ChunkProgram) -> ChunkAdjoint:
    program = chunk.program
    output = (ROW, *(a for a in program.output.axes if a != ROW))
    seeds = {chunk.output: al.interned(input_(gradient_name(OUTPUT), output))}
    for var, exit_ in zip(program.states, chunk.next_states, strict=True):
        seed = al.interned(input_(gradient_name(var), var.axes))
        seeds[exit_] = al.add(seeds[exit_], seed) if exit_ in seeds else seed
    inputs = [
        al.interned(input_(v.name, (ROW, *v.axes) if v.kind == "token" else v.axes))
        for v in program.inputs
    ]
    states = [al.interned(var.node) for var in program.states]
    gradients = pull_back(seeds, [*inputs, *states])
    return ChunkAdjoint(chunk, gradients[: len(inputs)], gradients[len(inputs) :])


def pull_back(seeds: Mapping[Node, Node], leaves: Iterable[Node]) -> tuple[Node, ...]:
    """Gradients of `leaves`, given those (`seeds`) of some nodes above them."""
    leaves = list(leaves)
    order = list(topological(seeds))
    live = set(leaves)
    for node in order:
        if any(arg in live for arg in node.args):
            live.add(node)
    gradients: dict[Node, Node] = {}
    for node, seed in seeds.items():
        gradients[node] = al.sum_to(seed, seed.axes, node.axes)
    for node in reversed(order):
        if node not in live or not node.args or node not in gradients:
            continue
        for arg, d in zip(node.args, VJP[node.op](node, gradients[node]), strict=True):
            if d is not None and arg in live:
                to_arg = al.sum_to(d, _reach(node, arg, d), arg.axes)
                gradients[arg] = al.add(gradients.get(arg, al.ZERO), to_arg)
    return tuple(gradients.get(leaf, al.ZERO) for leaf in leaves)


def _reach(node: Node, arg: Node, d: Node) -> tuple[str, ...]:
    """The axes over which `d`, one operand's gradient, is meant: a pointwise result's own, else those it shows."""
    if node.op in (
        "dot",
        "sum",
        "max",
        "rename",
        "index",
        "segment",
        "solve",
    ) or node.op.startswith("decayed"):
        return d.axes
    return tuple(dict.fromkeys((*node.axes, *d.axes)))
