"""Sizes as symbols, for steps that look at them, and what torch assumed of them while the step was traced.

Numbers computed from sizes (`q.shape[0] ** -0.5`) stay expressions; a comparison of sizes is refused. Used by trace.py.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import sympy
from torch import SymBool, SymFloat, SymInt
from torch._guards import GuardSource, Source
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from lmoe_compiler.errors import MixedDims
from lmoe_compiler.ir.nodes import Loc, Node, Var, const, make
from lmoe_compiler.operations import NoMeaning
from lmoe_compiler.sizes import PRIMES, TORCH, Sizes


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


class _OnCpu(FakeTensorMode):
    """Leaves the process's device guards alone: a step is traced on the CPU.

    On a CUDA build without a device torch gives the process one that dies with the thread. A proof has a thread of its
    own (definition.py), so whatever entered a fake mode after it would crash (c10/core/impl/DeviceGuardImplInterface).
    """

    @property
    def avoid_device_init(self) -> bool:
        return False


class _Watched(ShapeEnv):
    """Keeps what code outside torch learnt of a symbol: the question, and the line that asked it."""

    def __init__(self) -> None:
        super().__init__(duck_shape=False)
        self.asked: list[tuple[sympy.Basic, str]] = []

    def evaluate_sym_node(self, *args: Any, **kwargs: Any) -> Any:
        known = len(self.guards)
        answer = super().evaluate_sym_node(*args, **kwargs)
        if len(self.guards) > known and (line := _asking()) is not None:
            self.asked.append((self.guards[known].expr, line))
        return answer


def _asking() -> str | None:
    """The line outside torch that makes a bool or a number of a symbol; None if torch asks for itself."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name not in CONVERSIONS:
        frame = frame.f_back
    frame = frame and frame.f_back
    if frame is None or frame.f_code.co_filename.startswith(TORCH):
        return None
    file, line = frame.f_code.co_filename, frame.f_lineno
    return f"{file}:{line}\n{linecache.getline(file, line).strip()}".rstrip()


CONVERSIONS = {"__bool__", "__int__", "__index__", "__float__"}


class Symbols(Sizes):
    """Every dim is a symbol of a ShapeEnv of our own, with a prime as its hint."""

    def __init__(self, variables: Sequence[Var], static: Mapping[str, int]) -> None:
        super().__init__(variables, static)
        self.env = _Watched()
        self.names: dict[str, str] = {}
        self.symbols: dict[str, int | SymInt] = {}
        for dim, hint in zip(self.free, PRIMES, strict=False):
            source = _DimSource(dim)
            symbol = self.env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            self.names[str(symbol)] = dim
            self.symbols[dim] = self.env.create_symintnode(symbol, hint=hint, source=source)

    def running(self) -> AbstractContextManager[object]:
        return _OnCpu(shape_env=self.env)

    def length(self, dim: str) -> int | SymInt:
        return self.symbols[dim] if dim in self.symbols else self.of[dim]

    def axis(self, size: int | SymInt) -> str | None:
        if not isinstance(size, SymInt):
            return super().axis(size)
        text = str(size.node.expr)
        if text not in self.names:
            raise NoMeaning(f"a tensor of size {self.spell(text)}")
        return self.names[text]

    def spell(self, text: str) -> str:
        for symbol, dim in self.names.items():
            text = text.replace(symbol, dim)
        return text

    def number(self, value: Any, loc: Loc | None) -> Node:
        if isinstance(value, (SymInt, SymFloat, SymBool)):
            return self._expression(value.node.expr, loc)
        return super().number(value, loc)

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

    def refuse_questions(self) -> None:
        for expr, line in self.env.asked:
            asked = f"to know whether {expr}"
            if isinstance(expr, sympy.Eq) and expr.rhs.is_number:
                asked = f"{expr.lhs} as a plain number"
            elif isinstance(expr, sympy.Ne):
                asked = f"to know whether {expr.lhs} == {expr.rhs}"
            raise MixedDims(
                f"the step needs {self.spell(asked)}", where=line,
                why="a size is a symbol while a step is traced; a dim that is looped over or compared is static",
                try_="q.shape[0] ** -0.5   # in place of 1 / math.sqrt(q.shape[0])\n"
                     'class N(lmoe.Dim, static=True): "micro-steps"   # for a loop: Token[N, K]',
            )  # fmt: skip

    def refuse_guards(self, where: str) -> None:
        self.refuse_questions()
        for guard in self.env.guards:
            if isinstance(guard.expr, sympy.Eq):
                raise MixedDims(
                    f"the step needs {self.spell(str(guard.expr.lhs))} == {self.spell(str(guard.expr.rhs))}",
                    where=where,
                    why="every dim is a size of its own, and is neither cut nor joined",
                    try_="class H(lmoe.Dim): ...   # halves, each with a name of its own: Token[N, H]",
                )
