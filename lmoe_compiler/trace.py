"""Stop 2 of the walk: the step runs once on small tensors; what it does becomes expressions.

A dispatch mode (recorder.py) sees plain aten operations: the inner gradient of `torch.func.grad` and the batching of
`torch.func.vmap` are already gone. operations.py says what each means in named axes, sizes.py what sizes are.
Next: analysis/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.errors import (
    LmoeError,
    UnsupportedOperation,
    WrongReturn,
)
from lmoe_compiler.gradient_stops import GradientStops
from lmoe_compiler.ir.nodes import Node, Var, make
from lmoe_compiler.ir.spec import base
from lmoe_compiler.operations import Context, Named, another, relabel
from lmoe_compiler.recorder import Recorder, spot
from lmoe_compiler.side_effects import refuse_side_effects
from lmoe_compiler.sizes import PRIMES, Numbers, Sizes
from lmoe_compiler.symbols import Symbols


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


def differentiates(code: CodeType) -> bool:
    """Whether a step has an inner gradient: torch imports all of Dynamo, and Triton, when it takes one."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return bool(GRADIENTS & set(code.co_names)) or any(map(differentiates, inner))


GRADIENTS = {"grad", "grad_and_value", "vjp", "jacrev", "hessian"}


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
    """The step as expressions. It runs on symbols only if numbers for sizes are not enough, or it has a mistake."""
    refuse_side_effects(step)
    run = partial(_run, name, step, tuple(states), tuple(inputs), tuple(static))
    return by_numbers(run, [*states, *inputs], dict(static)) or run(
        Symbols([*states, *inputs], dict(static))
    )


def by_numbers(
    run: Callable[[Sizes], Traced], variables: Sequence[Var], static: Mapping[str, int]
) -> Traced | None:
    """The trace with primes for sizes, if no size got into it: none is asked for, and other primes give the same."""
    found = []
    for primes in (PRIMES, PRIMES[::-1]):
        sizes = Numbers(variables, static, primes)
        try:
            found.append(run(sizes))
        # What is wrong is said in terms of dims when the step runs on symbols.
        except Exception:
            return None
        if sizes.reads.any:
            return None
    return found[0] if found[0] == found[1] else None


def _run(
    name: str,
    step: Callable[..., Any],
    states: tuple[Var, ...],
    inputs: tuple[Var, ...],
    static: tuple[tuple[str, int], ...],
    sizes: Sizes,
) -> Traced:
    """Run `step` once on tensors of these sizes."""
    recorder = Recorder(step.__code__.co_filename, sizes)
    with sizes.running(), default_float(torch.float32):
        args = sizes.arguments()
        for var, arg in zip((*states, *inputs), args, strict=True):
            recorder.define(arg, Named(var.node, var.axes))
        try:
            with recorder, GradientStops(lambda: spot(recorder.here())):
                result = step(*args)
            results = _checked(step, result, states, recorder)
        except UnsupportedOperation as error:
            sizes.refuse_guards(error.where)
            raise
        except LmoeError:
            raise
        except Exception as error:
            sizes.refuse_questions()
            recorder.explain(error)
    sizes.refuse_guards(recorder.line_of_definition(step))
    *next_states, output = results
    return Traced(
        name, states, inputs, static, tuple(x.node for x in next_states), _filled(output),
        tuple(a for a in output.axes if a is not None), step,
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
    recorder: Recorder,
) -> list[Named]:
    """The returned next states and output, with state axes named as declared."""
    where = recorder.line_of_return(step)
    names = ", ".join(v.name for v in states)
    example = f"return {names}, output"
    values = result if isinstance(result, (tuple, list)) else (result,)
    if len(values) != len(states) + 1:
        got = f"{len(values)} values"
        if not isinstance(result, (tuple, list)):
            got = "one value" if isinstance(result, Tensor) else f"a {type(result).__name__}"
            got = "nothing" if result is None else got
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
