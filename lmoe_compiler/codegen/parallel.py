"""Kernels whose programs have a chunk each: its statements alone, or in a loop over tiles of one axis; far kernels."""

from __future__ import annotations

from collections.abc import Sequence

from lmoe_compiler.codegen.addresses import INDENT
from lmoe_compiler.codegen.indices import Indices
from lmoe_compiler.codegen.names import axis_name, identifier
from lmoe_compiler.codegen.plan import FAR, Store
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node


class Parallel(Indices):
    """Prints the body of a kernel that is parallel over chunks."""

    def print_parallel(self) -> list[str]:
        if self.kernel.levels == "near":
            self.write("b_reach = tl.full([], 0.0, tl.float32)")
        self.print_rows()
        sums = [n for n in self.nodes if n.op == "level_sum" and n not in self.cut]
        self.print_loads(sums)
        stores = list(self.kernel.stores)
        if self.kernel.inner:
            stores = self.print_tiles(stores)
        else:
            for node in sums:
                self.emit(node)
        for store in stores:
            self.store(store.node, store.value)
        if self.kernel.levels == "near":
            self.write(f"tl.store({self.reach} + tl.program_id(0), b_reach)")
        return self.lines

    def print_loads(self, sums: Sequence[Node]) -> None:
        """Loads that do not differ from tile to tile, all together: nothing else brings them in flight at once.

        What is used after a loop over tiles only is loaded here too: there its latency would be waited for. Sums over
        levels fill the registers: what they do not read is loaded after them.
        """
        for node in closure(sums, self.cut) if sums else self.nodes:
            if self.is_load(node) and self.inner_split(node) == "whole" and not self.is_state(node):
                self.emit(node)

    @property
    def reach(self) -> str:
        assert self.kernel.reach is not None
        name = identifier(self.kernel.reach.name)
        self.args[name] = self.kernel.reach
        return name

    def print_far(self, lines: Sequence[str]) -> list[str]:
        """`lines`, of one program of the near kernel, for each of `FAR` whose chunk it did not do."""
        self.constants["FAR"] = FAR
        self.lines, self.depth = [], 1
        self.write("i_far = tl.program_id(0) * FAR + tl.arange(0, FAR)")
        self.write(
            f"b_reach = tl.load({self.reach} + i_far, mask=i_far < PROGRAMS, other=0.0)  # [FAR]"
        )
        self.write("if tl.max(b_reach, 0) <= NEAR:")
        self.write("    return")
        self.write("i_first = tl.program_id(0) * FAR")
        self.write("for i_far in range(i_first, tl.minimum(i_first + FAR, PROGRAMS)):")
        self.write(f"    if tl.load({self.reach} + i_far) > NEAR:")
        return [*self.lines, *(2 * INDENT + line for line in lines)]

    def print_tiles(self, stores: Sequence[Store]) -> list[Store]:
        """The loop over the inner axis: contractions over it and stores of tiles; the stores that remain.

        What follows from the sums is linear in them, and is computed once, after the loop.
        """
        kind = self.inner_split
        ((axis, _),) = self.kernel.inner
        # A result that is the same along the axis (a gradient of zeros) fills tiles too.
        tiles = [s for s in stores if kind(s.node) == "tile" or self.filled(s, axis)]
        # What needs nothing of the loop comes before it, so that nothing is kept for it.
        alone = [s for s in stores if s not in tiles and self.is_whole(s.node)]
        rest = [s for s in stores if s not in tiles and s not in alone]
        parts = [n for n in closure([s.node for s in rest], self.cut) if self.is_contraction(n)]
        walked = closure([*parts, *(s.node for s in tiles)], self.cut)
        for store in alone:
            self.store(store.node, store.value)
        users = [n for n in walked if kind(n) in ("tile", "part") and n not in self.cut]
        operands = {a for n in users for a in n.args}
        for node in walked:
            if kind(node) == "whole" and node in operands and not self.in_level(node):
                self.emit(node)
        totals = {node: self.zeros(self.dims_of(node)) for node in parts}
        sums = [n for n in parts if n.op == "level_sum"]
        self.totals = {id(n): totals[n] for n in sums}
        outside, casts = dict(self.blocks), dict(self.casts)
        a = axis_name(axis)
        self.write(f"for i_{a} in range(0, tl.cdiv({a}, B{a})):")
        self.depth += 1
        self.print_axis(axis)
        # Sums over levels fill the registers: what they do not read is loaded after them.
        levels = [n for n in walked if n.op == "level_sum" and kind(n) == "tile"]
        for node in closure(levels, self.cut) if levels else walked:
            if self.is_load(node) and kind(node) == "tile" and not self.stays_shared:
                self.emit(node)
        for node in levels:
            self.emit(node)
        for node, total in totals.items():
            block = self.emit(node)
            if id(node) not in self.totals:
                self.write(f"{total.text} += {self.broadcast(block, total.dims)}")
        for store in tiles:
            self.store(store.node, store.value)
        self.depth -= 1
        self.blocks.clear()
        self.blocks.update(outside | {id(n): t for n, t in totals.items()})
        self.casts = casts
        self.forget_pairs([s.node for s in rest])
        return rest

    @property
    def stays_shared(self) -> bool:
        """Whether products take blocks from shared memory (wgmma): they fill registers from their first use on only."""
        return self.plan.chunk >= 64 and self.kernel.tuning.num_warps >= 4

    def forget_pairs(self, roots: Sequence[Node]) -> None:
        """Blocks [t, s] that take no product are loaded and computed once more: kept through the loop they would spill.

        With all that they are made of, or the compiler would see that they are the same.
        """
        pair = {ROW, SOURCE}
        computed = [n for n in closure(roots, self.known) if n not in self.known]
        used = [a for n in computed if set(n.axes) == pair for a in n.args if set(a.axes) == pair]
        for nodes in [closure([a], self.cut) for a in used if self.is_whole(a)]:
            if all(n.op not in ("dot", "level_sum") or n in self.cut for n in nodes):
                for node in nodes:
                    self.blocks.pop(id(node), None)

    def is_whole(self, node: Node) -> bool:
        """Whether nothing below a value is of one tile, or added up over tiles."""
        return all(self.inner_split(n) == "whole" for n in closure([node], self.cut))

    def filled(self, store: Store, axis: str) -> bool:
        return self.inner_split(store.node) == "whole" and axis in store.value.axes

    def is_contraction(self, node: Node) -> bool:
        """Whether the loop over the inner axis adds this up: a contraction over it, or over levels of such ones."""
        if self.inner_split(node) != "part" or node in self.levels or node in self.cut:
            return False
        if node.op == "level_sum":
            inside = [n for n in closure(node.args, self.cut) if n in self.levels]
            return any(self.inner_split(a) == "tile" for n in inside for a in n.args)
        return any(self.inner_split(a) == "tile" for a in node.args)
