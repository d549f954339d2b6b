"""What Triton's compiler refuses and its interpreter does not see: names used after the loop that wrote them."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterable


def out_of_scope(text: str) -> list[str]:
    """Names of a module's functions that no statement before them, in their block or around it, has written."""
    module = ast.parse(text)
    known = set(dir(builtins))
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef):
            known.add(node.name)
    found: list[str] = []
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            _block(node.body, known | {a.arg for a in node.args.args}, found)
    return found


def _block(body: Iterable[ast.stmt], known: set[str], found: list[str]) -> None:
    for statement in body:
        if isinstance(statement, ast.For):
            _read(statement.iter, known, found)
            _block(statement.body, known | _written(statement.target), found)
        elif isinstance(statement, ast.If):
            _read(statement.test, known, found)
            _block(statement.body, set(known), found)
            _block(statement.orelse, set(known), found)
        else:
            _read(statement, known, found)
            known |= _written(statement)


def _read(node: ast.AST, known: set[str], found: list[str]) -> None:
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
    found += [n.id for n in names if n.id not in known]


def _written(node: ast.AST) -> set[str]:
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return {n.id for n in names}
