"""The closed table of chunk ops: what each computes on CPU, and its vjp in the same table.

`RULES` interprets the chunk-only ops for `ir.interpret.evaluate`; `VJP[op](node, d)` gives the gradients of
the operands from the gradient `d` of the result, None where there is none. A gradient may have axes that its operand
lacks (adjoint.py sums them), or lack axes of it (it is the same along them).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lmoe_compiler.ir.interpret import Rule, Value
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node
from lmoe_compiler.lower import algebra as al
from lmoe_compiler.lower import decayed as dyadic

# -- interpretation ---------------------------------------------------------------------------------


def _rows_last(x: Value, *last: str) -> tuple[Tensor, tuple[str, ...]]:
    """The tensor with the axes `last` moved to the end, and its axes."""
    axes = (*(a for a in x.axes if a not in last), *last)
    assert set(last) <= set(x.axes), (x.axes, last)
    return x.to(axes), axes


def running_sum(x: Tensor, inclusive: bool) -> Tensor:
    """Sum of the rows <= t (or < t) of [..., C]; the exclusive one is shifted, nothing is subtracted."""
    if inclusive:
        return x.cumsum(-1)
    return torch.nn.functional.pad(x[..., :-1].cumsum(-1), (1, 0))


def _prefix(node: Node, args: list[Value]) -> Value:
    x, axes = _rows_last(args[0], ROW)
    return Value(running_sum(x, bool(node["inclusive"])), axes)


def _suffix(node: Node, args: list[Value]) -> Value:
    if SOURCE in args[0].axes:
        return _suffix_of_pairs(node, args[0])
    x, axes = _rows_last(args[0], ROW)
    return Value(running_sum(x.flip(-1), bool(node["inclusive"])).flip(-1), axes)


def _suffix_of_pairs(node: Node, x: Value) -> Value:
    """Pairs [t, s] are gradients and finite, so their sums may be a product with ones."""
    pairs, axes = _rows_last(x, ROW, SOURCE)
    ones = pairs.new_ones(pairs.shape[-2:]).triu(0 if node["inclusive"] else 1)
    return Value(ones @ pairs, axes)


def segment_sums(g: Tensor, exclusive: bool) -> Tensor:
    """[..., t, s] sums of g [..., C] over (s, t], or (s, t); 0 where s >= t."""
    size = g.shape[-1]
    sums = g.unsqueeze(-1).expand(*g.shape, size).tril(-1).cumsum(-2)
    if exclusive:
        sums = torch.nn.functional.pad(sums[..., :-1, :], (0, 0, 1, 0)).tril(-1)
    return sums.tril(-1)


def _segment(node: Node, args: list[Value]) -> Value:
    g, axes = _rows_last(args[0], ROW)
    return Value(segment_sums(g, bool(node["exclusive"])), (*axes, SOURCE))


def _causal(node: Node, args: list[Value]) -> Value:
    x, axes = _rows_last(args[0], ROW, SOURCE)
    return Value(x.tril(-1 if node["strict"] else 0), axes)


def _decayed(function: Callable[..., Tensor]) -> Rule:
    def rule(node: Node, args: list[Value]) -> Value:
        axis = str(node["axis"])
        pairs = node.op != "decayed"
        layouts = [(ROW, SOURCE)] * pairs + [(ROW, axis)] * (len(args) - pairs)
        tensors = [value.to(axes) for value, axes in zip(args, layouts, strict=True)]
        result = function(*tensors, strict=bool(node["strict"]), exclusive=bool(node["exclusive"]))
        return Value(result, node.axes)

    return rule


def siblings(gate: Node) -> tuple[Node, Node]:
    """The gradients to rows and to sources that one pass over the levels gives beside a decayed_gate."""
    w, r, x, g = gate.args
    return _same("decayed_rows", gate, w, x, g), _same("decayed_cols", gate, w, r, g)


def decayed_gradients(gate: Node, args: Sequence[Value]) -> list[Value]:
    """The values of a decayed_gate's two siblings and of itself."""
    axes = (ROW, str(gate["axis"]))
    r, x, g = (value.to(axes) for value in args[1:])
    strict, exclusive = bool(gate["strict"]), bool(gate["exclusive"])
    results = dyadic.decayed_gradients(args[0].to((ROW, SOURCE)), r, x, g, strict, exclusive)
    return [Value(result, axes) for result in results]


def _solve(node: Node, args: list[Value]) -> Value:
    matrix = args[0].to((ROW, SOURCE))
    rest = tuple(a for a in args[1].axes if a != ROW)
    right = args[1].to((ROW, *rest))
    columns = right.flatten(right.dim() - len(rest)) if len(rest) > 1 else right
    columns = columns if rest else columns.unsqueeze(-1)
    solved = solve_unit(matrix, columns, bool(node["transposed"]))
    return Value(
        solved.view(*solved.shape[:-1], *right.shape[right.dim() - len(rest) :]), (ROW, *rest)
    )


def solve_unit(matrix: Tensor, right: Tensor, transposed: bool) -> Tensor:
    """(I - l)^-1 b or (I - l)^-T b for the strictly lower part l of `matrix`, by substitution."""
    left = -(matrix.mT if transposed else matrix)
    solved: Tensor = torch.linalg.solve_triangular(
        left, right, upper=transposed, unitriangular=True
    )
    return solved


RULES: dict[str, Rule] = {
    "prefix": _prefix,
    "suffix": _suffix,
    "segment": _segment,
    "causal": _causal,
    "decayed": _decayed(dyadic.decayed),
    "decayed_rows": _decayed(dyadic.decayed_rows),
    "decayed_cols": _decayed(dyadic.decayed_cols),
    "decayed_gate": _decayed(dyadic.decayed_gate),
    "solve": _solve,
}

# -- vector-Jacobian products -------------------------------------------------------------------------

Vjp = Callable[[Node, Node], Sequence[Node | None]]


def _unary(derivative: Callable[[Node, Node], Node]) -> Vjp:
    """From d y / d x as a function of (x, y)."""
    return lambda node, d: (al.mul(d, derivative(node.args[0], node)),)


def _guarded(value: Callable[[Node], Node], pole: float) -> Vjp:
    """d / value(x), and 0 at the pole: there the gradient is 0 / 0, and only -inf comes out of the op."""

    def vjp(node: Node, d: Node) -> tuple[Node]:
        (x,) = node.args
        return (al.where(al.make("eq", x, al.const(pole)), al.ZERO, al.div(d, value(x))),)

    return vjp


def _of_exp(node: Node, d: Node) -> tuple[Node]:
    """d * y. If y scales x, d is d' * x for some d': d' * y is then x's gradient, and is shared."""
    if d.op == "neg":
        return (al.neg(_of_exp(node, d.args[0])[0]),)
    if d.op == "mul" and al.of_pairs(node) and not al.of_pairs(d.args[1]):
        return (al.mul(_of_exp(node, d.args[0])[0], d.args[1]),)
    if d.op == "mul":
        return (al.mul(al.mul(d.args[0], node), d.args[1]),)
    return (al.mul(d, node),)


def _of_mul(node: Node, d: Node) -> Sequence[Node]:
    x, y = node.args
    return al.mul(d, y), al.mul(d, x)


def _of_div(node: Node, d: Node) -> Sequence[Node]:
    _, y = node.args
    return al.div(d, y), al.neg(al.mul(al.div(d, y), node))


def _of_pow(node: Node, d: Node) -> Sequence[Node | None]:
    x, y = node.args
    to_x = al.mul(d, al.mul(y, al.make("pow", x, al.add(y, al.const(-1)))))
    return to_x, None if y.op == "const" else al.mul(d, al.mul(node, al.make("log", x)))


def _of_extremum(wins: str) -> Vjp:
    """Ties share the gradient, as torch does."""

    def vjp(node: Node, d: Node) -> Sequence[Node]:
        x, y = node.args
        tie = al.mul(al.make("eq", x, y), al.const(0.5))
        first, second = al.make(wins, x, y), al.make(wins, y, x)
        return al.mul(d, al.add(first, tie)), al.mul(d, al.add(second, tie))

    return vjp


def _of_where(node: Node, d: Node) -> Sequence[Node | None]:
    condition = node.args[0]
    return None, al.where(condition, d, al.ZERO), al.where(condition, al.ZERO, d)


def _of_index(node: Node, d: Node) -> tuple[Node]:
    axis = str(node["axis"])
    one_hot = al.make(
        "index", al.make("delta", a=axis, b=f"{axis}''"), axis=f"{axis}''", at=node["at"]
    )
    return (al.mul(d, one_hot),)


def _of_max(node: Node, d: Node) -> tuple[Node]:
    (x,) = node.args
    hit = al.make("eq", x, node)
    return (al.mul(d, al.div(hit, al.sum_over(hit, str(node["axis"])))),)


def _of_dot(node: Node, d: Node) -> Sequence[Node]:
    x, y = node.args
    axis = str(node["axis"])
    beyond_x = [a for a in y.axes if a not in x.axes and a != axis]
    beyond_y = [a for a in x.axes if a not in y.axes and a != axis]
    return al.contract(d, y, beyond_x), al.contract(d, x, beyond_y)


def _of_running(op: str) -> Vjp:
    def vjp(node: Node, d: Node) -> tuple[Node]:
        assert ROW in d.axes, "a gradient that is the same in every row reached a running sum"
        return (al.make(op, d, inclusive=node["inclusive"]),)

    return vjp


def _of_segment(node: Node, d: Node) -> tuple[Node]:
    """Row u is in (s, t] for every s < u <= t: sum d over t >= u (t > u if exclusive), then over s < u."""
    later = al.suffix(d, inclusive=not node["exclusive"])
    return (al.sum_over(al.causal(later, strict=True), SOURCE),)


def _same(op: str, node: Node, *args: Node) -> Node:
    """Another member of the decayed family with this one's attributes."""
    return al.make(op, *args, **dict(node.attrs))


def _of_decayed(node: Node, d: Node) -> Sequence[Node]:
    r, x, g = node.args
    gate = _same("decayed_gate", node, d, r, x, g)
    return _same("decayed_rows", node, d, x, g), _same("decayed_cols", node, d, r, g), gate


def _of_decayed_rows(node: Node, d: Node) -> Sequence[Node]:
    w, x, g = node.args
    gate = _same("decayed_gate", node, w, d, x, g)
    return _same("decayed", node, d, x, g), _same("decayed_cols", node, w, d, g), gate


def _of_decayed_cols(node: Node, d: Node) -> Sequence[Node]:
    w, r, g = node.args
    gate = _same("decayed_gate", node, w, r, d, g)
    return _same("decayed", node, r, d, g), _same("decayed_rows", node, w, d, g), gate


def _of_solve(node: Node, d: Node) -> Sequence[Node]:
    """With (I - l) y = b: db = (I - l)^-T dy and dl = tril(db y', -1); transposed, the roles in dl swap."""
    transposed = bool(node["transposed"])
    to_right = al.solve(node.args[0], d, not transposed)
    rows, sources = (node, to_right) if transposed else (to_right, node)
    rest = [a for a in node.axes if a != ROW]
    return al.causal(al.contract(rows, al.as_source(sources), rest), strict=True), to_right


def _no_gradient(node: Node, d: Node) -> Sequence[None]:
    return (None,) * len(node.args)


HALF, TWO = al.const(0.5), al.const(2.0)
_GAUSS = al.const(2 / math.sqrt(math.pi))

VJP: dict[str, Vjp] = {
    "neg": lambda node, d: (al.neg(d),),
    "exp": _of_exp,
    "log": _guarded(lambda x: x, 0.0),
    "log1p": _guarded(lambda x: al.add(al.ONE, x), -1.0),
    "sigmoid": _unary(lambda x, y: al.mul(y, al.sub(al.ONE, y))),
    "logsigmoid": _unary(lambda x, y: al.make("sigmoid", al.neg(x))),
    "softplus": _unary(lambda x, y: al.make("sigmoid", x)),
    "tanh": _unary(lambda x, y: al.sub(al.ONE, al.mul(y, y))),
    "sqrt": _unary(lambda x, y: al.div(HALF, y)),
    "rsqrt": _unary(lambda x, y: al.mul(al.mul(y, al.mul(y, y)), al.const(-0.5))),
    "recip": _unary(lambda x, y: al.neg(al.mul(y, y))),
    "abs": _unary(lambda x, y: al.make("sign", x)),
    "relu": _unary(lambda x, y: al.make("gt", x, al.ZERO)),
    "sin": _unary(lambda x, y: al.make("cos", x)),
    "cos": _unary(lambda x, y: al.neg(al.make("sin", x))),
    "erf": _unary(lambda x, y: al.mul(al.exp(al.neg(al.mul(x, x))), _GAUSS)),
    "add": lambda node, d: (d, d),
    "sub": lambda node, d: (d, al.neg(d)),
    "mul": _of_mul,
    "div": _of_div,
    "pow": _of_pow,
    "maximum": _of_extremum("gt"),
    "minimum": _of_extremum("lt"),
    "where": _of_where,
    "cast": lambda node, d: (d,),
    "rename": lambda node, d: (al.rename(d, str(node["new"]), str(node["old"])),),
    "index": _of_index,
    "sum": lambda node, d: (d,),
    "max": _of_max,
    "dot": _of_dot,
    "prefix": _of_running("suffix"),
    "suffix": _of_running("prefix"),
    "segment": _of_segment,
    "causal": lambda node, d: (al.causal(d, bool(node["strict"])),),
    "decayed": _of_decayed,
    "decayed_rows": _of_decayed_rows,
    "decayed_cols": _of_decayed_cols,
    "solve": _of_solve,
} | dict.fromkeys("sign isfinite gt ge lt le eq".split(), _no_gradient)
