"""One statement per node: pointwise operations, products, reductions, sums over levels, stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from lmoe_compiler.codegen.addresses import Addresses
from lmoe_compiler.codegen.names import axis_name, identifier
from lmoe_compiler.codegen.near_form import is_running
from lmoe_compiler.codegen.plan import Kernel, Plan, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import bare
from lmoe_compiler.codegen.statements import (
    CHUNK_OPS,
    COMPARISONS,
    Block,
    Type,
    chunk_op,
    pointwise,
    spread,
)
from lmoe_compiler.ir.nodes import POINTWISE, ROW, SOURCE, Node


class Expressions(Addresses):
    """Prints nodes, operands first, each once.

    totals     of sums over levels: blocks outside of the loop over tiles that they are added to
    """

    def __init__(self, plan: Plan, kernel: Kernel) -> None:
        super().__init__(plan, kernel)
        self.totals: dict[int, Block] = {}
        self.light: dict[int, bool] = {}

    def value(self, node: Node) -> Block:
        return self.blocks[id(node)]

    def made_of_loads(self, node: Node) -> bool:
        """Whether a block is computed from what is loaded, without a product. It is made last of a node's operands:
        products take time, and registers that it would be kept in.
        """
        if node in self.cut or not node.args or ROW not in node.axes or len(node.axes) < 2:
            return False
        found = self.light.get(id(node))
        if found is None:
            carried = {id(c.leaf) for c in self.kernel.carries}
            below = closure([node], self.cut)
            found = not any(n.op == "dot" or id(n) in carried for n in below)
            self.light[id(node)] = found
        return found

    def emit(self, root: Node) -> Block:
        for node in closure([root], self.known, self.made_of_loads):
            if id(node) not in self.blocks and not self.in_level(node):
                if node.op == "level_sum" and id(node) not in self.loads:
                    self.level_loop(node)
                elif id(node) in self.loads:
                    self.blocks[id(node)] = self.fetch(node)
                else:
                    self.quote(node)
                    self.blocks[id(node)] = self.statement(node)
                if self.kernel.levels == "near" and is_running(node):
                    total = self.fp32(self.value(node)).text
                    self.write(f"b_reach = tl.maximum(b_reach, reach({total}))")
        return self.value(root)

    def in_level(self, node: Node) -> bool:
        """Whether the value differs from level to level, so that it is written inside the level loop only."""
        return node in self.levels and not self.in_loop

    def level_loop(self, first: Node) -> None:
        """One loop over the dyadic levels for every sum that can run beside `first`.

        It starts with blocks of 16 rows if these are near.
        """
        sums = [
            n
            for n in self.nodes
            if n.op == "level_sum" and id(n) not in self.blocks and id(n) not in self.loads
        ]
        alike = lambda n: (self.inner_split(n), id(n) in self.totals)  # noqa: E731
        sums = [n for n in sums if alike(n) == alike(first)]
        below = {id(n): {id(x) for x in closure(n.args, self.cut)} for n in sums}
        sums = [
            n
            for n in sums
            if n is first or not any(id(m) in below[id(n)] or id(n) in below[id(m)] for m in sums)
        ]
        for node in closure([n.args[0] for n in sums], self.known):
            if not self.in_level(node):
                self.emit(node)
        totals = [self.totals.get(id(n)) or self.zeros(self.dims_of(n)) for n in sums]
        self.constants["LEVELS"] = self.plan.chunk.bit_length() - 1
        found = [n for n in closure([n.args[0] for n in sums], self.cut) if n.op == "level_sums"]
        gates = list(dict.fromkeys(n.args[0] for n in found))
        starts = [f"first_near({self.fp32(self.value(g)).text}, C, NEAR)" for g in gates]
        self.write(f"start = {reduce(lambda x, y: f'tl.minimum({x}, {y})', starts)}")
        self.write("for level in range(tl.maximum(start - 1, 0), LEVELS):")
        self.depth += 1
        self.level_body(sums, totals)
        self.depth -= 1
        for node, total in zip(sums, totals, strict=True):
            self.blocks[id(node)] = total

    def zeros(self, dims: Sequence[str]) -> Block:
        return self.assign("sum", f"tl.zeros({self.shape(dims)}, tl.float32)", dims)

    def level_body(self, sums: Sequence[Node], totals: Sequence[Block]) -> None:
        """One level's terms."""
        self.in_loop, outside, casts = True, dict(self.blocks), dict(self.casts)
        for node, total in zip(sums, totals, strict=True):
            block = self.emit(node.args[0])
            self.write(f"{total.text} += {self.broadcast(block, total.dims)}")
        self.blocks.clear()
        self.blocks.update(outside)
        self.casts, self.in_loop = casts, False

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
        if node.op == "rounded":
            return replace(self.dot_type(operands[0]), type="raw")
        if node.op == "dot":
            computed = not all(self.is_load(bare(a)) for a in node.args)
            full = (self.kernel.tuning.full and computed) or any(map(self.kept_full, node.args))
            return self.dot(str(node["axis"]), operands[0], operands[1], full)
        if node.op in ("sum", "max"):
            return self.reduce(node, operands[0])
        if node.op == "index":
            return self.index(node, self.fp32(operands[0]))
        if node.op == "level_sign":
            return self.assign("sign", "level_sign(level, start)", ())
        if node.op == "delta":
            a, b = node.axes
            dims = tuple(sorted(node.axes, key=self.order))
            left, right = (spread(f"o_{axis_name(x)}", [x], dims) for x in (a, b))
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
        kind: Type = "bool" if node.op in COMPARISONS else "fp32"
        return self.numbered(pointwise(node, texts), dims, kind)

    def numbered(self, text: str, dims: Sequence[str], kind: Type = "fp32") -> Block:
        """The block of an expression: the one that has it already, where there is one."""
        key = (text, tuple(dims))
        if key not in self.blocks:
            self.blocks[key] = self.assign("", text, dims, kind)
        return self.blocks[key]

    def once(self, node: Node, operand: Node, text: str) -> str:
        """A whole operand added to a part counts in the first tile only. (Sums over an inner axis are complete.)"""
        for axis, found in self.splits[: len(self.kernel.tiles)]:
            if node.op in ("add", "sub") and found[node] == "part" and found[operand] == "whole":
                text = f"tl.where(i_{axis_name(axis)} == 0, {text}, 0.0)"
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
        mask = spread(f"m_{axis_name(axis)}", [axis], block.dims)
        return self.assign("", f"tl.where({mask}, {block.text}, 0.0)", block.dims, block.type)

    def kept_full(self, node: Node) -> bool:
        """Whether a factor [t, s] was stored in fp32, so that its products are not rounded to half precision."""
        value = self.cut.get(bare(node))
        return value is not None and value.dtype == "fp32" and SOURCE in value.axes

    def dot(self, axis: str, a: Block, b: Block, full: bool = False) -> Block:
        a, b = self.clean(None, a, axis), self.clean(None, b, axis)
        shared = [d for d in a.dims if d in b.dims and d != axis]
        rest_a = [d for d in a.dims if d != axis]
        rest_b = [d for d in b.dims if d != axis]
        if not shared and len(rest_a) == 1 and len(rest_b) == 1:
            if self.order(rest_a[0]) > self.order(rest_b[0]):
                a, b, rest_a, rest_b = b, a, rest_b, rest_a
            a, b = map(self.fp32 if full else self.dot_type, (a, b))
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

    def index(self, node: Node, block: Block) -> Block:
        """One entry of a static axis: the sum of a block that is zero elsewhere."""
        axis = str(node["axis"])
        position = block.dims.index(axis)
        self.axes_used[self.axis(axis)] = None
        here = spread(f"(o_{axis_name(axis)} == {node['at']})", [axis], block.dims)
        picked = f"tl.sum(tl.where({here}, {block.text}, 0.0), {position})"
        return self.assign("", picked, block.dims[:position] + block.dims[position + 1 :])

    def reduce(self, node: Node, block: Block) -> Block:
        axis = str(node["axis"])
        block = self.fp32(block)
        if axis not in block.dims:
            assert node.op == "max", node
            return block
        position = block.dims.index(axis)
        dims = block.dims[:position] + block.dims[position + 1 :]
        if node.op == "max" and axis not in (ROW, SOURCE) and self.masked(axis):
            mask = spread(f"m_{axis_name(axis)}", [axis], block.dims)
            return self.assign(
                "", f'tl.max(tl.where({mask}, {block.text}, -float("inf")), {position})', dims
            )
        block = self.clean(None, block, axis) if node.op == "sum" else block
        return self.assign("", f"tl.{node.op}({block.text}, {position})", dims)

    def store(self, node: Node, value: Value, at_end: bool = False) -> None:
        """A store in the loop over chunks, of spans at their start (of gradients at their end); `at_end` after it."""
        block = self.emit(node)
        name = identifier(value.name)
        self.args[name] = value
        pointers, mask, dims = self.place(value, name)
        text = self.fp32(block).text if block.type == "bool" else block.text
        if node.op == "const" and not dims:
            text = f"tl.full([], {text}, tl.float32)"
        if block.dims != dims:
            text = spread(text, block.dims, dims)
            zeros = f"tl.zeros({self.shape(dims)}, tl.float32)"
            text = f"{text} + {zeros}" if dims else text
        masks = [mask] if mask else []
        if not value.parts:
            masks += [f"(i_{axis_name(a)} == 0)" for a in self.kernel.tile_sizes if a not in dims]
        tail = f", mask={' & '.join(masks)}" if masks else ""
        cast = f"({text}).to({name}.dtype.element_ty)"
        inside = value.per == "span" and value.span > self.plan.chunk and not at_end
        if inside:
            chunks = value.span // self.plan.chunk
            last = f"(i_c % {chunks} == {chunks - 1}) | (i_c == n_c - 1)"
            first = f"i_c % {chunks} == 0"
            self.write(f"if {last if self.kernel.order == 'reverse' else first}:")
        self.depth += inside
        self.write(f"tl.store({pointers}, {cast}{tail})")
        self.depth -= inside
