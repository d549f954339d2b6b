"""Symbols for the lengths of dims, and what torch assumed of them while a step was traced.

Each dim is a symbol of a ShapeEnv of our own with a prime hint that no other has, so K and V cannot be confused and
numbers computed from sizes (`q.shape[0] ** -0.5`) stay expressions. Used by recorder.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
from torch import SymBool, SymFloat, SymInt
from torch._guards import GuardSource, Source
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from lmoe_compiler.errors import MixedDims
from lmoe_compiler.ir.nodes import Loc, Node, Var, const, make
from lmoe_compiler.ir.spec import base
from lmoe_compiler.operations import Axis, NoMeaning, another

PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


class _DimSource(Source):
    """Where a symbol comes from, for ShapeEnv's messages (Dynamo's own sources import all of Dynamo)."""

    def __init__(self, dim: str) -> None:
        self.dim = dim

    @property
    def guard_source(self) -> GuardSource:
        return GuardSource.CONSTANT

    @property
    def _name_template(self) -> str:
        return self.dim


class Sizes:
    """The symbols of the dims, and what torch assumed of them."""

    def __init__(self, variables: Sequence[Var], static: Mapping[str, int]) -> None:
        self.env = ShapeEnv(duck_shape=False)
        self.static = static
        self.of: dict[str, int | SymInt] = dict(static)
        self.names: dict[str, str] = {}
        primes = iter(PRIMES)
        for dim in dict.fromkeys(base(a) for v in variables for a in v.axes):
            if dim not in static:
                source, hint = _DimSource(dim), next(primes)
                symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
                self.names[str(symbol)] = dim
                self.of[dim] = self.env.create_symintnode(symbol, hint=hint, source=source)

    def axis(self, size: int | SymInt) -> str | None:
        """The dim of a size; None for 1."""
        if isinstance(size, SymInt):
            text = str(size.node.expr)
            if text not in self.names:
                raise NoMeaning(f"a tensor of size {self.spell(text)}")
            return self.names[text]
        if size == 1:
            return None
        dims = [dim for dim, length in self.static.items() if length == size]
        if len(dims) != 1:
            raise NoMeaning(f"a tensor of the fixed size {size}")
        return dims[0]

    def axes(self, shape: Sequence[int | SymInt]) -> tuple[Axis, ...]:
        """Distinct names for the dimensions of a tensor."""
        names: list[Axis] = []
        for axis in map(self.axis, shape):
            names.append(axis if axis is None else another(axis, names))
        return tuple(names)

    def spell(self, text: str) -> str:
        """Torch's names of the symbols replaced by the dims'."""
        for symbol, dim in self.names.items():
            text = text.replace(symbol, dim)
        return text

    def number(self, value: Any, loc: Loc | None) -> Node:
        """A Python number, possibly computed from sizes, as an expression."""
        if isinstance(value, (SymInt, SymFloat, SymBool)):
            return self._expression(value.node.expr, loc)
        return const(float(value), loc)

    def _expression(self, e: sympy.Basic, loc: Loc | None) -> Node:
        if isinstance(e, sympy.Symbol):
            return make("size", axis=self.names[str(e)], loc=loc)
        if e.is_number:
            return const(float(e), loc)
        args = [self._expression(a, loc) for a in e.args]
        kind = type(e).__name__
        if kind == "ToFloat":
            return args[0]
        ops = {
            "Add": "add", "Mul": "mul", "Pow": "pow", "FloatPow": "pow", "PowByNatural": "pow",
            "IntTrueDiv": "div", "FloatTrueDiv": "div", "OpaqueUnaryFn_sqrt": "sqrt",
            "OpaqueUnaryFn_exp": "exp", "OpaqueUnaryFn_log": "log",
        }  # fmt: skip
        if kind not in ops:
            raise NoMeaning(f"the number {self.spell(str(e))}")
        node = args[0]
        if len(args) == 1:
            return make(ops[kind], node, loc=loc)
        for arg in args[1:]:
            node = make(ops[kind], node, arg, loc=loc)
        return node

    def refuse_guards(self, where: str) -> None:
        """A size that was compared for equality was taken for a number, or for another dim."""
        for guard in self.env.guards:
            if isinstance(guard.expr, sympy.Eq):
                raise MixedDims(
                    f"the step needs {self.spell(str(guard.expr.lhs))} == {self.spell(str(guard.expr.rhs))}",
                    where=where,
                    why="sizes are symbols while a step is traced; a dim that is looped over or compared is static",
                    try_='class N(lmoe.Dim, static=True): "micro-steps"',
                )
