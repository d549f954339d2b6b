"""Evaluates named-axis expressions with plain torch: the meaning of the IR, and the oracle of every lowering.

A value is a tensor `[*batch, *axes]` with its axis names; batch dimensions broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.ir.nodes import BINARY, UNARY, Next, Node, Program, Read, Step, topological
from lmoe_compiler.ir.sequence import over_tokens

POINTWISE: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "exp": torch.exp, "log": torch.log, "log1p": torch.log1p,
    "sigmoid": torch.sigmoid, "logsigmoid": F.logsigmoid, "softplus": F.softplus,
    "tanh": torch.tanh, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "recip": torch.reciprocal,
    "abs": torch.abs, "sign": torch.sign, "relu": torch.relu, "sin": torch.sin, "cos": torch.cos,
    "erf": torch.erf, "isfinite": lambda x: torch.isfinite(x).to(x.dtype),
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow,
    "maximum": torch.maximum, "minimum": torch.minimum,
    "gt": lambda x, y: (x > y).to(x.dtype), "ge": lambda x, y: (x >= y).to(x.dtype),
    "lt": lambda x, y: (x < y).to(x.dtype), "le": lambda x, y: (x <= y).to(x.dtype),
    "eq": lambda x, y: (x == y).to(x.dtype),
    "where": lambda c, x, y: torch.where(c != 0, x, y),
}  # fmt: skip
assert set(POINTWISE) == UNARY | BINARY | {"where"}


@dataclass(frozen=True)
class Value:
    """A tensor whose last `len(axes)` dimensions are named."""

    tensor: Tensor
    axes: tuple[str, ...] = ()

    def to(self, axes: tuple[str, ...]) -> Tensor:
        """The tensor laid out as `[*batch, *axes]`, size 1 where an axis is missing."""
        if self.axes == axes:
            return self.tensor
        present = [a for a in axes if a in self.axes]
        assert len(present) == len(self.axes), (self.axes, axes)
        batch = self.tensor.dim() - len(self.axes)
        order = [batch + self.axes.index(a) for a in present]
        tensor = self.tensor.permute((*range(batch), *order))
        for position, axis in enumerate(axes):
            if axis not in self.axes:
                tensor = tensor.unsqueeze(batch + position)
        return tensor


Rule = Callable[[Node, list[Value]], Value]


def evaluate(
    roots: Iterable[Node],
    env: Mapping[Node, Value],
    sizes: Mapping[str, int],
    rules: Mapping[str, Rule] | None = None,
) -> list[Value]:
    """Values of `roots`. `env` gives the leaves (or any inner node); `sizes` the axis lengths; `rules` further ops."""
    roots = list(roots)
    values: dict[Node, Value] = dict(env)
    like = next(iter(env.values())).tensor
    for node in topological(roots, env):
        if node not in values:
            values[node] = apply_op(node, [values[a] for a in node.args], sizes, like, rules or {})
    return [values[root] for root in roots]


def apply_op(
    node: Node, args: list[Value], sizes: Mapping[str, int], like: Tensor, rules: Mapping[str, Rule]
) -> Value:
    op = node.op
    if op in POINTWISE:
        return Value(POINTWISE[op](*(a.to(node.axes) for a in args)), node.axes)
    if op == "const":
        return Value(torch.full((), node["value"], dtype=like.dtype, device=like.device))  # type: ignore[arg-type]
    if op == "size":
        return Value(torch.full((), sizes[str(node["axis"])], dtype=like.dtype, device=like.device))
    if op == "delta":
        n = sizes[node.axes[0].rstrip("'")]
        return Value(torch.eye(n, dtype=like.dtype, device=like.device), node.axes)
    if op == "cast":
        return args[0]
    if op == "rename":
        axes = tuple(str(node["new"]) if a == node["old"] else a for a in args[0].axes)
        return Value(args[0].tensor, axes)
    if op == "index":
        axis, x = str(node["axis"]), args[0]
        position = x.tensor.dim() - len(x.axes) + x.axes.index(axis)
        return Value(
            x.tensor.select(position, int(str(node["at"]))), tuple(a for a in x.axes if a != axis)
        )
    if op in ("sum", "max"):
        axis, x = str(node["axis"]), args[0]
        rest = tuple(a for a in x.axes if a != axis)
        if axis not in x.axes:
            return x if op == "max" else Value(x.tensor * sizes[axis.rstrip("'")], x.axes)
        position = x.tensor.dim() - len(x.axes) + x.axes.index(axis)
        return Value(x.tensor.sum(position) if op == "sum" else x.tensor.amax(position), rest)
    if op == "dot":
        return _dot(str(node["axis"]), *args)
    return rules[op](node, args)


def _dot(axis: str, a: Value, b: Value) -> Value:
    """sum over `axis` of a * b, as one batched matmul."""
    rest_a = [x for x in a.axes if x != axis]
    rest_b = [x for x in b.axes if x != axis]
    both = tuple(x for x in rest_a if x in rest_b)
    rows = tuple(x for x in rest_a if x not in both)
    columns = tuple(x for x in rest_b if x not in both)
    left, right = a.to((*both, *rows, axis)), b.to((*both, axis, *columns))
    if len(rows) == 1 and len(columns) == 1:
        return Value(left @ right, (*both, *rows, *columns))
    if len(rows) == 0 and len(columns) == 1:
        return Value((left.unsqueeze(-2) @ right).squeeze(-2), (*both, *columns))
    if len(rows) == 1 and len(columns) == 0:
        return Value((left @ right.unsqueeze(-1)).squeeze(-1), (*both, *rows))
    axes = (*both, *rows, *columns, axis)
    return Value((a.to(axes) * b.to(axes)).sum(-1), axes[:-1])


def run_token(
    program: Program, inputs: Mapping[str, Value], states: Mapping[str, Value]
) -> tuple[Value, dict[str, Value]]:
    """One token: (output, next states). Batch dimensions broadcast; the order of execution is the body's."""
    sizes = {a: n for v in (*inputs.values(), *states.values()) for a, n in _lengths(v)}
    declared = {var.name: var.node for var in (*program.inputs, *program.states)}
    env = {declared[name]: value for name, value in inputs.items()}
    incoming = {declared[name]: value for name, value in states.items()}
    now = dict(states)
    for item in program.body:
        if isinstance(item, Step):
            now[item.state] = _step(item, now[item.state], env, sizes)
        elif isinstance(item, Next):
            values = evaluate(item.values, env | incoming, sizes)
            for name, value in zip(item.states, values, strict=True):
                axes = states[name].axes
                now[name] = Value(value.to(axes).expand_as(now[name].tensor), axes)
        else:
            env[item.node] = _read(item, now[item.state], env, sizes)
    (output,) = evaluate([program.output], env, sizes)
    return output, now


def _lengths(value: Value) -> list[tuple[str, int]]:
    shape = value.tensor.shape[value.tensor.dim() - len(value.axes) :]
    return list(zip(value.axes, shape, strict=True))


def _step(step: Step, state: Value, env: Mapping[Node, Value], sizes: Mapping[str, int]) -> Value:
    axes, before = state.axes, state.tensor
    after = before
    for factor in evaluate([d.factor for d in step.decays], env, sizes):
        after = after * factor.to(axes)
    result = after
    for f in step.feedbacks:
        key, scale, read = evaluate([f.key, f.scale, f.read], env, sizes)
        seen = Value(after if f.point == "after" else before, axes)
        feedback = _dot(next(a for a in read.axes if a in axes), read, seen)
        result = result + scale.to(axes) * key.to(axes) * feedback.to(axes)
    for w in step.writes:
        key, value = evaluate([w.key, w.value], env, sizes)
        result = result + key.to(axes) * value.to(axes)
    return Value(result, axes)


def _read(read: Read, state: Value, env: Mapping[Node, Value], sizes: Mapping[str, int]) -> Value:
    if read.vector is None:
        return state
    (vector,) = evaluate([read.vector], env, sizes)
    result = _dot(vector.axes[0], vector, state)
    return Value(result.to(read.axes), read.axes)


def run(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The whole sequence, token by token, in the inputs' own dtype: the oracle of every lowering.

    inputs [B, T, H, *axes] and heads [H, *axes] in the program's order; states [N, H, *axes].
    Returns the output [B, T, H, *axes] and the final states.
    """

    def step(now: Sequence[Tensor], token: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        named = {v.name: Value(x, v.axes) for v, x in zip(program.inputs, token, strict=True)}
        old = {v.name: Value(x, v.axes) for v, x in zip(program.states, now, strict=True)}
        output, new = run_token(program, named, old)
        shape = (*now[0].shape[: now[0].dim() - len(program.states[0].axes)], *_shape(output))
        return [new[v.name].tensor for v in program.states], output.tensor.expand(shape)

    return over_tokens(step, program.states, program.inputs, inputs, states, cu_seqlens)


def _shape(value: Value) -> tuple[int, ...]:
    return tuple(value.tensor.shape[value.tensor.dim() - len(value.axes) :])
