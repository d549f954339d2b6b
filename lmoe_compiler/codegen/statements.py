"""Tile rules: how each operation of a tile graph is written as a Triton expression.

A block is a register value with named dimensions in a fixed order: rows `t`, sources `s`, then the program's axes
as declared. Operands meet by name: `spread` inserts the missing dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lmoe_compiler.ir.nodes import ROW, SOURCE, Node

Type = Literal["fp32", "raw", "bool"]


@dataclass(frozen=True)
class Block:
    """A Triton expression; `raw` is as loaded (the dtype of its tensor), `bool` a comparison."""

    text: str
    dims: tuple[str, ...]
    type: Type = "fp32"


def axis_order(axes: Sequence[str], first: Sequence[str] = ()) -> Callable[[str], tuple[int, str]]:
    """Sort key of dimensions: `first`, t, s, then `axes` in order (primed copies after their originals).

    A scan puts its tiled axis first: on Hopper the left operand of a product may stay in registers, so the
    carried state and what is multiplied with it never pass through shared memory.
    """
    rank = {axis: i for i, axis in enumerate(dict.fromkeys([*first, ROW, SOURCE, *axes]))}

    def key(axis: str) -> tuple[int, str]:
        return rank.get(axis.rstrip("'"), 99), axis

    return key


def spread(text: str, dims: Sequence[str], over: Sequence[str]) -> str:
    """`text` with `dims` indexed so that it broadcasts over `over`."""
    if not dims or tuple(dims) == tuple(over):
        return text
    index = ", ".join(":" if d in dims else "None" for d in over)
    return f"{text}[{index}]"


UNARY: dict[str, str] = {
    "neg": "-{0}", "exp": "exp({0})", "log": "tl.log({0})", "log1p": "log1p({0})", "sigmoid": "tl.sigmoid({0})",
    "logsigmoid": "logsigmoid({0})", "softplus": "softplus({0})", "tanh": "tanh({0})",
    "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "recip": "1.0 / {0}", "abs": "tl.abs({0})",
    "sign": "sign({0})", "relu": "tl.maximum({0}, 0.0)", "sin": "tl.sin({0})", "cos": "tl.cos({0})",
    "erf": "tl.erf({0})", "isfinite": "isfinite({0})", "floor": "tl.maximum({0}, -104.0)",
}  # fmt: skip
BINARY: dict[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "pow": "power({0}, {1})", "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})",
    "gt": "{0} > {1}", "ge": "{0} >= {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "eq": "{0} == {1}",
    "where": "tl.where({0}, {1}, {2})",
}  # fmt: skip
COMPARISONS = frozenset({"gt", "ge", "lt", "le", "eq", "isfinite"})
SMALL_POWERS = {
    2.0: "{0} * {0}",
    0.5: "tl.sqrt({0})",
    -0.5: "tl.rsqrt({0})",
    -1.0: "1.0 / {0}",
    3.0: "{0} * {0} * {0}",
}


def pointwise(node: Node, operands: Sequence[str]) -> str:
    """The expression of a pointwise operation of already spread operands."""
    if node.op == "pow" and node.args[1].op == "const":
        template = SMALL_POWERS.get(float(node.args[1]["value"]))  # type: ignore[arg-type]
        if template:
            return template.format(operands[0])
    if node.op in UNARY:
        return UNARY[node.op].format(*operands)
    return BINARY[node.op].format(*operands)


def chunk_op(node: Node, operand: Block) -> str:
    """Operations over the rows of a chunk, of one fp32 block."""
    x = operand.text
    if node.op == "prefix":
        inclusive = f"running_sum({x}, C, SPLIT, PRECISION)"
        return inclusive if node["inclusive"] else f"exclusive_prefix({x}, C)"
    if node.op == "suffix":
        return (
            f"tl.cumsum({x}, 0, reverse=True)" if node["inclusive"] else f"exclusive_suffix({x}, C)"
        )
    if node.op == "segment":
        return f"segment_sums({x}, {bool(node['exclusive'])}, C)"
    if node.op == "between":
        return f"between({x}, C)"
    if node.op == "causal":
        relation = ">" if node["strict"] else ">="
        return f"tl.where(o_t[:, None] {relation} o_t[None, :], {x}, 0.0)"
    if node.op == "inverse":
        return f"inverse_unit_lower({x}, C, LEVELS, INVERSE)"
    if node.op == "pairs":
        return f"pairs({x}, level, start, C)"
    if node.op == "diagonal":
        return f"on_diagonal({x}, C)"
    if node.op == "diagonal_of":
        return f"diagonal_of({x}, C)"
    assert node.op in ("level_sums", "level_gather"), node.op
    side = f"{bool(node['exclusive'])}, {node['of'] == 'col'}"
    return f"{node.op}({x}, level, start, {side}, C, SPLIT, PRECISION)"


CHUNK_OPS = frozenset(
    "prefix suffix segment between causal inverse pairs diagonal diagonal_of level_sums level_gather".split()
)
DEVICE_FUNCTIONS = (
    "exp log1p softplus logsigmoid tanh sign isfinite power running_sum "
    "exclusive_prefix exclusive_suffix segment_sums between "
    "level_sums level_gather level_sign reach first_near pairs on_diagonal diagonal_of inverse_unit_lower find_sequence"
).split()
