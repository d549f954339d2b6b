"""A dispatch mode that writes down what a step does, as expressions; each keeps the line of the user's file.

It stands below autograd and functorch, so it sees plain aten operations only. Used by trace.py; what each operation
means is in operations.py.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lmoe_compiler.errors import (
    CapturedTensor,
    DataDependentControlFlow,
    InPlaceUpdate,
    LmoeError,
    MixedDims,
    UnsupportedOperation,
)
from lmoe_compiler.ir.nodes import Loc, Var, const
from lmoe_compiler.operations import RULES, Context, Named, NoMeaning
from lmoe_compiler.sizes import TORCH, Sizes

aten = torch.ops.aten
NEEDS_VALUE = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "unique",
    "_unique2",
}
# Parts of the names of operations that people reach for: why there is no such thing, and what to do instead.
HINTS = (
    (("rand", "bernoulli", "normal_", "uniform", "dropout", "multinomial"), (
        "a decode step, the backward and every rank must see the same numbers",
        "def step(S: State[K, V], ..., noise: Token[K]):   # draw before the call, and pass it")),
    (("cat", "stack", "split", "slice", "chunk", "flip", "roll", "gather", "index"), (
        "K is the whole axis: a step does not cut, join or reorder it",
        "q, k = rotate(q), rotate(k)   # before the call; or parts along a static dim, x: Token[N, K]")),
    (("arange", "linspace", "cumsum", "cumprod", "tri", "sort", "topk"), (
        "entries of an axis have no order in a step",
        "def step(S: State[K, V], ..., a: Head[K]):   # pass what differs by position, one value an entry")),
    (("view", "reshape", "bmm"), (
        "each axis keeps its name: two are not merged into one, and one is not split",
        "(S * q[:, None, None]).sum(0)   # in place of einsum or @ where axes would merge")),
)  # fmt: skip
OPERANDS = {"Tensor", "number", "Scalar"}
INTERNAL_IN_PLACE = {"squeeze_", "detach_"}
# Frames between a step and the dispatch of its operation.
DISPATCH = (
    "torch/_compile.py",
    "torch/_dynamo/eval_frame.py",
    "lmoe_compiler/sizes.py",
    "lmoe_compiler/gradient_stops.py",
)
# Without their wrappers, which are about `out=` and half precision and import all of Dynamo when called.
DECOMPOSITIONS = {
    op: inspect.unwrap(function)
    for op, function in get_decompositions([
        aten.mse_loss, aten.mse_loss_backward, aten.huber_loss, aten.huber_loss_backward, aten.addmm,
        aten.addmv, aten.baddbmm, aten.log_sigmoid_backward, aten.silu, aten.silu_backward,
        aten.gelu, aten.gelu_backward, aten.sigmoid_backward, aten.tanh_backward,
        aten.threshold_backward, aten.softplus_backward, aten.native_layer_norm_backward,
        aten._softmax_backward_data, aten._log_softmax_backward_data, aten.addcmul, aten.addcdiv,
        aten.elu, aten.leaky_relu, aten.hardtanh, aten.hardsigmoid, aten.std,
        aten.smooth_l1_loss, aten.smooth_l1_loss_backward, aten.select_backward, aten.xlogy,
        ]).items()
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Translates every operation on the step's tensors; unknown ones matter only if their result is used."""

    def __init__(self, file: str, sizes: Sizes) -> None:
        super().__init__()
        self.file, self.sizes = file, sizes
        self.values: dict[int, Named | LmoeError] = {}
        self.alive: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch would wrap the dispatch in `torch._dynamo.disable`, importing all of Dynamo for one trace."""
        return False

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
            self._needs_value(spot(self.here()))
        if func in DECOMPOSITIONS and name not in RULES:
            with self:
                return DECOMPOSITIONS[func](*args, **kwargs)
        if name not in RULES and name != "unbind":
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func._schema.is_mutable and name not in INTERNAL_IN_PLACE:
            if not _caller().startswith(TORCH):
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
        if name in RULES and isinstance(out, Tensor):
            value: Any = self._translate(func, name, args, kwargs, out)
        else:
            value = _unsupported(func, self.here(), "")
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
                raise NoMeaning("")
            if name == "_to_copy" and isinstance(args[0], Tensor):
                name = _cast(args[0].dtype, out.dtype)
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
            return _unsupported(func, loc, str(error))

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
        found = next(((n, t) for n, t in reversed(texts) if t.startswith("return")), texts[-1])
        return f"{self.file}:{found[0]}\n{found[1]}".rstrip()

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
            f"the step uses {what} that is not one of its arguments", where=spot(self.here()),
            why="a recurrence is a function of its states, tokens and heads; nothing else may flow in",
            try_="def step(S: State[K, V], ..., u: Head[K]):   # one value per head, passed at each call",
        )  # fmt: skip

    def _needs_value(self, where: str) -> NoReturn:
        raise DataDependentControlFlow(
            "the step needs the value of a tensor",
            where=where,
            why="a Python `if`, `while`, float(), .item(), math or numpy would be decided once, for all tokens",
            try_="S = torch.where(g > 0, S, torch.zeros_like(S))   # and g.exp(), not math.exp(g)",
        )

    def _in_place(self, name: str) -> NoReturn:
        raise InPlaceUpdate(
            f"the step changes a tensor in place ({name})",
            where=spot(self.here()),
            why="a step is a function: it makes new values and returns them",
            try_="S = S + torch.outer(k, v)   # not S += ..., S.mul_(...) or S[i] = ...",
        )

    def explain(self, error: Exception) -> NoReturn:
        """Torch's own error about shapes, in terms of dims and the user's line."""
        where, frame = "", error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == self.file:
                text = linecache.getline(self.file, frame.tb_lineno).strip()
                where = spot(Loc(self.file, frame.tb_lineno, text))
            frame = frame.tb_next
        text = self.sizes.spell(str(error).split("\n")[0])
        if "to Scalar" in text or ".numpy()" in text:
            self._needs_value(where)
        if text.count(")") > text.count("("):
            text = text.removesuffix(")")
        if isinstance(error, (RuntimeError, IndexError)) and any(
            word in text for word in ("size", "shape", "dim")
        ):
            raise MixedDims(
                text, where=where,
                why="the step sees one token of one head, and every dim is a size of its own:\n"
                    + ", ".join(map(_declared, self.sizes.variables)),
                try_="S.T @ k   # [V, K] @ [K] -> [V]",
            ) from error  # fmt: skip
        raise error


def _caller() -> str:
    """The file that called the operation now being dispatched, past the wrappers of the dispatch."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(DISPATCH):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


def _declared(var: Var) -> str:
    return f"{var.name} is [{', '.join(var.axes)}]" if var.axes else f"{var.name} is a number"


def _cast(old: torch.dtype, new: torch.dtype) -> str:
    """The rule of a cast: what is exact or only rounds less changes nothing."""
    if new == torch.bool:
        return "_to_copy" if old == torch.bool else "bool"
    if old.is_floating_point and not new.is_floating_point:
        raise NoMeaning("a cast to whole numbers has no gradient")
    if new in (torch.bfloat16, torch.float16):
        raise NoMeaning("inputs' dtypes decide the precision of a step")
    return "_to_copy"


def _unsupported(func: Any, loc: Loc | None, reason: str) -> UnsupportedOperation:
    """`func` has no meaning in a step, for a reason; with what to write in its place."""
    name = func.overloadpacket.__name__
    hint = next((hint for names, hint in HINTS if any(x in name for x in names)), None)
    why, try_ = hint or (
        "a step is made of pointwise functions, products and sums over named axes",
        "S = S + torch.outer(k, v)   # or einsum, @, .T, broadcasting, torch.func.grad, vmap, ...",
    )
    return UnsupportedOperation(
        f"torch operation {func} cannot be part of a step" + (reason and f": {reason}"),
        where=spot(loc), why=why, try_=try_,
    )  # fmt: skip


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x, {})


def spot(loc: Loc | None) -> str:
    return "" if loc is None else f"{loc}\n{loc.text}".rstrip()
