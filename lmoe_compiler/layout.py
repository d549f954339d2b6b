"""Sizes of a call: where batch, tokens, heads and dims stand in the tensors, and the shapes of results.

    token input  [B, T, H, *axes]      in a decode step [B, H, *axes]
    head input   [H, *axes]
    state        [N, H, *axes]         N = B, or the number of packed documents
    output       [B, T, H, *axes]

An input may have fewer heads than H, the widest: head h reads group h // factor. Sizes may be symbolic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from lmoe_compiler.errors import NoSpanMap
from lmoe_compiler.ir.nodes import Decay, Node, Program, Read, Step, Var, topological

T = TypeVar("T")
Tensors = Sequence[Tensor]
# What a scan gives: output, final states, and what its backward needs.
Saved = tuple[Tensor, list[Tensor], list[Tensor]]


class Measured(Protocol):
    """What the checks of a call look at: a tensor, or a Spec of one."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class Spec(NamedTuple):
    """Shape, dtype and device of a tensor, without the tensor: hashable."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Sizes:
    """Measured from checked tensors. `length` is None in a decode step."""

    batch: int
    length: int | None
    heads: int
    documents: int
    dims: dict[str, int]
    dtype: torch.dtype
    accumulate: torch.dtype

    def output(self, program: Program) -> tuple[int, ...]:
        rows = (self.batch,) if self.length is None else (self.batch, self.length)
        return (*rows, self.heads, *(self.dims[a] for a in program.output.axes))

    def state(self, var: Var) -> tuple[int, ...]:
        return (self.documents, self.heads, *(self.dims[a] for a in var.axes))

    def map(self, axes: tuple[str, ...]) -> tuple[int, ...]:
        return (self.batch, self.heads, *(self.dims[a.rstrip("'")] for a in axes))


def leading(var: Var, *, step: bool) -> tuple[str, ...]:
    """Names of the dimensions that stand before a variable's own axes."""
    if var.kind == "state":
        return ("N", "H")
    if var.kind == "head":
        return ("H",)
    return ("B", "H") if step else ("B", "T", "H")


def measure(
    program: Program,
    inputs: Sequence[Measured],
    states: Sequence[Measured],
    cu_seqlens: Measured | None,
    *,
    step: bool = False,
) -> Sizes:
    """Sizes of arguments that checks.py has seen (or will see)."""
    named: dict[str, int] = dict(program.static)
    heads = 1
    variables = (*program.inputs, *program.states[: len(states)])
    for var, x in zip(variables, (*inputs, *states), strict=True):
        names = leading(var, step=step)
        heads = max(heads, x.shape[names.index("H")])
        for name, size in zip((*names, *var.axes), x.shape, strict=True):
            named.setdefault(name, size)
    dtype = inputs[first_token(program)].dtype
    documents = named["B"] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return Sizes(
        named["B"], None if step else named["T"], heads, documents, named, dtype, accumulate
    )


def first_token(program: Program) -> int:
    """Position of the first token input: its dtype is the output's."""
    return next(i for i, var in enumerate(program.inputs) if var.kind == "token")


def gates(program: Program) -> frozenset[str]:
    """Inputs that may stay in float32 beside bfloat16 tokens: scalars, and whatever a decay is made of."""
    scalars = {var.name for var in program.inputs if not var.axes}
    return frozenset(scalars | set(_names(d.factor for d in _decays(program))))


def map_axes(program: Program) -> list[tuple[str, ...] | None]:
    """Per state, the axes of M in S_out = M S_in + E of a span; None where M is the identity.

    () scalar, (K,) diagonal, (K, K') dense, the state's own axes elementwise.
    """
    axes = _map_axes(program)
    if isinstance(axes, str):
        raise NoSpanMap(
            f"{program.name} has no span map",
            why=axes,
            try_="run this layer with the whole sequence on one rank",
        )
    return axes


def split_maps(program: Program, results: Sequence[T]) -> tuple[list[T | None], list[T]]:
    """The flat results of span_map (or their gradients) as M, or None, per state and E per state."""
    axes = map_axes(program)
    count = len(results) - len(axes)
    maps = iter(results[:count])
    return [None if a is None else next(maps) for a in axes], list(results[count:])


def _map_axes(program: Program) -> list[tuple[str, ...] | None] | str:
    """The same, or the reason why there is no map."""
    reads = {read.name for read in program.body if isinstance(read, Read)}
    axes: dict[str, set[str] | None] = {var.name: None for var in program.states}
    for item in program.body:
        if isinstance(item, Read):
            continue
        if not isinstance(item, Step):
            return item.reason or f"its next state is {item.kind}"
        used = set(_names(_coefficients(item))) & reads
        if used:
            return f"{item.state} is driven by {sorted(used)[0]}, which is read from a state"
        found = {a for decay in item.decays for a in decay.factor.axes}
        for feedback in item.feedbacks:
            (axis,) = feedback.read.axes
            if other := set(feedback.scale.axes) - {axis}:
                return f"a feedback of {item.state} is scaled along {sorted(other)[0]}"
            found |= {axis, axis + "'"}
        if item.decays or item.feedbacks:
            axes[item.state] = (axes[item.state] or set()) | found
    result: list[tuple[str, ...] | None] = []
    for var in program.states:
        own = axes[var.name]
        order = (*var.axes, *(a + "'" for a in var.axes))
        result.append(None if own is None else tuple(a for a in order if a in own))
        if own is not None and any(a.endswith("'") for a in own) and len(own) > 2:
            return f"{var.name} mixes both of its axes, so M would have its size squared"
    return result


def multiply_adds(program: Program, sizes: Sizes) -> int:
    """Operations of the recurrence as it is written, one token at a time (two per multiply-add)."""
    cost = {"decays": 1, "feedbacks": 4, "writes": 2}
    state_size = {var.name: 1 for var in program.states}
    for var in program.states:
        for axis in var.axes:
            state_size[var.name] *= sizes.dims[axis]
    total = 0
    for item in program.body:
        if isinstance(item, Step):
            count = sum(n * len(getattr(item, field)) for field, n in cost.items())
            total += count * state_size[item.state]
        elif isinstance(item, Read):
            total += 2 * state_size[item.state]
        else:
            total += sum(4 * state_size[name] for name in item.states)
    return total * sizes.batch * sizes.heads * (1 if sizes.length is None else sizes.length)


def _decays(program: Program) -> Iterator[Decay]:
    for item in program.body:
        if isinstance(item, Step):
            yield from item.decays


def _coefficients(step: Step) -> Iterator[Node]:
    for decay in step.decays:
        yield decay.factor
    for feedback in step.feedbacks:
        yield from (feedback.key, feedback.scale, feedback.read)
    for write in step.writes:
        yield from (write.key, write.value)


def _names(roots: Iterator[Node]) -> Iterator[str]:
    return (node.name for node in topological(roots) if node.op == "input")
