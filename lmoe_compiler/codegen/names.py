"""Names of a program that a kernel can use as they are: a user may call an input `o`, `T` or `tl`.

Kernels have names of their own (the output, lengths, block sizes, program indices) and one for the gradient of
every input, `d` before it. What collides with one of them gets another name in the kernel.
"""

from __future__ import annotations

import itertools
import keyword
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from lmoe_compiler.codegen.statements import DEVICE_FUNCTIONS
from lmoe_compiler.ir.nodes import Next, Node, Program, Read, Step, Var, substitute

RESERVED = frozenset(
    "o T N H C TOKENS SEGMENTS LEVELS DOT PRECISION INVERSE SPLIT NEAR FAR PROGRAMS SPAN T_0 T_ALL tl triton range"
    " cu_seqlens bos start level".split()
).union(DEVICE_FUNCTIONS)
GRADIENT = "do"
PREFIXED = re.compile(
    r"([biomn]|sum)_\w+"
    r"|\w+_(start|end|entry|exit|into|out|replayed|kept|sum|factor|decay|matrix|map|from|columns|dim|\d+)"
)


def identifier(name: str) -> str:
    """A Python name for an IR name: `d.o` -> `do`, `K'` -> `K_1`."""
    return re.sub(r"\W", "_", name.replace("d.", "d").replace("'", "_1"))


def axis_name(axis: str) -> str:
    """A Python name for an axis: its own, unless a kernel may use that, or `B`, `i_`, `o_` before it, for another."""
    name = identifier(axis)
    own = name[0].isupper() and name[0] != "B" and name not in RESERVED
    return name if own else f"{name}_dim"


@cache
def printable(program: Program) -> Program:
    """The program with its inputs and states renamed where a kernel needs the name."""
    variables = (*program.states, *program.inputs)
    axes = {axis_name(axis.rstrip("'")) for var in variables for axis in var.axes}
    reads = {item.name for item in program.body if isinstance(item, Read)}
    taken = RESERVED | axes | {f"B{axis}" for axis in axes} | reads
    renamed: dict[str, str] = {}
    for var in variables:
        used = taken | {GRADIENT, *renamed.values(), *(f"d{name}" for name in renamed.values())}
        renamed[var.name] = next(
            name
            for name in _candidates(var.name)
            if not _collides(name, used) and f"d{name}" not in used
        )
    if all(old == new for old, new in renamed.items()):
        return program
    values = {var.node: _named(var, renamed).node for var in variables}
    return _substituted(program, values, renamed)


def _candidates(name: str) -> Iterator[str]:
    yield name
    yield f"{name}_"
    for count in itertools.count(1):
        yield f"user_{name}{'_' * count}"


def _collides(name: str, taken: frozenset[str] | set[str]) -> bool:
    return name in taken or keyword.iskeyword(name) or PREFIXED.fullmatch(name) is not None


def _named(var: Var, renamed: dict[str, str]) -> Var:
    return replace(var, name=renamed[var.name])


def _substituted(program: Program, values: dict[Node, Node], renamed: dict[str, str]) -> Program:
    def new(node: Node) -> Node:
        return substitute(node, values)

    body: list[Step | Next | Read] = []
    for item in program.body:
        if isinstance(item, Read):
            vector = None if item.vector is None else new(item.vector)
            body.append(replace(item, state=renamed[item.state], vector=vector))
        elif isinstance(item, Next):
            states = tuple(renamed[name] for name in item.states)
            body.append(replace(item, states=states, values=tuple(map(new, item.values))))
        else:
            body.append(
                replace(
                    item,
                    state=renamed[item.state],
                    decays=tuple(
                        replace(d, factor=new(d.factor), log=None if d.log is None else new(d.log))
                        for d in item.decays
                    ),
                    feedbacks=tuple(
                        replace(f, key=new(f.key), scale=new(f.scale), read=new(f.read))
                        for f in item.feedbacks
                    ),
                    writes=tuple(
                        replace(w, key=new(w.key), value=new(w.value)) for w in item.writes
                    ),
                )
            )
    return replace(
        program,
        states=tuple(_named(var, renamed) for var in program.states),
        inputs=tuple(_named(var, renamed) for var in program.inputs),
        body=tuple(body),
        output=new(program.output),
        bounds=tuple(replace(b, name=renamed[b.name]) for b in program.bounds),
    )
