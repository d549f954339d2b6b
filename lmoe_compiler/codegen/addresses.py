"""A kernel's text under construction: statements, parameters, addresses and loads.

The first layer of the printer; expressions.py adds operations, parallel.py and loops.py walks over chunks, triton.py
the signature.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lmoe_compiler.codegen.names import axis_name, identifier
from lmoe_compiler.codegen.plan import Kernel, Plan, Value, padded
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.statements import (
    Block,
    axis_order,
    spread,
)
from lmoe_compiler.codegen.tile import inside_levels
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node
from lmoe_compiler.lower.program import VALID

INDENT = "    "


def _padding(node: Node) -> float:
    """What a stored value is in rows past the end: what a mask gives them, or 0."""
    masked = node.op == "where" and node.args[0].op == "input" and node.args[0].name == VALID
    return float(str(node.args[2]["value"])) if masked and node.args[2].op == "const" else 0.0


@dataclass(frozen=True)
class _Known:
    """Nodes below which nothing needs to be written: they are loaded, or written already."""

    loaded: Mapping[Node, Value]
    blocks: Mapping[Hashable, Block]

    def __contains__(self, node: Node) -> bool:
        return node in self.loaded or id(node) in self.blocks


class Addresses:
    """The lines of one kernel so far. `args` and `constants` are its parameters, in order, for the launcher."""

    def __init__(self, plan: Plan, kernel: Kernel) -> None:
        self.plan, self.kernel = plan, kernel
        program = plan.program
        self.inputs = {v.name: v for v in program.inputs}
        self.heads = dict(plan.input_heads)
        first = [] if kernel.order == "parallel" else list(kernel.tile_sizes)
        self.order = axis_order(
            [a for v in (*program.states, *program.inputs) for a in v.axes], first
        )
        self.blocks: dict[Hashable, Block] = {}
        self.casts: dict[str, str] = {}
        self.lines: list[str] = []
        self.depth = 1
        self.count = 0
        self.line_shown = ""
        self.args: dict[str, Value | str] = {}
        self.constants: dict[str, int] = {}
        self.axes_used: dict[str, None] = {}
        self.loads = {id(load.node): load.value for load in kernel.loads}
        self.sizes = plan.size_of
        self.cut = {load.node: load.value for load in kernel.loads}
        self.nodes = closure(kernel.roots, self.cut)
        self.levels = inside_levels(self.nodes)
        self.known = _Known(self.cut, self.blocks)
        self.splits = [
            (axis, split(self.nodes, axis, self.cut) or {}) for axis in kernel.tile_sizes
        ]
        self.splits += [
            (axis, split(self.nodes, axis, self.cut, True) or {}) for axis, _ in kernel.inner
        ]
        self.in_loop, self.guard = False, ""
        self.at, self.slot, self.at_span = ("i_t", "m_t"), "i_slot", "i_s"
        if any(n.op == "inverse" for n in self.nodes if n not in self.cut):
            self.constants["LEVELS"] = plan.chunk.bit_length() - 1

    def write(self, text: str) -> None:
        self.lines.append(INDENT * self.depth + text)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"b_{stem}{self.count}"

    def shape(self, dims: Sequence[str]) -> str:
        names = {ROW: "C", SOURCE: "C"}
        return "[" + ", ".join(names.get(d) or "B" + axis_name(self.axis(d)) for d in dims) + "]"

    def axis(self, dim: str) -> str:
        """The declared axis of a dimension (a primed copy shares it)."""
        return dim.rstrip("'")

    def assign(self, stem: str, text: str, dims: Sequence[str], kind: str = "fp32") -> Block:
        for d in dims:
            if d not in (ROW, SOURCE):
                self.axes_used[self.axis(d)] = None
        name = self.name(stem)
        self.write(f"{name} = {text}  # {self.shape(dims)}" if dims else f"{name} = {text}")
        return Block(name, tuple(dims), kind)  # type: ignore[arg-type]

    def quote(self, node: Node) -> None:
        """The user's line, once per run of statements that it produced."""
        if node.loc is not None and str(node.loc) != self.line_shown:
            self.line_shown = str(node.loc)
            self.write(f"# {node.loc}  {node.loc.text}".rstrip())

    def masked(self, dim: str) -> bool:
        axis = self.axis(dim)
        block = self.kernel.block_sizes.get(axis, padded(self.sizes[axis]))
        return self.sizes[axis] % block != 0

    def width(self, axes: Sequence[str]) -> str:
        return " * ".join("C" if a == SOURCE else axis_name(self.axis(a)) for a in axes) or "1"

    def row_block(
        self, pointer: str, axes: Sequence[str], heads: str, head: str, whole: bool
    ) -> tuple[str, str, tuple[str, ...]]:
        """Pointers [C, *axes] of the rows of this chunk, the mask, and the dimensions."""
        width, (row, mask) = self.width(axes), self.at
        row = row.replace("i_t", "i_t_all") if whole and self.sectioned else row
        for a in axes:
            if a != SOURCE:
                self.axes_used[self.axis(a)] = None
        dims = tuple(sorted((ROW, *axes), key=self.order))
        rows = spread("o_t", [ROW], dims)
        base = f"{pointer} + ({row} * {heads} + {head}) * ({width})"
        terms = [f"{rows} * ({heads} * {width})"]
        masks = [spread(mask, [ROW], dims)]
        for position, axis in enumerate(axes):
            rest = " * ".join(
                "C" if a == SOURCE else axis_name(self.axis(a)) for a in axes[position + 1 :]
            )
            index = spread("o_t" if axis == SOURCE else f"o_{axis_name(axis)}", [axis], dims)
            terms.append(f"{index} * ({rest})" if rest else index)
            if axis != SOURCE and self.masked(axis):
                masks.append(spread(f"m_{axis_name(axis)}", [axis], dims))
        place = " + ".join(terms)
        place = f"{base} + ({place})" if self.kernel.tuning.offsets else f"{base} + {place}"
        return place, " & ".join(masks), dims

    def state_block(
        self, pointer: str, index: str, axes: Sequence[str]
    ) -> tuple[str, str, tuple[str, ...]]:
        """Pointers [*axes] of one per-chunk, per-sequence or per-head value."""
        dims = tuple(sorted(axes, key=self.order))
        terms, masks = [f"{pointer} + {index} * ({self.width(axes)})"], []
        for position, axis in enumerate(axes):
            self.axes_used[self.axis(axis)] = None
            rest = " * ".join(axis_name(self.axis(a)) for a in axes[position + 1 :])
            at = spread(f"o_{axis_name(axis)}", [axis], dims)
            terms.append(f"{at} * ({rest})" if rest else at)
            if self.masked(axis):
                masks.append(spread(f"m_{axis_name(axis)}", [axis], dims))
        return " + ".join(terms), " & ".join(masks), dims

    @property
    def needs_tokens(self) -> bool:
        """Whether addresses depend on the number of tokens of the whole call."""
        return any(v.parts or v.per == "vector" for v in self.values())

    @property
    def sectioned(self) -> bool:
        """Whether a launch is of one section, tokens T_0 to T_0 + T of T_ALL."""
        return bool(self.plan.passed)

    def values(self) -> Iterable[Value]:
        return (*self.kernel.written, *self.kernel.read)

    def place(
        self, value: Value, name: str, part: int | None = None
    ) -> tuple[str, str, tuple[str, ...]]:
        """Pointers, mask and dimensions; of a value in parts those of one part, by default this program's."""
        whole = value.whole and self.sectioned
        if value.per == "row":
            if value.parts:
                tokens = "(TOKENS // T) * T_ALL" if whole else "TOKENS"
                rows = f"{self.part(part)} * {tokens}"
                name = f"{name} + {rows} * (H * ({self.width(value.axes)}))"
            return self.row_block(name, value.axes, "H", "i_h", value.whole)
        if value.per == "vector":
            row, mask = self.at
            head = f"({self.part(part)} * H + i_h)" if value.parts else "i_h.to(tl.int64)"
            return f"{name} + {head} * TOKENS + {row} + o_t", mask, (ROW,)
        slot = self.slot
        if whole and value.per == "chunk":
            slot = "(i_n.to(tl.int64) * tl.cdiv(T_ALL, C) + T_0 // C + i_c)"
        if value.per == "span":
            index = f"{self.span_index(value)}{' + 1' if value.of_next else ''}"
            slot = f"({self.first_slot(value)} + {index}).to(tl.int64)"
        if value.parts:
            slot = f"({self.part(part)} * {self.slots(value)} + {slot})"
        index = {
            "chunk": f"({slot} * H + i_h)",
            "sequence": "(i_n.to(tl.int64) * H + i_h)",
            "span": f"({slot} * H + i_h)",
            "head": "i_h",
        }[value.per]
        pointers, mask, dims = self.state_block(name, index, value.axes)
        there = [self.next_exists(value)] if value.of_next else []
        return pointers, " & ".join([*there, *([mask] if mask else [])]), dims

    def next_exists(self, value: Value) -> str:
        """Whether there is a span after this program's."""
        assert self.kernel.span == value.span
        if value.whole and self.sectioned:
            return "(T_0 + (i_s + 1) * SPAN < T_ALL)"
        return "(i_s + 1 < n_s)"

    def part(self, number: int | None) -> str:
        """A part's number: as given, or that of the tile which this program works on."""
        if number is not None:
            return f"tl.full([], {number}, tl.int64)"
        (axis,) = self.kernel.tile_sizes
        return f"i_{axis_name(axis)}.to(tl.int64)"

    def slots(self, value: Value) -> str:
        """How many slots the chunks or spans of all sequences have."""
        tokens = value.span if value.per == "span" else "C"
        if self.plan.varlen:
            return f"(TOKENS // {tokens} + N)"
        length = "T_ALL" if value.whole and self.sectioned else "T"
        return f"(TOKENS // T * tl.cdiv({length}, {tokens}))"

    def first_slot(self, value: Value) -> str:
        """The first slot of this sequence (and section) among all sequences' spans."""
        tokens = value.span
        if self.plan.varlen:
            return f"bos // {tokens} + i_n"
        if value.whole and self.sectioned:
            return f"i_n * tl.cdiv(T_ALL, {tokens}) + T_0 // {tokens}"
        return f"i_n * tl.cdiv(T, {tokens})"

    def span_index(self, value: Value) -> str:
        """Which span of its sequence a program reads or writes: its own, or the one that a chunk lies in."""
        if self.kernel.span == value.span:
            return self.at_span
        return f"i_c // {value.span // self.plan.chunk}"

    def load_text(self, pointers: str, mask: str, other: float = 0.0) -> str:
        mask = " & ".join(m for m in (mask, self.guard) if m)
        return (
            f"tl.load({pointers}, mask={mask}, other={other})" if mask else f"tl.load({pointers})"
        )

    def load(self, value: Value, other: float = 0.0) -> Block:
        text, dims = self.loaded(value, other)
        return self.assign(identifier(value.name), text, dims, "raw")

    def loaded(self, value: Value, other: float = 0.0) -> tuple[str, tuple[str, ...]]:
        """A value of the plan, the sum of its parts, and its dimensions."""
        name = identifier(value.name)
        self.args[name] = value
        places = [self.place(value, name, part) for part in range(value.parts)]
        *_, (_, _, dims) = places = places or [self.place(value, name)]
        texts = [self.load_text(pointers, mask, other) for pointers, mask, _ in places]
        return " + ".join(texts), dims

    def input(self, node: Node) -> Block:
        if node.name == VALID:
            return Block("m_t", (ROW,), "bool")
        name = identifier(node.name)
        self.args[name] = node.name
        axes = tuple(a for a in node.axes if a != ROW)
        heads, head = "H", "i_h"
        own = self.heads.get(node.name, self.plan.heads)
        if own != self.plan.heads:
            heads, head = f"H_{name}", f"i_h // (H // H_{name})"
            self.constants[heads] = own
        if ROW not in node.axes:
            index = head
            if self.is_token(node):
                index = f"({self.token} * {heads} + {head})"
            pointers, mask, dims = self.state_block(name, index, axes)
            return self.assign(name, self.load_text(pointers, mask), dims, "raw")
        pointers, mask, dims = self.row_block(name, axes, heads, head, whole=True)
        return self.assign(name, self.load_text(pointers, mask), dims, "raw")

    def is_token(self, node: Node) -> bool:
        """Whether an input node without rows differs from token to token."""
        return node.op == "input" and not (
            node.name in self.inputs and self.inputs[node.name].kind == "head"
        )

    @property
    def token(self) -> str:
        """The place of this program's token among all tokens of the call."""
        return self.at[0] if self.kernel.walks else "i_n.to(tl.int64)"

    def fetch(self, node: Node) -> Block:
        if id(node) not in self.loads:
            return self.input(node)
        return self.load(self.loads[id(node)], _padding(node))

    def is_load(self, node: Node) -> bool:
        return node in self.cut or (node.op == "input" and node.name != VALID)

    def is_state(self, node: Node) -> bool:
        """Whether a load is of a whole state, too large to wait in registers."""
        return ROW not in node.axes and len(node.axes) > 1

    def inner_split(self, node: Node) -> str:
        return self.splits[-1][1][node] if self.kernel.inner else "whole"

    def fp32(self, block: Block) -> Block:
        if block.type == "fp32":
            return block
        if block.text not in self.casts:
            name = f"{block.text}_f" if block.text.isidentifier() else self.name("f")
            self.write(f"{name} = {block.text}.to(tl.float32)")
            self.casts[block.text] = name
        return Block(self.casts[block.text], block.dims)

    def dot_type(self, block: Block) -> Block:
        key = f"{block.text}:dot"
        if key not in self.casts:
            name = f"{block.text}_d" if block.text.isidentifier() else self.name("d")
            self.write(f"{name} = {block.text}.to(DOT)")
            self.casts[key] = name
        return Block(self.casts[key], block.dims)

    def dims_of(self, node: Node) -> tuple[str, ...]:
        return tuple(sorted(node.axes, key=self.order))

    def broadcast(self, block: Block, axes: Sequence[str]) -> str:
        dims = tuple(sorted(axes, key=self.order))
        if block.dims == dims:
            return block.text
        return f"{spread(block.text, block.dims, dims)} + tl.zeros({self.shape(dims)}, tl.float32)"
