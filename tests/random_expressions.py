"""Random named-axis expressions over a few inputs, for property tests of the text, the algebra and the emitter."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from lmoe_compiler.ir.interpret import Value, evaluate
from lmoe_compiler.ir.nodes import Node, Var, const, make
from lmoe_compiler.ir.spec import base
from lmoe_compiler.operations import another

INPUTS = (
    Var("q", "token", ("K",)),
    Var("k", "token", ("K",)),
    Var("v", "token", ("V",)),
    Var("g", "token", ()),
    Var("W", "head", ("K", "V")),
    Var("A", "head", ("K", "K'")),
)
STATES = (Var("S", "state", ("K", "V")), Var("z", "state", ("K",)))
SIZES = {"K": 3, "V": 4}
# Total functions with moderate slopes: what is tested is algebra, not overflow.
FUNCTIONS = ("exp", "sigmoid", "logsigmoid", "softplus", "tanh", "neg", "relu", "sin", "abs")
PAIRS = ("add", "sub", "mul", "maximum", "gt", "minimum")


@st.composite
def expressions(draw: st.DrawFn, depth: int = 4, variables: tuple[Var, ...] = INPUTS) -> Node:
    """An expression of `variables` of at most `depth` levels."""
    if depth == 0 or draw(st.integers(0, 9)) == 0:
        return draw(_leaves(variables))
    smaller = expressions(depth=depth - 1, variables=variables)
    x = draw(smaller)
    form = draw(
        st.sampled_from(
            ("function", "pair", "pair", "dot", "sum", "rename", "where", "power", "log")
        )
    )
    if form == "function":
        return make(draw(st.sampled_from(FUNCTIONS)), make("tanh", x))
    if form in ("pair", "where"):
        y = draw(smaller)
        if form == "pair":
            return make(draw(st.sampled_from(PAIRS)), x, y)
        return make("where", make("gt", x, const(0)), y, draw(_leaves(variables)))
    if form == "log":
        positive = make(draw(st.sampled_from(("exp", "sigmoid"))), make("tanh", x))
        return make("log", make("sum", positive, axis=x.axes[0]) if x.axes else positive)
    if form == "power":
        positive = make("add", make("exp", make("tanh", x)), const(0.5))
        return make("pow", positive, const(draw(st.sampled_from((-2, -1, -0.5, 0.5, 1, 2, 3)))))
    if not x.axes:
        return make("mul", const(draw(st.sampled_from((-1.5, 0.1, 2)))), x)
    axis = draw(st.sampled_from(x.axes))
    if form == "sum":
        return make(draw(st.sampled_from(("sum", "max"))), x, axis=axis)
    if form == "rename":
        return make("rename", x, old=axis, new=another(axis, x.axes))
    other = draw(smaller)
    return make("dot", x, other, axis=axis) if axis in other.axes else make("mul", x, other)


@st.composite
def _leaves(draw: st.DrawFn, variables: tuple[Var, ...]) -> Node:
    choice = draw(st.integers(0, len(variables) + 2))
    if choice < len(variables):
        return variables[choice].node
    if choice == len(variables):
        return make("size", axis="K")
    if choice == len(variables) + 1:
        return make("delta", a="K", b="K'")
    return const(draw(st.sampled_from((-2.0, -1.0, 0.0, 0.25, 1.0, 1e-6))))


def lengths() -> dict[str, int]:
    return {a + "'" * primes: n for a, n in SIZES.items() for primes in range(5)}


def environment(variables: tuple[Var, ...]) -> dict[Node, Value]:
    """Fixed random values."""
    random = torch.Generator().manual_seed(1)
    env = {}
    for var in variables:
        shape = [SIZES[base(a)] for a in var.axes]
        x = torch.randn(shape, dtype=torch.float64, generator=random)
        env[var.node] = Value(x, var.axes)
    return env


def value_of(node: Node, axes: tuple[str, ...] | None = None) -> torch.Tensor:
    """The expression's value at fixed random inputs, laid out along `axes`."""
    (value,) = evaluate([node], environment((*INPUTS, *STATES)), lengths())
    order = axes if axes is not None else tuple(sorted(value.axes))
    return value.to(order).expand([lengths()[a] for a in order])
