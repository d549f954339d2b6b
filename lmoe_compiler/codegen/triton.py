"""Prints a plan as a readable Triton module. It decides nothing: one statement per node of the tile graph.

Names follow flash-linear-attention: i_ program and loop indices, o_ offsets, m_ masks, p_ pointers, b_ blocks.
In: plan.py's kernels. Out: text that load.py writes to a file and imports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

from lmoe_compiler.codegen.partition import closure
from lmoe_compiler.codegen.plan import Carry, Kernel, Plan, Store, Value, padded
from lmoe_compiler.codegen.statements import (
    CHUNK_OPS,
    COMPARISONS,
    DEVICE_FUNCTIONS,
    Block,
    axis_order,
    chunk_op,
    pointwise,
    spread,
)
from lmoe_compiler.codegen.tile import inside_levels
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.ir.nodes import POINTWISE, ROW, SOURCE, Node
from lmoe_compiler.lower.program import VALID

INDENT = "    "


def identifier(name: str) -> str:
    """A Python name for an IR name: `d.o` -> `do`, `K'` -> `K_1`."""
    return re.sub(r"\W", "_", name.replace("d.", "d").replace("'", "_1"))


@dataclass(frozen=True)
class _Known:
    """Nodes below which nothing needs to be written: they are loaded, or written already."""

    loaded: Mapping[Node, Value]
    blocks: Mapping[int, Block]

    def __contains__(self, node: Node) -> bool:
        return node in self.loaded or id(node) in self.blocks


class KernelPrinter:
    """The text of one kernel. `args` and `constants` are its parameters, in order, for the launcher."""

    def __init__(self, plan: Plan, kernel: Kernel) -> None:
        self.plan, self.kernel = plan, kernel
        program = plan.program
        self.inputs = {v.name: v for v in program.inputs}
        self.heads = dict(plan.input_heads)
        first = [] if kernel.order == "parallel" else list(kernel.tile_sizes)
        self.order = axis_order(
            [a for v in (*program.states, *program.inputs) for a in v.axes], first
        )
        self.blocks: dict[int, Block] = {}
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
        self.nodes = closure(
            [*(s.node for s in kernel.stores), *(c.following for c in kernel.carries)], self.cut
        )
        self.levels = inside_levels(self.nodes)
        self.known = _Known(self.cut, self.blocks)
        self.splits = [
            (axis, split(self.nodes, axis, self.cut) or {}) for axis in kernel.tile_sizes
        ]
        self.splits += [
            (axis, split(self.nodes, axis, self.cut, True) or {}) for axis, _ in kernel.inner
        ]
        self.in_loop = False
        self.at = ("i_t", "m_t")
        if any(n.op == "inverse" for n in self.nodes if n not in self.cut):
            self.constants["LEVELS"] = plan.chunk.bit_length() - 1

    # ---- text

    def write(self, text: str) -> None:
        self.lines.append(INDENT * self.depth + text)

    def name(self, stem: str) -> str:
        self.count += 1
        return f"b_{stem}{self.count}"

    def shape(self, dims: Sequence[str]) -> str:
        names = {ROW: "C", SOURCE: "C"}
        return "[" + ", ".join(names.get(d) or "B" + identifier(self.axis(d)) for d in dims) + "]"

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

    # ---- addresses

    def masked(self, dim: str) -> bool:
        axis = self.axis(dim)
        block = self.kernel.block_sizes.get(axis, padded(self.sizes[axis]))
        return self.sizes[axis] % block != 0

    def width(self, axes: Sequence[str]) -> str:
        return " * ".join("C" if a == SOURCE else identifier(self.axis(a)) for a in axes) or "1"

    def row_block(
        self, pointer: str, axes: Sequence[str], heads: str, head: str
    ) -> tuple[str, str, tuple[str, ...]]:
        """Pointers [C, *axes] of the rows of this chunk, the mask, and the dimensions."""
        width, (row, mask) = self.width(axes), self.at
        for a in axes:
            if a != SOURCE:
                self.axes_used[self.axis(a)] = None
        dims = tuple(sorted((ROW, *axes), key=self.order))
        rows = spread("o_t", [ROW], dims)
        terms = [
            f"{pointer} + ({row} * {heads} + {head}) * ({width})",
            f"{rows} * ({heads} * {width})",
        ]
        masks = [spread(mask, [ROW], dims)]
        for position, axis in enumerate(axes):
            rest = " * ".join(
                "C" if a == SOURCE else identifier(self.axis(a)) for a in axes[position + 1 :]
            )
            index = spread("o_t" if axis == SOURCE else f"o_{identifier(axis)}", [axis], dims)
            terms.append(f"{index} * ({rest})" if rest else index)
            if axis != SOURCE and self.masked(axis):
                masks.append(spread(f"m_{identifier(axis)}", [axis], dims))
        return " + ".join(terms), " & ".join(masks), dims

    def state_block(
        self, pointer: str, index: str, axes: Sequence[str]
    ) -> tuple[str, str, tuple[str, ...]]:
        """Pointers [*axes] of one per-chunk, per-sequence or per-head value."""
        dims = tuple(sorted(axes, key=self.order))
        terms, masks = [f"{pointer} + {index} * ({self.width(axes)})"], []
        for position, axis in enumerate(axes):
            self.axes_used[self.axis(axis)] = None
            rest = " * ".join(identifier(self.axis(a)) for a in axes[position + 1 :])
            at = spread(f"o_{identifier(axis)}", [axis], dims)
            terms.append(f"{at} * ({rest})" if rest else at)
            if self.masked(axis):
                masks.append(spread(f"m_{identifier(axis)}", [axis], dims))
        return " + ".join(terms), " & ".join(masks), dims

    @property
    def needs_tokens(self) -> bool:
        """Whether addresses depend on the number of tokens of the whole call."""
        return any(v.parts or v.per == "vector" for v in self.values())

    def place(self, value: Value, name: str) -> tuple[str, str, tuple[str, ...]]:
        if value.per == "row":
            if value.parts:
                (axis,) = self.kernel.tile_sizes
                name = f"{name} + i_{identifier(axis)}.to(tl.int64) * TOKENS * (H * ({self.width(value.axes)}))"
            return self.row_block(name, value.axes, "H", "i_h")
        if value.per == "vector":
            row, mask = self.at
            return f"{name} + i_h.to(tl.int64) * TOKENS + {row} + o_t", mask, (ROW,)
        slot = "i_slot"
        if value.parts:
            (axis,) = (identifier(a) for a in self.kernel.tile_sizes)
            slots = f"(tl.num_programs(0) // (H * tl.cdiv({axis}, B{axis})))"
            slot = f"(i_{axis}.to(tl.int64) * {slots} + i_slot)"
        index = {
            "chunk": f"({slot} * H + i_h)",
            "sequence": "(i_n.to(tl.int64) * H + i_h)",
            "segment": "((i_n.to(tl.int64) * SEGMENTS + i_s) * H + i_h)",
            "head": "i_h",
        }[value.per]
        return self.state_block(name, index, value.axes)

    def load_text(self, pointers: str, mask: str) -> str:
        return f"tl.load({pointers}, mask={mask}, other=0.0)" if mask else f"tl.load({pointers})"

    # ---- values

    def load(self, value: Value) -> Block:
        name = identifier(value.name)
        self.args[name] = value
        pointers, mask, dims = self.place(value, name)
        return self.assign(name, self.load_text(pointers, mask), dims, "raw")

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
            if node.name in self.inputs and self.inputs[node.name].kind == "token":
                index = f"(i_n.to(tl.int64) * {heads} + {head})"
            pointers, mask, dims = self.state_block(name, index, axes)
            return self.assign(name, self.load_text(pointers, mask), dims, "raw")
        pointers, mask, dims = self.row_block(name, axes, heads, head)
        return self.assign(name, self.load_text(pointers, mask), dims, "raw")

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

    def value(self, node: Node) -> Block:
        return self.blocks[id(node)]

    def emit(self, root: Node) -> Block:
        for node in closure([root], self.known):
            if id(node) not in self.blocks and not self.in_level(node):
                if node.op == "level_sum" and id(node) not in self.loads:
                    self.level_loop(node)
                elif id(node) in self.loads:
                    self.blocks[id(node)] = self.load(self.loads[id(node)])
                else:
                    self.quote(node)
                    self.blocks[id(node)] = self.statement(node)
        return self.value(root)

    def in_level(self, node: Node) -> bool:
        """Whether the value differs from level to level, so that it is written inside the level loop only."""
        return node in self.levels and not self.in_loop

    def level_loop(self, first: Node) -> None:
        """One loop over the dyadic levels for every sum that can run beside `first`."""
        sums = [
            n
            for n in self.nodes
            if n.op == "level_sum" and id(n) not in self.blocks and id(n) not in self.loads
        ]
        sums = [n for n in sums if self.inner_split(n) == self.inner_split(first)]
        below = {id(n): {id(x) for x in closure(n.args, self.cut)} for n in sums}
        sums = [
            n
            for n in sums
            if n is first or not any(id(m) in below[id(n)] or id(n) in below[id(m)] for m in sums)
        ]
        for node in closure([n.args[0] for n in sums], self.cut):
            if not self.in_level(node):
                self.emit(node)
        totals = []
        for node in sums:
            dims = self.dims_of(node)
            totals.append(self.assign("sum", f"tl.zeros({self.shape(dims)}, tl.float32)", dims))
        self.constants["LEVELS"] = self.plan.chunk.bit_length() - 1
        gates = {
            n.args[0] for n in closure([n.args[0] for n in sums], self.cut) if n.op == "level_sums"
        }
        starts = [f"first_near({self.fp32(self.value(g)).text}, C, LEVELS, NEAR)" for g in gates]
        self.write(f"start = {reduce(lambda x, y: f'tl.minimum({x}, {y})', starts)}")
        self.write("for level in range(tl.maximum(start - 1, 0), LEVELS):")
        self.depth += 1
        self.in_loop, outside, casts = True, dict(self.blocks), dict(self.casts)
        for node, total in zip(sums, totals, strict=True):
            block = self.emit(node.args[0])
            self.write(f"{total.text} += {self.broadcast(block, total.dims)}")
        self.blocks.clear()
        self.blocks.update(outside)
        self.casts, self.in_loop = casts, False
        self.depth -= 1
        for node, total in zip(sums, totals, strict=True):
            self.blocks[id(node)] = total

    def dims_of(self, node: Node) -> tuple[str, ...]:
        return tuple(sorted(node.axes, key=self.order))

    def statement(self, node: Node) -> Block:
        if node.op == "input":
            return self.input(node)
        if node.op == "const":
            return Block(repr(float(node["value"])), ())  # type: ignore[arg-type]
        operands = [self.value(a) for a in node.args]
        if node.op in POINTWISE or node.op == "floor":
            return self.pointwise(node, operands)
        if node.op == "rename":
            return self.rename(node, operands[0])
        if node.op == "dot":
            return self.dot(str(node["axis"]), *operands)
        if node.op in ("sum", "max"):
            return self.reduce(node, operands[0])
        if node.op == "level_sign":
            return self.assign("sign", "level_sign(level, start)", ())
        if node.op == "delta":
            a, b = node.axes
            dims = tuple(sorted(node.axes, key=self.order))
            left, right = (spread(f"o_{identifier(x)}", [x], dims) for x in (a, b))
            return self.assign("delta", f"({left} == {right}).to(tl.float32)", dims)
        assert node.op in CHUNK_OPS, node.op
        block = self.fp32(operands[0])
        if node.op in ("prefix", "suffix") and block.dims[0] != ROW:
            raise NotImplementedError("running sums over rows of a tiled value")
        dims = {
            "segment": (ROW, SOURCE),
            "between": (ROW, SOURCE),
            "diagonal": (ROW, SOURCE),
            "diagonal_of": (ROW,),
        }.get(node.op, block.dims)
        return self.assign("", chunk_op(node, block), dims)

    def pointwise(self, node: Node, operands: Sequence[Block]) -> Block:
        dims = tuple(sorted(dict.fromkeys(d for o in operands for d in o.dims), key=self.order))
        texts = []
        for position, operand in enumerate(operands):
            if node.op == "where" and position == 0:
                if operand.type != "bool":
                    operand = Block(f"({operand.text} != 0.0)", operand.dims, "bool")
            else:
                operand = self.fp32(operand)
            text = spread(operand.text, operand.dims, dims)
            texts.append(self.once(node, node.args[position], text))
        kind = "bool" if node.op in COMPARISONS else "fp32"
        return self.assign("", pointwise(node, texts), dims, kind)

    def once(self, node: Node, operand: Node, text: str) -> str:
        """A whole operand added to a part counts in the first tile only."""
        for axis, found in self.splits:
            if node.op in ("add", "sub") and found[node] == "part" and found[operand] == "whole":
                text = f"tl.where(i_{identifier(axis)} == 0, {text}, 0.0)"
        return text

    def rename(self, node: Node, block: Block) -> Block:
        old, new = str(node["old"]), str(node["new"])
        dims = tuple(new if d == old else d for d in block.dims)
        canonical = tuple(sorted(dims, key=self.order))
        if dims == canonical:
            return Block(block.text, dims, block.type)
        assert len(dims) == 2, dims
        return self.assign("", f"tl.trans({block.text})", canonical, block.type)

    def clean(self, node: Node | None, block: Block, axis: str) -> Block:
        """`block` with zeros past the end of a padded axis."""
        if axis in (ROW, SOURCE) or not self.masked(axis):
            return block
        mask = spread(f"m_{identifier(axis)}", [axis], block.dims)
        return self.assign("", f"tl.where({mask}, {block.text}, 0.0)", block.dims, block.type)

    def dot(self, axis: str, a: Block, b: Block) -> Block:
        a, b = self.clean(None, a, axis), self.clean(None, b, axis)
        shared = [d for d in a.dims if d in b.dims and d != axis]
        rest_a = [d for d in a.dims if d != axis]
        rest_b = [d for d in b.dims if d != axis]
        if not shared and len(rest_a) == 1 and len(rest_b) == 1:
            if self.order(rest_a[0]) > self.order(rest_b[0]):
                a, b, rest_a, rest_b = b, a, rest_b, rest_a
            a, b = self.dot_type(a), self.dot_type(b)
            left = a.text if a.dims[1] == axis else f"tl.trans({a.text})"
            right = b.text if b.dims[0] == axis else f"tl.trans({b.text})"
            return self.assign(
                "", f"tl.dot({left}, {right}, input_precision=PRECISION)", [*rest_a, *rest_b]
            )
        dims = tuple(sorted(dict.fromkeys([*a.dims, *b.dims]), key=self.order))
        x, y = (spread(o.text, o.dims, dims) for o in (self.fp32(a), self.fp32(b)))
        position = dims.index(axis)
        return self.assign(
            "", f"tl.sum({x} * {y}, {position})", dims[:position] + dims[position + 1 :]
        )

    def reduce(self, node: Node, block: Block) -> Block:
        axis = str(node["axis"])
        block = self.fp32(block)
        if axis not in block.dims:
            assert node.op == "max", node
            return block
        position = block.dims.index(axis)
        dims = block.dims[:position] + block.dims[position + 1 :]
        if node.op == "max" and axis not in (ROW, SOURCE) and self.masked(axis):
            mask = spread(f"m_{identifier(axis)}", [axis], block.dims)
            return self.assign(
                "", f'tl.max(tl.where({mask}, {block.text}, -float("inf")), {position})', dims
            )
        block = self.clean(None, block, axis) if node.op == "sum" else block
        return self.assign("", f"tl.{node.op}({block.text}, {position})", dims)

    def store(self, node: Node, value: Value) -> None:
        block = self.emit(node)
        name = identifier(value.name)
        self.args[name] = value
        pointers, mask, dims = self.place(value, name)
        text = self.fp32(block).text if block.type == "bool" else block.text
        if block.dims != dims:
            text = spread(text, block.dims, dims)
            zeros = f"tl.zeros({self.shape(dims)}, tl.float32)"
            text = f"{text} + {zeros}" if dims else text
        masks = [mask] if mask else []
        if not value.parts:
            masks += [f"(i_{identifier(a)} == 0)" for a in self.kernel.tile_sizes if a not in dims]
        tail = f", mask={' & '.join(masks)}" if masks else ""
        cast = f"({text}).to({name}.dtype.element_ty)"
        self.write(f"tl.store({pointers}, {cast}{tail})")

    # ---- the kernel

    def print(self, function: str) -> list[str]:
        """Signature, index arithmetic, and the chunk's statements in a loop (or alone, if parallel)."""
        prints = {"parallel": self.print_parallel, "step": self.print_step}
        body = prints.get(self.kernel.order, self.print_scan)()
        self.lines, self.depth = [], 1
        self.print_indices()
        head = self.lines
        params = [*self.args]
        params += ["cu_seqlens", "N"] if self.plan.varlen else []
        constants = self.constant_names()
        params += ["TOKENS"] if self.needs_tokens else []
        signature = ", ".join([*params, "T"])
        constexprs = ", ".join(f"{c}: tl.constexpr" for c in constants)
        skip = ", ".join(f'"{p}"' for p in [*params, "T"] if p in ("N", "TOKENS", "T"))
        return [
            f"@triton.jit(do_not_specialize=[{skip}])",
            f"def {function}(",
            f"    {signature},",
            f"    {constexprs},",
            "):",
            *head,
            *body,
        ]

    def constant_names(self) -> dict[str, int | str]:
        """Compile-time parameters and their values (types are given by the launcher)."""
        names: dict[str, int | str] = {"H": self.plan.heads, **self.constants, "C": self.plan.chunk}
        for axis in self.axes_used:
            names[identifier(axis)] = self.sizes[axis]
            names["B" + identifier(axis)] = self.kernel.block_sizes.get(
                axis, padded(self.sizes[axis])
            )
        return names | {
            "DOT": "DOT",
            "PRECISION": "PRECISION",
            "INVERSE": "INVERSE",
            "SPLIT": "SPLIT",
            "NEAR": "NEAR",
        }

    def print_indices(self) -> None:
        kernel, varlen = self.kernel, self.plan.varlen
        self.write("i_p = tl.program_id(0)")
        for axis in kernel.tile_sizes:
            a = identifier(axis)
            self.write(f"i_{a} = i_p % tl.cdiv({a}, B{a})")
            self.write(f"i_p = i_p // tl.cdiv({a}, B{a})")
        self.write("i_h = i_p % H")
        if kernel.order == "step":
            self.write("i_n = i_p // H")
        elif kernel.order != "parallel":
            self.print_segment()
        elif varlen:
            self.write("i_slot = (i_p // H).to(tl.int64)")
            self.write("i_n = find_sequence(cu_seqlens, N, i_slot, C)")
            self.print_sequence()
            self.write("i_c = (i_slot - bos // C - i_n).to(tl.int32)")
        else:
            self.write("n_c = tl.cdiv(T, C)")
            self.write("i_slot = (i_p // H).to(tl.int64)")
            self.write("i_n = i_p // H // n_c")
            self.write("i_c = i_p // H % n_c")
            self.write("bos = i_n.to(tl.int64) * T")
        if kernel.order != "step":
            self.write("o_t = tl.arange(0, C)")
        for axis in self.axes_used:
            if axis not in dict(self.kernel.inner):
                self.print_axis(axis)

    def print_segment(self) -> None:
        """The sequence of this program and its chunks i_first .. i_last."""
        if self.kernel.segments == 1:
            self.write("i_n = i_p // H")
            self.print_sequence()
            return
        self.constants["SEGMENTS"] = self.kernel.segments
        self.write("i_s = i_p // H % SEGMENTS")
        self.write("i_n = i_p // H // SEGMENTS")
        self.print_sequence()
        self.write("i_first = i_s * tl.cdiv(n_c, SEGMENTS)")
        self.write("i_last = tl.minimum(i_first + tl.cdiv(n_c, SEGMENTS), n_c)")
        if self.kernel.skip_last:
            self.write("i_last = tl.where(i_s == SEGMENTS - 1, i_first, i_last)")

    def print_axis(self, axis: str) -> None:
        a = identifier(axis)
        start = f"i_{a} * B{a} + " if axis in self.kernel.block_sizes else ""
        primes = {d for d in self.primed if self.axis(d) == axis} | {axis}
        for dim in sorted(primes):
            d = identifier(dim)
            self.write(f"o_{d} = {start if dim == axis else ''}tl.arange(0, B{a})")
            if self.masked(axis):
                self.write(f"m_{d} = o_{d} < {a}")

    @property
    def primed(self) -> set[str]:
        return {d for block in self.blocks.values() for d in block.dims if d.endswith("'")}

    def print_sequence(self) -> None:
        if not self.plan.varlen:
            self.write("n_c = tl.cdiv(T, C)")
            self.write("bos = i_n.to(tl.int64) * T")
            return
        self.write("bos = tl.load(cu_seqlens + i_n).to(tl.int64)")
        self.write("T = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)")
        self.write("n_c = tl.cdiv(T, C)")

    def print_rows(self) -> None:
        self.write("i_t = bos + i_c * C")
        self.write("m_t = i_c * C + o_t < T")

    def print_parallel(self) -> list[str]:
        """All loads first: without a loop nothing else brings them in flight together."""
        self.print_rows()
        for node in self.nodes:
            if self.is_load(node) and self.inner_split(node) == "whole" and not self.is_state(node):
                self.emit(node)
        stores = list(self.kernel.stores)
        if self.kernel.inner:
            stores = self.print_tiles(stores)
        for store in stores:
            self.store(store.node, store.value)
        return self.lines

    def is_state(self, node: Node) -> bool:
        """Whether a load is of a whole state, too large to wait in registers."""
        return ROW not in node.axes and len(node.axes) > 1

    def is_load(self, node: Node) -> bool:
        return node in self.cut or (node.op == "input" and node.name != VALID)

    def inner_split(self, node: Node) -> str:
        return self.splits[-1][1][node] if self.kernel.inner else "whole"

    def print_tiles(self, stores: Sequence[Store]) -> list[Store]:
        """The loop over the inner axis: stores of tiles inside it, sums of parts kept; the stores that remain."""
        kind = self.inner_split
        users = [n for n in self.nodes if kind(n) in ("tile", "part")]
        for node in self.nodes:
            if kind(node) == "whole" and any(node in u.args for u in users if u not in self.cut):
                if not self.in_level(node):
                    self.emit(node)
        needed = {a for n in self.nodes if kind(n) == "late" and n not in self.cut for a in n.args}
        needed |= {s.node for s in stores}
        totals: dict[Node, Block] = {}
        for node in self.nodes:
            if kind(node) == "part" and node in needed:
                dims = self.dims_of(node)
                totals[node] = self.assign("sum", f"tl.zeros({self.shape(dims)}, tl.float32)", dims)
        outside, casts = dict(self.blocks), dict(self.casts)
        ((axis, _),) = self.kernel.inner
        a = identifier(axis)
        self.write(f"for i_{a} in range(0, tl.cdiv({a}, B{a})):")
        self.depth += 1
        self.print_axis(axis)
        for node in self.nodes:
            if self.is_load(node) and kind(node) == "tile":
                self.emit(node)
        for node, total in totals.items():
            self.write(f"{total.text} += {self.broadcast(self.emit(node), total.dims)}")
        for store in stores:
            if kind(store.node) == "tile":
                self.store(store.node, store.value)
        self.depth -= 1
        self.blocks.clear()
        self.blocks.update(outside | {id(n): t for n, t in totals.items()})
        self.casts = casts
        return [s for s in stores if kind(s.node) != "tile"]

    def print_step(self) -> list[str]:
        for carry in self.kernel.carries:
            self.print_start(carry, f"b_{identifier(carry.leaf.name)}")
        for store in self.kernel.stores:
            self.store(store.node, store.value)
        for carry in self.kernel.carries:
            block = self.fp32(self.emit(carry.following))
            if carry.end is not None:
                self.print_end(carry.end, self.broadcast(block, carry.axes), carry.axes)
        return self.lines

    def print_scan(self) -> list[str]:
        names = [f"b_{identifier(_leaf_name(c.leaf))}" for c in self.kernel.carries]
        for carry, name in zip(self.kernel.carries, names, strict=True):
            self.print_start(carry, name)
        reverse = self.kernel.order == "reverse"
        rotated = self.print_first(reverse)
        chunks = "range(0, n_c)" if self.kernel.segments == 1 else "range(i_first, i_last)"
        self.write(f"for i_r in {chunks}:" if reverse else f"for i_c in {chunks}:")
        self.depth += 1
        if reverse:
            self.write("i_c = n_c - 1 - i_r")
        self.print_rows()
        if any(v.per == "chunk" for v in self.values()):
            self.write(
                "i_slot = "
                + ("bos // C + i_n + i_c" if self.plan.varlen else "i_n.to(tl.int64) * n_c + i_c")
            )
        self.print_rotation(rotated, reverse)
        leaves = [c.leaf for c in self.kernel.carries]
        for store in sorted(self.kernel.stores, key=lambda s: s.node not in leaves):
            self.store(store.node, store.value)
        after = [self.fp32(self.emit(c.following)) for c in self.kernel.carries]
        for carry, name, block in zip(self.kernel.carries, names, after, strict=True):
            self.write(f"{name} = {self.broadcast(block, carry.axes)}")
        self.depth -= 1
        self.casts.clear()
        for carry, name in zip(self.kernel.carries, names, strict=True):
            if carry.end is not None:
                self.print_end(carry.end, name, carry.axes)
        return self.lines

    def rotates(self, node: Node) -> bool:
        """Whether a load should be in flight for a whole iteration: a block that no product takes as it is.

        The compiler copies blocks that products use directly to shared memory ahead of time, and no others.
        """
        if not self.is_load(node) or len(node.axes) != 2 or ROW not in node.axes:
            return False
        same = {node} | {
            n for n in self.nodes if n.op == "rename" and n.args[0] is node and n not in self.cut
        }
        users = [n for n in self.nodes if n not in self.cut and any(a in same for a in n.args)]
        return not any(n.op == "dot" and len(n.axes) == 2 for n in users)

    def print_first(self, reverse: bool) -> list[tuple[Node, str]]:
        """The first chunk's blocks of rotated loads, before the loop."""
        nodes = [n for n in self.nodes if self.rotates(n)]
        if not nodes or self.kernel.tuning.num_stages < 2:
            return []
        first = "i_first" if self.kernel.segments > 1 else "0"
        last = "i_last" if self.kernel.segments > 1 else "n_c"
        self.write(f"i_c = {f'{last} - 1' if reverse else first}")
        self.print_rows()
        rotated = []
        for node in nodes:
            block = self.blocks.pop(id(node)) if id(node) in self.blocks else self.fetch(node)
            name = f"{block.text}_next"
            self.write(f"{name} = {block.text}")
            rotated.append((node, name))
        return rotated

    def fetch(self, node: Node) -> Block:
        return self.load(self.loads[id(node)]) if id(node) in self.loads else self.input(node)

    def print_rotation(self, rotated: Sequence[tuple[Node, str]], reverse: bool) -> None:
        """Takes the blocks loaded an iteration ago and loads the next chunk's."""
        if not rotated:
            return
        self.write(f"i_ahead = i_c {'-' if reverse else '+'} 1")
        self.write("i_t_ahead = bos + i_ahead * C")
        self.write("m_t_ahead = (i_ahead >= 0) & (i_ahead * C + o_t < T)")
        self.at = ("i_t_ahead", "m_t_ahead")
        for node, name in rotated:
            own = name.removesuffix("_next")
            self.write(f"{own} = {name}")
            block = self.fetch(node)
            self.write(f"{name} = {block.text}")
            self.blocks[id(node)] = Block(own, block.dims, block.type)
        self.at = ("i_t", "m_t")

    def values(self) -> Iterable[Value]:
        return [*(s.value for s in self.kernel.stores), *(load.value for load in self.kernel.loads)]

    def broadcast(self, block: Block, axes: Sequence[str]) -> str:
        dims = tuple(sorted(axes, key=self.order))
        if block.dims == dims:
            return block.text
        return f"{spread(block.text, block.dims, dims)} + tl.zeros({self.shape(dims)}, tl.float32)"

    def print_start(self, carry: Carry, name: str) -> None:
        dims = tuple(sorted(carry.axes, key=self.order))
        for d in dims:
            self.axes_used[self.axis(d)] = None
        if carry.start is None:
            full = f"tl.full({self.shape(dims)}, {carry.fill}, tl.float32)"
            self.write(f"{name} = {full}" if dims else f"{name} = {carry.fill}")
        else:
            argument = identifier(carry.start.name)
            self.args[argument] = carry.start
            pointers, mask, _ = self.place(carry.start, argument)
            self.write(
                f"{name} = {self.load_text(pointers, mask)}.to(tl.float32)  # {self.shape(dims)}"
            )
        if carry.through is not None:
            self.print_through(carry, name, dims)
        self.blocks[id(carry.leaf)] = Block(name, dims)

    def print_through(self, carry: Carry, name: str, dims: Sequence[str]) -> None:
        """The state carried through the segments before this program's."""
        self.write("for i_before in range(0, i_s):")
        self.depth += 1
        texts = []
        for value in carry.through or ():
            argument = identifier(value.name)
            self.args[argument] = value
            index = "((i_n.to(tl.int64) * SEGMENTS + i_before) * H + i_h)"
            pointers, mask, own = self.state_block(argument, index, value.axes)
            loaded = self.assign(argument, self.load_text(pointers, mask), own)
            texts.append(spread(loaded.text, own, dims))
        self.write(f"{name} = {name} * {texts[0]} + {texts[1]}")
        self.depth -= 1

    def print_end(self, value: Value, name: str, axes: Sequence[str]) -> None:
        argument = identifier(value.name)
        self.args[argument] = value
        pointers, mask, dims = self.place(value, argument)
        masks = [mask] if mask else []
        masks += [f"(i_{identifier(a)} == 0)" for a in self.kernel.tile_sizes if a not in dims]
        if self.kernel.segments > 1 and value.per == "sequence":
            masks.append("(i_s == SEGMENTS - 1)")
        tail = f", mask={' & '.join(masks)}" if masks else ""
        self.write(f"tl.store({pointers}, {name}{tail})")


def _leaf_name(node: Node) -> str:
    return node.name


def function_name(plan: Plan, kernel: Kernel) -> str:
    return f"{identifier(plan.program.name)}_{plan.direction}_{kernel.name}"


def print_module(plan: Plan, header: Sequence[str]) -> tuple[str, dict[str, KernelPrinter]]:
    """The module's text, and per kernel the printer that knows its parameters."""
    printers: dict[str, KernelPrinter] = {}
    functions: list[str] = []
    for kernel in plan.kernels:
        printer = KernelPrinter(plan, kernel)
        functions += ["", "", *printer.print(function_name(plan, kernel))]
        printers[kernel.name] = printer
    body = "\n".join(functions)
    used = [f for f in DEVICE_FUNCTIONS if re.search(rf"(?<![\w.]){f}\(", body)]
    imports = ["import triton", "import triton.language as tl"]
    if used:
        imports += ["", f"from lmoe_compiler.codegen.device import {', '.join(used)}"]
    text = "\n".join(['"""', *header, '"""', "", *imports]) + body + "\n"
    return text, printers
