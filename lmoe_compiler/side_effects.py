"""A step that writes outside itself is refused by reading its bytecode: tracing would run it once, not per token."""

from __future__ import annotations

import dis
import linecache
from collections.abc import Callable
from typing import Any

from lmoe_compiler.errors import SideEffect

WRITES = {
    "STORE_GLOBAL": "assigns the global {}",
    "DELETE_GLOBAL": "deletes the global {}",
    "STORE_ATTR": "assigns the attribute .{}",
}
MUTATORS = {"append", "extend", "insert", "update", "setdefault", "write"}


def refuse_side_effects(step: Callable[..., Any]) -> None:
    """Raise SideEffect if the step assigns globals, nonlocals or attributes, prints, or grows a container."""
    code = step.__code__
    outer = set(code.co_freevars)
    line = code.co_firstlineno
    for instruction in dis.get_instructions(code):
        line = (instruction.positions and instruction.positions.lineno) or line
        name, arg = instruction.opname, instruction.argval
        if name in WRITES:
            _refuse(step, WRITES[name].format(arg), line)
        if name == "STORE_DEREF" and arg in outer:
            _refuse(step, f"assigns {arg!r} of the enclosing function", line)
        if name in ("LOAD_METHOD", "LOAD_ATTR") and arg in MUTATORS:
            _refuse(step, f"calls .{arg}(...)", line)
        if name == "LOAD_GLOBAL" and arg == "print":
            _refuse(step, "prints", line)


def _refuse(step: Callable[..., Any], what: str, line: int) -> None:
    file = step.__code__.co_filename
    raise SideEffect(
        f"{step.__name__} {what}", where=f"{file}:{line}\n{linecache.getline(file, line).strip()}",
        why="the step runs on stand-ins while it is compiled; an effect would happen then, not once per token",
        try_="return S, o   # everything that leaves a step is returned by it",
    )  # fmt: skip
