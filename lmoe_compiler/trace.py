"""Stop 2 of the walk: the step runs once on fake tensors of symbolic sizes; what it does becomes expressions.

A dispatch mode below autograd and functorch sees only plain aten operations (the inner gradient of `torch.func.grad`,
the batching of `torch.func.vmap` are already gone), and operations.py says what each means in named axes. Sizes are
symbols of a ShapeEnv of our own, with distinct prime hints, so K and V cannot be confused and numbers computed from
sizes stay expressions. Every node keeps the line of the user's file that caused it. Next: analysis/.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import sympy
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._decomp import get_decompositions
from torch._guards import GuardSource, Source
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lmoe_compiler.errors import (
    CapturedTensor,
    DataDependentControlFlow,
    InPlaceUpdate,
    LmoeError,
    MixedDims,
    UnsupportedOperation,
    WrongReturn,
)
from lmoe_compiler.ir.nodes import Loc, Node, Var, const, make
from lmoe_compiler.ir.spec import base
from lmoe_compiler.operations import RULES, Axis, Context, Named, NoMeaning, another, relabel
from lmoe_compiler.side_effects import refuse_side_effects

aten = torch.ops.aten
PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41)
NEEDS_VALUE = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "unique",
    "_unique2",
}
DISPATCH = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")
OPERANDS = {"Tensor", "number", "Scalar"}
INTERNAL_IN_PLACE = {"squeeze_", "detach_"}
DECOMPOSITIONS = get_decompositions(
    [
        aten.mse_loss, aten.mse_loss_backward, aten.huber_loss, aten.huber_loss_backward, aten.addmm,
        aten.addmv, aten.baddbmm, aten.log_sigmoid_backward, aten.silu, aten.silu_backward,
        aten.gelu, aten.gelu_backward, aten.sigmoid_backward, aten.tanh_backward,
        aten.threshold_backward, aten.softplus_backward, aten.native_layer_norm_backward,
        aten._softmax_backward_data, aten._log_softmax_backward_data, aten.addcmul, aten.addcdiv,
        aten.lerp, aten.elu, aten.leaky_relu, aten.hardtanh, aten.hardsigmoid, aten.std,
        aten.smooth_l1_loss, aten.smooth_l1_loss_backward, aten.select_backward, aten.xlogy,
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Traced:
    """A step as expressions of its arguments. `output_axes`: the axes of the output's dimensions, in order."""

    name: str
    states: tuple[Var, ...]
    inputs: tuple[Var, ...]
    static: tuple[tuple[str, int], ...]
    next_states: tuple[Node, ...]
    output: Node
    output_axes: tuple[str, ...]
    step: Callable[..., Any]


@contextmanager
def default_float(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that a step creates without a dtype (`torch.eye(n)`) take the dtype it runs in."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(old)


def trace(
    name: str,
    step: Callable[..., Any],
    states: Sequence[Var],
    inputs: Sequence[Var],
    static: Sequence[tuple[str, int]],
) -> Traced:
    """Run `step` once on symbols."""
    refuse_side_effects(step)
    sizes = _Sizes([*states, *inputs], dict(static))
    recorder = _Recorder(step.__code__.co_filename, sizes)
    with FakeTensorMode(shape_env=sizes.env), default_float(torch.float32):
        args = [torch.empty([sizes.of[base(a)] for a in v.axes]) for v in (*states, *inputs)]
        for var, arg in zip((*states, *inputs), args, strict=True):
            recorder.define(arg, Named(var.node, var.axes))
        try:
            with recorder:
                result = step(*args)
            results = _checked(step, result, states, recorder)
        except UnsupportedOperation as error:
            sizes.refuse_guards(error.where)
            raise
        except LmoeError:
            raise
        except Exception as error:
            recorder.explain(error)
    sizes.refuse_guards(recorder.line_of_definition(step))
    *next_states, output = results
    return Traced(
        name, tuple(states), tuple(inputs), tuple(static), tuple(x.node for x in next_states),
        _filled(output), tuple(a for a in output.axes if a is not None), step,
    )  # fmt: skip


def _filled(output: Named) -> Node:
    """The output with every axis of its dimensions: one that is constant along an axis is spread over it."""
    node = output.node
    for axis in output.axes:
        if axis is not None and axis not in node.axes:
            other = another(axis, [axis])
            ones = make("sum", make("delta", a=axis, b=other), axis=other)
            node = make("mul", node, ones)
    return node


def _checked(
    step: Callable[..., Any],
    result: Any,
    states: Sequence[Var],
    recorder: _Recorder,
) -> list[Named]:
    """The returned next states and output, with state axes named as declared."""
    where = recorder.line_of_return(step)
    names = ", ".join(v.name for v in states)
    example = f"return {names}, output"
    values = result if isinstance(result, (tuple, list)) else (result,)
    if len(values) != len(states) + 1:
        got = f"{len(values)} values" if isinstance(result, (tuple, list)) else "one value"
        raise WrongReturn(
            f"{step.__name__} returned {got}, not {len(states) + 1}", where=where,
            why=f"a step returns its next states ({names}), then one output", try_=example,
        )  # fmt: skip
    named = []
    for value, label in zip(values, [*(f"state {v.name}" for v in states), "output"], strict=True):
        if not isinstance(value, Tensor):
            raise WrongReturn(
                f"{step.__name__} returned a {type(value).__name__} as {label}", where=where,
                why="next states and output are tensors", try_=example,
            )  # fmt: skip
        named.append(recorder.value(value))
    for i, var in enumerate(states):
        shape = tuple(None if a is None else base(a) for a in named[i].axes)
        declared = tuple(base(a) for a in var.axes)
        if shape != declared and not (len(shape) == len(declared) and None in shape):
            got = ", ".join(a or "1" for a in shape)
            raise WrongReturn(
                f"{step.__name__} returned state {var.name} as [{got}], not [{', '.join(var.axes)}]",
                where=where, why="a state keeps its shape from token to token",
                try_=f"return {names}, output   # {var.name} is [{', '.join(var.axes)}]",
            )  # fmt: skip
        own = {a: b for a, b in zip(named[i].axes, var.axes, strict=True) if a is not None}
        named[i] = Named(relabel(Context(None, ()), named[i].node, own), var.axes)
    return named


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


class _Sizes:
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


class _Recorder(TorchDispatchMode):
    """Translates every operation on the step's tensors; unknown ones matter only if their result is used."""

    def __init__(self, file: str, sizes: _Sizes) -> None:
        super().__init__()
        self.file, self.sizes = file, sizes
        self.values: dict[int, Named | LmoeError] = {}
        self.alive: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if name in NEEDS_VALUE:
            self._needs_value(name)
        if func in DECOMPOSITIONS and name not in RULES:
            with self:
                return DECOMPOSITIONS[func](*args, **kwargs)
        if name not in RULES and name != "unbind":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func._schema.is_mutable and name not in INTERNAL_IN_PLACE:
            if _caller() == self.file:
                self._in_place(name)
            return self._mutated(func, args, kwargs)
        for x in _tensors(args, kwargs):
            self._refuse_captured(x, name)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            self.define(out, self._translate(func, name, args, kwargs, out))
        elif isinstance(out, (tuple, list)) and any(isinstance(x, Tensor) for x in out):
            values = self._translate(func, name, args, kwargs, out)
            for i, x in enumerate(out):
                if isinstance(x, Tensor):
                    self.define(x, values if isinstance(values, LmoeError) else values[i])
        return out

    def _mutated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Torch's own in-place operation on a temporary: the new value takes the old one's place."""
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__.removesuffix("_")
        value: Any = UnsupportedOperation(
            f"{func} changes a tensor in place", where=_spot(self.here())
        )
        if name in RULES and isinstance(out, Tensor):
            value = self._translate(func, name, args, kwargs, out)
        for x in _tensors((args[0], out), {}):
            self.define(x, value)
        return out

    def define(self, tensor: Tensor, value: Any) -> None:
        self.values[id(tensor)] = value
        self.alive.append(tensor)

    def value(self, tensor: Tensor) -> Named:
        found = self.values.get(id(tensor))
        if isinstance(found, LmoeError):
            raise found
        if found is None:
            self._captured("a tensor")
        return found

    def _translate(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        loc = self.here()
        try:
            if name not in RULES and name != "unbind":
                raise NoMeaning("this operation")
            first = out if isinstance(out, Tensor) else out[0]
            ctx = Context(loc, self.sizes.axes(first.shape))
            args, kwargs = self._operands(func, args, kwargs, loc)
            if name == "unbind":
                dim = args[1] if len(args) > 1 else 0
                return [RULES["select"](ctx, args[0], dim, i) for i in range(len(out))]
            return RULES[name](ctx, *args, **kwargs)
        except UnsupportedOperation as error:
            return error
        except NoMeaning as error:
            return UnsupportedOperation(
                f"torch operation {func} cannot be part of a step: {error}", where=_spot(loc),
                why="a step is made of pointwise functions, products and sums over named axes",
                try_="S = S + torch.outer(k, v)   # or einsum, @, .T, broadcasting, torch.func.grad, vmap, ...",
            )  # fmt: skip

    def _operands(
        self, func: Any, args: Any, kwargs: Any, loc: Loc | None
    ) -> tuple[list[Any], dict[str, Any]]:
        """Tensors and operand numbers as Named; dims, flags and shapes as they are."""
        schema = func._schema.arguments
        numbers = {
            a.name for a in schema if str(a.type).removeprefix("Optional[").strip("]") in OPERANDS
        }

        def convert(x: Any, name: str) -> Any:
            if isinstance(x, Tensor):
                return self.value(x)
            if name in numbers and x is not None:
                return Named(self.sizes.number(x, loc))
            return x

        positional = [convert(x, a.name) for x, a in zip(args, schema, strict=False)]
        skip = {
            "dtype",
            "layout",
            "device",
            "pin_memory",
            "memory_format",
            "requires_grad",
            "non_blocking",
        }
        return positional, {k: convert(x, k) for k, x in kwargs.items() if k not in skip}

    def here(self) -> Loc | None:
        """The innermost frame of the user's file."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename == self.file:
                return Loc(
                    self.file, frame.f_lineno, linecache.getline(self.file, frame.f_lineno).strip()
                )
            frame = frame.f_back
        return None

    def line_of_definition(self, step: Callable[..., Any]) -> str:
        return f"{self.file}:{step.__code__.co_firstlineno}"

    def line_of_return(self, step: Callable[..., Any]) -> str:
        """The last line of the step that is a return."""
        lines = sorted({line for *_, line in step.__code__.co_lines() if line is not None})
        texts = [(n, linecache.getline(self.file, n).strip()) for n in lines]
        found = next(((n, t) for n, t in reversed(texts) if "return" in t), texts[-1])
        return f"{self.file}:{found[0]}\n{found[1]}"

    def _refuse_captured(self, x: Tensor, name: str) -> None:
        fresh = name in ("lift_fresh", "lift_fresh_copy", "detach")
        if id(x) in self.values or (fresh and x.dim() == 0):
            if id(x) not in self.values:
                with _disable_current_modes():
                    self.define(x, Named(const(float(x), self.here())))
            return
        self._captured(f"a tensor of shape {list(x.shape)}")

    def _captured(self, what: str) -> NoReturn:
        raise CapturedTensor(
            f"the step uses {what} that is not one of its arguments", where=_spot(self.here()),
            why="a recurrence is a function of its states, tokens and heads; nothing else may flow in",
            try_="def step(S: State[K, V], ..., u: Head[K]):   # one value per head, passed at each call",
        )  # fmt: skip

    def _needs_value(self, name: str) -> NoReturn:
        raise DataDependentControlFlow(
            f"the step needs the value of a tensor ({name})",
            where=_spot(self.here()),
            why="a Python `if`, `while`, float() or .item() would be decided once, for all tokens",
            try_="S = torch.where(g > 0, S, torch.zeros_like(S))",
        )

    def _in_place(self, name: str) -> NoReturn:
        raise InPlaceUpdate(
            f"the step changes a tensor in place ({name})",
            where=_spot(self.here()),
            why="a step is a function: it makes new values and returns them",
            try_="S = S + torch.outer(k, v)   # not S += ..., S.mul_(...) or S[i] = ...",
        )

    def explain(self, error: Exception) -> NoReturn:
        """Torch's own error about shapes, in terms of dims and the user's line."""
        where, frame = "", error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == self.file:
                text = linecache.getline(self.file, frame.tb_lineno).strip()
                where = _spot(Loc(self.file, frame.tb_lineno, text))
            frame = frame.tb_next
        text = self.sizes.spell(str(error).split("\n")[0])
        if isinstance(error, RuntimeError) and ("size" in text or "shape" in text or "dim" in text):
            raise MixedDims(
                text, where=where,
                why="every dim is a size of its own: K and V never agree, even where they are equal at run time",
                try_="S.T @ k   # [V, K] @ [K] -> [V]",
            ) from error  # fmt: skip
        raise error


def _caller() -> str:
    """The file that called the operation now being dispatched, past torch's own wrappers of the dispatch."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(DISPATCH):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x, {})


def _spot(loc: Loc | None) -> str:
    return "" if loc is None else f"{loc}\n{loc.text}"


__all__ = ["Axis", "Traced", "default_float", "trace"]
