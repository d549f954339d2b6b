"""The meaning of each torch operation in named axes: positions of tensors become axes of expressions.

A traced tensor is a `Named`: an expression, and for each of its dimensions the axis (None where the size is 1). An
expression may lack an axis that its dimension names (it is constant along it). Used by trace.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmoe_compiler.ir.nodes import Loc, Node, const, make
from lmoe_compiler.ir.spec import base

Axis = str | None


class NoMeaning(Exception):
    """This use of an operation cannot be said in named axes; the message says what it would need."""


# In place of a Named: torch's indices of largest entries, which have no meaning by axis names.
UNKNOWN_INDICES = object()


@dataclass(frozen=True)
class Named:
    """A tensor of the step: `axes[i]` is the axis of dimension i."""

    node: Node
    axes: tuple[Axis, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.axes)


@dataclass(frozen=True)
class Context:
    """The operation being translated: where it stands, and the axis names of its result's dimensions."""

    loc: Loc | None
    shape: tuple[Axis, ...]

    def make(self, op: str, *args: Node, **attrs: Any) -> Node:
        return make(op, *args, loc=self.loc, **attrs)

    def const(self, value: float) -> Node:
        return const(value, self.loc)


def another(axis: str, used: Sequence[Axis]) -> str:
    """The first of K, K', K'' that is not in use."""
    name = base(axis)
    while name in used:
        name += "'"
    return name


def relabel(ctx: Context, node: Node, names: Mapping[str, str]) -> Node:
    """`node` with axes renamed at once; a swap goes through a third name."""
    todo = {old: new for old, new in names.items() if old != new and old in node.axes}
    while todo:
        free = next((old for old, new in todo.items() if new not in node.axes), None)
        if free is None:
            old, new = next(iter(todo.items()))
            spare = another(old, [*node.axes, *todo.values()])
            node = ctx.make("rename", node, old=old, new=spare)
            del todo[old]
            todo[spare] = new
        else:
            node = ctx.make("rename", node, old=free, new=todo.pop(free))
    return node


def align(ctx: Context, operands: Sequence[Named]) -> tuple[list[Node], tuple[Axis, ...]]:
    """Broadcast operands (aligned right) to common axis names."""
    rank = max(x.rank for x in operands)
    names: list[Axis] = [None] * rank
    for x in sorted(operands, key=lambda x: -sum(a is not None for a in x.axes)):
        for position, axis in enumerate(x.axes, rank - x.rank):
            if axis is not None and names[position] is None:
                names[position] = axis if axis not in names else another(axis, names)
    nodes = []
    for x in operands:
        own = zip(x.axes, names[rank - x.rank :], strict=True)
        nodes.append(
            relabel(ctx, x.node, {a: n for a, n in own if a is not None and n is not None})
        )
    return nodes, tuple(names)


def number(x: Any) -> float:
    """A number that arrived as an operand."""
    return float(str(x.node["value"])) if isinstance(x, Named) else float(x)


def pointwise(ctx: Context, op: str, *operands: Named) -> Named:
    nodes, axes = align(ctx, operands)
    return Named(ctx.make(op, *nodes), axes)


def contract(ctx: Context, a: Named, b: Named, at: tuple[int, int], batch: int = 0) -> Named:
    """sum over dimension at[0] of a and at[1] of b; the first `batch` dimensions meet, the others multiply out."""
    left = [i for i in range(a.rank) if i != at[0]]
    right = [i for i in range(batch, b.rank) if i != at[1]]
    names: list[Axis] = []
    for axis in [*(a.axes[i] for i in left), *(b.axes[i] for i in right)]:
        names.append(axis if axis is None or axis not in names else another(axis, names))
    names_b = [*names[:batch], *names[len(left) :]]
    summed = a.axes[at[0]] or b.axes[at[1]]
    over = None if summed is None else another(summed, names)
    rename_a = dict(
        zip([*(a.axes[i] for i in left), a.axes[at[0]]], [*names[: len(left)], over], strict=True)
    )
    rename_b = dict(
        zip(
            [*b.axes[:batch], *(b.axes[i] for i in right), b.axes[at[1]]],
            [*names_b, over],
            strict=True,
        )
    )
    x, y = (relabel(ctx, z.node, _present(m)) for z, m in ((a, rename_a), (b, rename_b)))
    if over is None:
        node = ctx.make("mul", x, y)
    elif over in x.axes and over in y.axes:
        node = ctx.make("dot", x, y, axis=over)
    else:
        node = _sum(ctx, ctx.make("mul", x, y), over)
    return Named(node, tuple(names))


def _present(names: Mapping[Axis, Axis]) -> dict[str, str]:
    return {old: new for old, new in names.items() if old is not None and new is not None}


def _sum(ctx: Context, node: Node, axis: str) -> Node:
    if axis in node.axes:
        return ctx.make("sum", node, axis=axis)
    return ctx.make("mul", node, ctx.make("size", axis=base(axis)))


def _positions(x: Named, dims: Any) -> list[int]:
    if dims is None or dims == []:
        return list(range(x.rank))
    dims = [dims] if isinstance(dims, int) else dims
    return [d % x.rank for d in dims] if x.rank else []


def reduce(ctx: Context, x: Named, dims: Any, keepdim: bool, op: str = "sum") -> Named:
    node, positions = x.node, _positions(x, dims)
    for axis in (x.axes[p] for p in positions):
        if axis is not None:
            if op == "sum":
                node = _sum(ctx, node, axis)
            elif axis in node.axes:
                node = ctx.make("max", node, axis=axis)
    if keepdim:
        return Named(node, tuple(None if i in positions else a for i, a in enumerate(x.axes)))
    return Named(node, tuple(a for i, a in enumerate(x.axes) if i not in positions))


def sum_(ctx: Context, x: Named, dims: Any = None, keepdim: bool = False, **_: Any) -> Named:
    return reduce(ctx, x, dims, keepdim)


def mean(ctx: Context, x: Named, dims: Any = None, keepdim: bool = False, **_: Any) -> Named:
    total = reduce(ctx, x, dims, keepdim)
    return Named(ctx.make("div", total.node, _count(ctx, x, dims)), total.axes)


def _count(ctx: Context, x: Named, dims: Any) -> Node:
    count = ctx.const(1)
    for position in _positions(x, dims):
        if (axis := x.axes[position]) is not None:
            size = ctx.make("size", axis=base(axis))
            count = size if count.op == "const" else ctx.make("mul", count, size)
    return count


def amax(ctx: Context, x: Named, dims: Any = None, keepdim: bool = False) -> Named:
    return reduce(ctx, x, dims, keepdim, "max")


def amin(ctx: Context, x: Named, dims: Any = None, keepdim: bool = False) -> Named:
    high = reduce(ctx, Named(ctx.make("neg", x.node), x.axes), dims, keepdim, "max")
    return Named(ctx.make("neg", high.node), high.axes)


def largest(reduction: Callable[..., Named]) -> Callable[..., Any]:
    """`x.max()`, and `x.max(dim)` with its pair of values and (unknown) indices."""

    def rule(ctx: Context, x: Named, dim: int | None = None, keepdim: bool = False) -> Any:
        values = reduction(ctx, x, dim, keepdim)
        return values if dim is None else (values, UNKNOWN_INDICES)

    return rule


def var_mean(
    ctx: Context, x: Named, dims: Any = None, correction: Any = 1, keepdim: bool = False
) -> tuple[Named, Named]:
    middle = mean(ctx, x, dims, True)
    off = pointwise(ctx, "sub", x, middle)
    total = reduce(ctx, pointwise(ctx, "mul", off, off), dims, keepdim)
    count = _count(ctx, x, dims)
    if number(correction):
        count = ctx.make("sub", count, ctx.const(number(correction)))
    return Named(ctx.make("div", total.node, count), total.axes), mean(ctx, x, dims, keepdim)


def var(
    ctx: Context, x: Named, dims: Any = None, correction: Any = 1, keepdim: bool = False
) -> Named:
    return var_mean(ctx, x, dims, correction, keepdim)[0]


def vector_norm(
    ctx: Context, x: Named, ord: Any = 2, dims: Any = None, keepdim: bool = False, **_: Any
) -> Named:
    order = number(ord)
    if order == 2:
        square = reduce(ctx, pointwise(ctx, "mul", x, x), dims, keepdim)
        return Named(ctx.make("sqrt", square.node), square.axes)
    size = Named(ctx.make("abs", x.node), x.axes)
    if order == 1:
        return reduce(ctx, size, dims, keepdim)
    if order == float("inf"):
        return reduce(ctx, size, dims, keepdim, "max")
    raise NoMeaning(f"a norm of order {order}")


def softmax(ctx: Context, x: Named, dim: int, half: bool = False) -> Named:
    powers = pointwise(ctx, "exp", pointwise(ctx, "sub", x, amax(ctx, x, dim, True)))
    return pointwise(ctx, "div", powers, reduce(ctx, powers, dim, True))


def logsumexp(ctx: Context, x: Named, dims: Any, keepdim: bool = False) -> Named:
    high = amax(ctx, x, dims, True)
    total = reduce(ctx, pointwise(ctx, "exp", pointwise(ctx, "sub", x, high)), dims, keepdim)
    flat = amax(ctx, x, dims, keepdim)
    return pointwise(ctx, "add", flat, Named(ctx.make("log", total.node), total.axes))


def log_softmax(ctx: Context, x: Named, dim: int, half: bool = False) -> Named:
    return pointwise(ctx, "sub", x, logsumexp(ctx, x, dim, True))


def layer_norm(
    ctx: Context,
    x: Named,
    shape: Sequence[Any],
    weight: Named | None,
    bias: Named | None,
    eps: float,
) -> tuple[Named, Named, Named]:
    dims = list(range(x.rank - len(shape), x.rank))
    spread, middle = var_mean(ctx, x, dims, 0, True)
    rstd = Named(ctx.make("rsqrt", ctx.make("add", spread.node, ctx.const(eps))), spread.axes)
    y = pointwise(ctx, "mul", pointwise(ctx, "sub", x, middle), rstd)
    y = y if weight is None else pointwise(ctx, "mul", y, weight)
    return y if bias is None else pointwise(ctx, "add", y, bias), middle, rstd


def scaled(op: str) -> Callable[..., Named]:
    def rule(ctx: Context, x: Named, y: Named, alpha: Named | None = None) -> Named:
        y = y if alpha is None or alpha.node == const(1) else pointwise(ctx, "mul", alpha, y)
        return pointwise(ctx, op, x, y)

    return rule


def rsub(ctx: Context, x: Named, y: Named, alpha: Named | None = None) -> Named:
    return scaled("sub")(ctx, y, x, alpha)


def div(ctx: Context, x: Named, y: Named, rounding_mode: str | None = None) -> Named:
    if rounding_mode is not None:
        raise NoMeaning("a division that rounds")
    return pointwise(ctx, "div", x, y)


def power(ctx: Context, x: Named, y: Named) -> Named:
    if y.node == const(1):
        return x
    if y.node == const(2):
        return pointwise(ctx, "mul", x, x)
    return pointwise(ctx, "pow", x, y)


def softplus(ctx: Context, x: Named, beta: Named | None = None, threshold: Any = None) -> Named:
    if beta is None or beta.node == const(1):
        return Named(ctx.make("softplus", x.node), x.axes)
    inner = ctx.make("softplus", ctx.make("mul", beta.node, x.node))
    return Named(ctx.make("div", inner, beta.node), x.axes)


def clamp(ctx: Context, x: Named, low: Named | None = None, high: Named | None = None) -> Named:
    x = x if low is None else pointwise(ctx, "maximum", x, low)
    return x if high is None else pointwise(ctx, "minimum", x, high)


def logaddexp(ctx: Context, x: Named, y: Named) -> Named:
    gap = pointwise(ctx, "abs", pointwise(ctx, "sub", x, y))
    tail = ctx.make("log1p", ctx.make("exp", ctx.make("neg", gap.node)))
    return pointwise(ctx, "add", pointwise(ctx, "maximum", x, y), Named(tail, gap.axes))


def permute(ctx: Context, x: Named, dims: Sequence[int]) -> Named:
    return Named(x.node, tuple(x.axes[d] for d in dims))


def transpose(ctx: Context, x: Named, i: int = 0, j: int = 1) -> Named:
    axes = list(x.axes)
    if axes:
        axes[i], axes[j] = axes[j], axes[i]
    return Named(x.node, tuple(axes))


def t(ctx: Context, x: Named) -> Named:
    return Named(x.node, x.axes[::-1])


def same(ctx: Context, x: Named, *_: Any, **__: Any) -> Named:
    return x


def view(ctx: Context, x: Named, *_: Any, **__: Any) -> Named:
    """Unit axes come and go; anything else would merge or split axes."""
    kept = [a for a in x.axes if a is not None]
    wanted = [a for a in ctx.shape if a is not None]
    if [base(a) for a in kept] != [base(a) for a in wanted]:
        dims = ", ".join(kept)
        raise NoMeaning(f"a view that merges, splits or reinterprets the axes [{dims}]")
    names = iter(kept)
    return Named(x.node, tuple(None if a is None else next(names) for a in ctx.shape))


def squeeze(ctx: Context, x: Named, dims: Any = None) -> Named:
    """A static axis of length one is a named one; dropping it takes its only entry."""
    if dims is None:
        return view(ctx, x)
    node, gone = x.node, [p for p in _positions(x, dims) if x.axes[p] is None]
    if x.rank - len(gone) > len(ctx.shape):
        gone = _positions(x, dims)
    for position in gone:
        if (axis := x.axes[position]) is not None and axis in node.axes:
            node = ctx.make("index", node, axis=axis, at=0)
    return Named(node, tuple(a for i, a in enumerate(x.axes) if i not in gone))


def expand(ctx: Context, x: Named, *_: Any, **__: Any) -> Named:
    own = (*([None] * (len(ctx.shape) - x.rank)), *x.axes)
    names: list[Axis] = [a for a in own if a is not None]
    axes = []
    for mine, wanted in zip(own, ctx.shape, strict=True):
        axis = mine
        if axis is None and wanted is not None:
            axis = another(wanted, names)
            names.append(axis)
        axes.append(axis)
    return Named(x.node, tuple(axes))


def select(ctx: Context, x: Named, dim: int, at: int) -> Named:
    axis = x.axes[dim]
    axes = tuple(a for i, a in enumerate(x.axes) if i != dim % x.rank)
    if axis is None or axis not in x.node.axes:
        return Named(x.node, axes)
    return Named(ctx.make("index", x.node, axis=axis, at=int(at)), axes)


def slice_(
    ctx: Context, x: Named, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Named:
    """The whole axis, or one entry of a static one."""
    kept, axis = ctx.shape[dim], x.axes[dim]
    if step != 1 or (kept is not None and (axis is None or base(kept) != base(axis))):
        raise NoMeaning("a part of an axis")
    if kept is not None or axis is None:
        return x
    one = select(ctx, x, dim, start or 0)
    return Named(one.node, tuple(None if i == dim % x.rank else a for i, a in enumerate(x.axes)))


def mm(ctx: Context, x: Named, y: Named) -> Named:
    return contract(ctx, x, y, (x.rank - 1, 0))


def bmm(ctx: Context, x: Named, y: Named) -> Named:
    both = [Named(n, a) for n, a in zip(*_batch_names(ctx, x, y), strict=True)]
    return contract(ctx, both[0], both[1], (2, 1), batch=1)


def _batch_names(ctx: Context, x: Named, y: Named) -> tuple[list[Node], list[tuple[Axis, ...]]]:
    """Give the two batch axes one name, clear of the operands' other axes."""
    axis = x.axes[0] or y.axes[0]
    if axis is None:
        return [x.node, y.node], [x.axes, y.axes]
    name = another(axis, [*x.axes[1:], *y.axes[1:]])
    nodes = [relabel(ctx, z.node, {z.axes[0]: name} if z.axes[0] else {}) for z in (x, y)]
    return nodes, [(name, *x.axes[1:]), (name, *y.axes[1:])]


def addr(
    ctx: Context,
    x: Named,
    u: Named,
    w: Named,
    beta: Named | None = None,
    alpha: Named | None = None,
) -> Named:
    product = pointwise(ctx, "mul", Named(u.node, (*u.axes, None)), w)
    product = product if alpha is None else pointwise(ctx, "mul", alpha, product)
    return pointwise(ctx, "add", x if beta is None else pointwise(ctx, "mul", beta, x), product)


def eye(ctx: Context, *_: Any, **__: Any) -> Named:
    rows, columns = ctx.shape
    if rows is None or columns is None or base(rows) != base(columns):
        raise NoMeaning("torch.eye of a size that is not one dim")
    return Named(ctx.make("delta", a=rows, b=columns), (rows, columns))


def diag_embed(ctx: Context, x: Named, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Named:
    axis = x.axes[-1]
    if offset or axis is None or (dim1, dim2) != (-2, -1):
        raise NoMeaning("a diagonal other than the main one")
    column = another(axis, x.axes)
    return Named(ctx.make("mul", x.node, ctx.make("delta", a=axis, b=column)), (*x.axes, column))


def diagonal(ctx: Context, x: Named, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Named:
    a, b = x.axes[dim1], x.axes[dim2]
    if offset or a is None or b is None:
        raise NoMeaning("a diagonal other than the main one")
    rest = tuple(n for n in x.axes if n not in (a, b))
    node = ctx.make("mul", x.node, ctx.make("delta", a=a, b=b))
    return Named(_sum(ctx, node, b), (*rest, a))


def fill(value: float | None = None) -> Callable[..., Named]:
    def rule(ctx: Context, *args: Any, **_: Any) -> Named:
        node = ctx.const(value) if value is not None else args[-1].node
        return Named(node, ctx.shape)

    return rule


def where(ctx: Context, c: Named, x: Named, y: Named) -> Named:
    return pointwise(ctx, "where", c, x, y)


def masked_fill(ctx: Context, x: Named, mask: Named, value: Named) -> Named:
    return pointwise(ctx, "where", mask, value, x)


def logical_not(ctx: Context, x: Named) -> Named:
    return Named(ctx.make("sub", ctx.const(1), x.node), x.axes)


def ne(ctx: Context, x: Named, y: Named) -> Named:
    return logical_not(ctx, pointwise(ctx, "eq", x, y))


def expm1(ctx: Context, x: Named) -> Named:
    return Named(ctx.make("sub", ctx.make("exp", x.node), ctx.const(1)), x.axes)


def exp2(ctx: Context, x: Named) -> Named:
    return Named(ctx.make("exp", ctx.make("mul", x.node, ctx.const(math.log(2)))), x.axes)


def log2(ctx: Context, x: Named) -> Named:
    return Named(ctx.make("div", ctx.make("log", x.node), ctx.const(math.log(2))), x.axes)


def logit(ctx: Context, x: Named, eps: float | None = None) -> Named:
    if eps is not None:
        x = clamp(ctx, x, Named(ctx.const(eps)), Named(ctx.const(1 - eps)))
    rest = logical_not(ctx, x)
    return Named(ctx.make("log", ctx.make("div", x.node, rest.node)), x.axes)


def lerp(ctx: Context, x: Named, y: Named, weight: Named) -> Named:
    """Torch computes the same sum from whichever end is nearer, which would hide that it is one."""
    return pointwise(ctx, "add", x, pointwise(ctx, "mul", weight, pointwise(ctx, "sub", y, x)))


def hypot(ctx: Context, x: Named, y: Named) -> Named:
    square = pointwise(ctx, "add", *(pointwise(ctx, "mul", z, z) for z in (x, y)))
    return Named(ctx.make("sqrt", square.node), square.axes)


def _plain(op: str) -> Callable[..., Named]:
    return lambda ctx, *operands: pointwise(ctx, op, *operands)


# aten name -> rule(context, *arguments): tensors come as Named, numbers that multiply tensors too.
RULES: dict[str, Callable[..., Any]] = {
    **{op: _plain(op) for op in "neg exp log log1p sigmoid tanh sqrt rsqrt abs sign relu sin cos erf".split()},
    **{op: _plain(op) for op in "mul maximum minimum gt ge lt le eq".split()},
    **dict.fromkeys("clone alias detach contiguous lift_fresh lift_fresh_copy _to_copy".split(), same),
    **dict.fromkeys("view _unsafe_view reshape unsqueeze _reshape_alias view_copy".split(), view),
    **dict.fromkeys("squeeze squeeze_ squeeze_copy".split(), squeeze),
    **dict.fromkeys("zeros zeros_like new_zeros".split(), fill(0)),
    **dict.fromkeys("ones ones_like new_ones".split(), fill(1)),
    **dict.fromkeys("logical_and bitwise_and".split(), _plain("mul")),
    **dict.fromkeys("logical_not bitwise_not".split(), logical_not),
    **dict.fromkeys("mm mv dot".split(), mm),
    "bmm": bmm, "add": scaled("add"), "sub": scaled("sub"), "rsub": rsub, "div": div, "pow": power,
    "reciprocal": _plain("recip"), "sgn": _plain("sign"), "log_sigmoid_forward": lambda ctx, x: (
        Named(ctx.make("logsigmoid", x.node), x.axes), x),
    "softplus": softplus, "clamp": clamp, "clamp_min": clamp, "logaddexp": logaddexp,
    "clamp_max": lambda ctx, x, high: clamp(ctx, x, None, high),
    "permute": permute, "transpose": transpose, "t": t, "expand": expand, "select": select, "slice": slice_,
    "sum": sum_, "mean": mean, "amax": amax, "amin": amin, "var": var, "var_mean": var_mean,
    "linalg_vector_norm": vector_norm, "_softmax": softmax, "_log_softmax": log_softmax,
    "logsumexp": logsumexp, "native_layer_norm": layer_norm, "addr": addr, "eye": eye,
    "diag_embed": diag_embed, "diagonal": diagonal, "diagonal_copy": diagonal,
    "full": fill(), "full_like": fill(), "new_full": fill(), "scalar_tensor": fill(),
    "bool": lambda ctx, x: ne(ctx, x, Named(ctx.const(0))), "max": largest(amax), "min": largest(amin),
    "exp2": exp2, "log2": log2, "logit": logit, "lerp": lerp, "hypot": hypot,
    "erfc": lambda ctx, x: logical_not(ctx, Named(ctx.make("erf", x.node), x.axes)),
    **dict.fromkeys("logical_or bitwise_or".split(), _plain("maximum")),
    **dict.fromkeys("logical_xor bitwise_xor".split(), ne),
    "expm1": expm1, "where": where, "masked_fill": masked_fill, "ne": ne,
}  # fmt: skip
