"""Every stage of one recurrence as text: what `r.explain()`, `lmoe.explain` and LMOE_DEBUG print.

A stage is (title, text). Nothing is computed here: each level prints itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from lmoe_compiler.analysis.report import Proved
from lmoe_compiler.config import Options, environment
from lmoe_compiler.debug import heading, show
from lmoe_compiler.errors import ImplementationUnavailable
from lmoe_compiler.implementation import TRITON, choose, kernels_or_reason
from lmoe_compiler.ir.nodes import Node, Program, topological
from lmoe_compiler.ir.text import print_program
from lmoe_compiler.lower.adjoint import adjoint
from lmoe_compiler.lower.chunk import NoChunkForm, chunk_program
from lmoe_compiler.lower.program import ChunkProgram

Stage = tuple[str, str]


def of_program(program: Program) -> list[Stage]:
    """What does not depend on a call: IR, proofs, chunk program and its adjoint."""
    stages = [("recurrence IR", print_program(program)), ("analysis", str(Proved(program)))]
    try:
        chunk = chunk_program(program)
    except NoChunkForm as reason:
        return [*stages, ("chunk program", f"none, runs token by token: {reason}")]
    return [*stages, ("chunk program", _forward(chunk)), ("adjoint", _backward(chunk))]


def of_call(program: Program, inputs: Sequence[Tensor], options: Options) -> list[Stage]:
    """What these arguments add: who runs the call, and the generated kernels if it is they."""
    try:
        run = choose("scan", program, inputs, options)
    except ImplementationUnavailable as error:
        return [("implementation", str(error))]
    page = ("implementation", f"{run.__module__} on {inputs[0].device}, {options.text or 'auto'}")
    kernels = kernels_or_reason("report", program, inputs, options)
    if run.__module__ != TRITON or isinstance(kernels, str):
        return [page]
    return [page, ("kernels", kernels.report(program, inputs, options))]


def source(program: Program, inputs: Sequence[Tensor], options: Options) -> str:
    """The generated kernels of a call; raises where there are none."""
    kernels = kernels_or_reason("source", program, inputs, options)
    if isinstance(kernels, str):
        raise ImplementationUnavailable(
            f"there are no generated kernels for this call of {program.name}",
            why=kernels,
            try_="print(r.explain()) for the stages above the kernels",
        )
    return str(kernels.source(program, inputs, None, None, options))


def announce(program: Program) -> None:
    """Print the stages that LMOE_DEBUG asks for; called once for each program that is used."""
    sections = {"recurrence IR": "ir", "analysis": "analysis"}
    if environment().debug & {"ir", "analysis", "chunk"}:
        for title, text in of_program(program):
            show(sections.get(title, "chunk"), f"{program.name}, {title}", partial(str, text))


def render(stages: Sequence[Stage]) -> str:
    return "\n\n".join(f"{heading(title)}\n{text.rstrip()}" for title, text in stages)


def _forward(chunk: ChunkProgram) -> str:
    names = [f"next {var.name}" for var in chunk.program.states]
    return listing([*chunk.next_states, chunk.output], [*names, "output"])


def _backward(chunk: ChunkProgram) -> str:
    back = adjoint(chunk)
    names = [f"d {var.name}" for var in (*chunk.program.inputs, *chunk.program.states)]
    return listing([*back.input_grads, *back.state_grads], names)


def listing(roots: Sequence[Node], names: Sequence[str]) -> str:
    """A shared expression graph, one operation a line with its axes."""
    labels: dict[Node, str] = {}
    lines: list[str] = []
    for node in topological(roots):
        if node.op in ("input", "const", "size", "delta"):
            labels[node] = _leaf(node)
            continue
        labels[node] = f"x{len(lines) + 1}"
        flags = [f"{k}={v}" for k, v in node.attrs]
        text = f"{node.op}({', '.join([*(labels[a] for a in node.args), *flags])})"
        line = f"  # {node.loc}" if node.loc else ""
        lines.append(f"{labels[node]:<5}[{', '.join(node.axes)}] = {text}{line}")
    results = [f"{name} = {labels[root]}" for name, root in zip(names, roots, strict=True)]
    return "\n".join([*lines, *results])


def _leaf(node: Node) -> str:
    if node.op == "const":
        return f"{node['value']:g}"
    return (
        node.name
        if node.op == "input"
        else f"{node.op}({', '.join(str(v) for _, v in node.attrs)})"
    )
