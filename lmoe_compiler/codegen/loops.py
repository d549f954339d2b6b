"""What surrounds a chunk's statements: program indices, the loop over chunks or tiles, carried states."""

from __future__ import annotations

from collections.abc import Sequence

from lmoe_compiler.codegen.addresses import INDENT, identifier
from lmoe_compiler.codegen.expressions import LATER, Expressions
from lmoe_compiler.codegen.plan import FAR, WALKS, Carry, Store, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.statements import (
    Block,
    spread,
)
from lmoe_compiler.ir.nodes import ROW, Node


class Loops(Expressions):
    """Prints the body of a kernel by its order: a scan, one chunk, or one token."""

    def print_indices(self) -> None:
        kernel, varlen = self.kernel, self.plan.varlen
        self.write(f"i_p = {'i_far' if kernel.levels == 'far' else 'tl.program_id(0)'}")
        for axis in kernel.tile_sizes:
            a = identifier(axis)
            self.write(f"i_{a} = i_p % tl.cdiv({a}, B{a})")
            self.write(f"i_p = i_p // tl.cdiv({a}, B{a})")
        self.write("i_h = i_p % H")
        if kernel.order == "step":
            self.write("i_n = i_p // H")
        elif kernel.order != "parallel":
            self.print_span()
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
            self.print_first_rows()
        if kernel.order not in ("step", *WALKS):
            self.write("o_t = tl.arange(0, C)")
        for axis in self.axes_used:
            if axis not in dict(self.kernel.inner):
                self.print_axis(axis)

    def print_span(self) -> None:
        """The sequence of this program and its chunks i_first .. i_last."""
        span = self.kernel.span
        if not span:
            self.write("i_n = i_p // H")
            self.print_sequence()
            return
        self.constants["SPAN"] = span
        if self.plan.varlen:
            self.write("i_n = find_sequence(cu_seqlens, N, i_p // H, SPAN)")
            self.print_sequence()
            self.write("i_s = (i_p // H - bos // SPAN - i_n).to(tl.int32)")
        else:
            self.write("i_s = i_p // H % tl.cdiv(T, SPAN)")
            self.write("i_n = i_p // H // tl.cdiv(T, SPAN)")
            self.print_sequence()
        self.write("n_s = tl.maximum(tl.cdiv(T, SPAN), 1)")
        self.write("i_first = i_s * (SPAN // C)")
        self.write("i_last = tl.minimum(i_first + SPAN // C, n_c)")
        if self.kernel.skip_last:
            self.write(f"i_last = tl.where({self.scanned_last}, i_first, i_last)")

    @property
    def scanned_last(self) -> str:
        """Whether no other span of the sequence starts from what this one ends with."""
        return "i_s == 0" if self.kernel.order == "reverse" else "i_s == n_s - 1"

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
            self.print_first_rows()
            return
        self.write("bos = tl.load(cu_seqlens + i_n).to(tl.int64)")
        self.write("T = (tl.load(cu_seqlens + i_n + 1) - bos).to(tl.int32)")
        self.write("n_c = tl.cdiv(T, C)")

    def print_first_rows(self) -> None:
        self.write("bos = i_n.to(tl.int64) * T")
        if self.sectioned:
            self.write("bos_all = i_n.to(tl.int64) * T_ALL + T_0")

    def print_rows(self) -> None:
        self.write("i_t = bos + i_c * C")
        if self.sectioned:
            self.write("i_t_all = bos_all + i_c * C")
        self.write("m_t = i_c * C + o_t < T")

    def print_parallel(self) -> list[str]:
        """All loads first: without a loop nothing else brings them in flight together.

        Sums over levels fill the registers: what they do not read is loaded after them.
        """
        if self.kernel.levels == "near":
            self.write("b_reach = tl.full([], 0.0, tl.float32)")
        self.print_rows()
        sums = [n for n in self.nodes if n.op == "level_sum" and n not in self.cut]
        early = closure(sums, self.cut) if sums else self.nodes
        for node in early:
            if self.is_load(node) and self.inner_split(node) == "whole" and not self.is_state(node):
                self.emit(node)
        for node in sums:
            if self.inner_split(node) != "tile" and not self.kernel.inner:
                self.emit(node)
        stores = list(self.kernel.stores)
        if self.kernel.inner:
            stores = self.print_tiles(stores)
        for store in stores:
            self.store(store.node, store.value)
        if self.kernel.levels == "near":
            self.write(f"tl.store({self.reach} + tl.program_id(0), b_reach)")
        return self.lines

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
        tiles = [s for s in stores if kind(s.node) == "tile"]
        rest = [s for s in stores if kind(s.node) != "tile"]
        parts = [n for n in closure([s.node for s in rest], self.cut) if self.is_contraction(n)]
        walked = closure([*parts, *(s.node for s in tiles)], self.cut)
        users = [n for n in walked if kind(n) in ("tile", "part") and n not in self.cut]
        operands = {a for n in users for a in n.args}
        for node in walked:
            if kind(node) == "whole" and node in operands and not self.in_level(node):
                self.emit(node)
        totals = {node: self.zeros(self.dims_of(node)) for node in parts}
        sums = [n for n in parts if n.op == "level_sum"]
        self.totals = {id(n): totals[n] for n in sums}
        outside, casts = dict(self.blocks), dict(self.casts)
        ((axis, _),) = self.kernel.inner
        a = identifier(axis)
        self.write(f"for i_{a} in range(0, tl.cdiv({a}, B{a})):")
        self.depth += 1
        self.print_axis(axis)
        for node in walked:
            if self.is_load(node) and kind(node) == "tile":
                self.emit(node)
        for node, total in totals.items():
            block = self.emit(node)
            if id(node) not in self.totals:
                self.write(f"{total.text} += {self.broadcast(block, total.dims)}")
        for store in tiles:
            self.store(store.node, store.value)
        self.depth -= 1
        for node in sums:
            if node.args[0].op == "pairs" and self.kernel.levels != "far":
                name = totals[node].text
                self.write(f"{name} = tl.where({LATER}, {name}, 0.0)")
        self.blocks.clear()
        self.blocks.update(outside | {id(n): t for n, t in totals.items()})
        self.casts = casts
        return rest

    def is_contraction(self, node: Node) -> bool:
        """Whether the loop over the inner axis adds this up: a contraction over it, or over levels of such ones."""
        if self.inner_split(node) != "part" or node in self.levels or node in self.cut:
            return False
        if node.op == "level_sum":
            inside = [n for n in closure(node.args, self.cut) if n in self.levels]
            return any(self.inner_split(a) == "tile" for n in inside for a in n.args)
        return any(self.inner_split(a) == "tile" for a in node.args)

    def print_step(self) -> list[str]:
        for carry in self.kernel.carries:
            self.print_start(carry, f"b_{identifier(carry.leaf.name)}")
        for store in self.kernel.stores:
            self.store(store.node, store.value)
        after = [self.fp32(self.emit(carry.following)) for carry in self.kernel.carries]
        # The next states may take the place of the states: nobody may still be reading.
        self.write("tl.debug_barrier()")
        for carry, block in zip(self.kernel.carries, after, strict=True):
            if carry.end is not None:
                self.print_end(carry.end, self.broadcast(block, carry.axes), carry.axes)
        return self.lines

    def print_scan(self) -> list[str]:
        names = [f"b_{identifier(c.leaf.name)}" for c in self.kernel.carries]
        for carry, name in zip(self.kernel.carries, names, strict=True):
            self.print_start(carry, name)
        reverse = self.kernel.order == "reverse"
        rotated = self.print_first(reverse)
        first, last = ("i_first", "i_last") if self.kernel.span else ("0", "n_c")
        self.write(f"for {'i_r' if reverse else 'i_c'} in range({first}, {last}):")
        self.depth += 1
        if reverse:
            self.write(f"i_c = {last} - 1 - i_r" + (" + i_first" if self.kernel.span else ""))
        self.print_rows()
        if self.slots_used:
            self.print_slot("i_slot", "i_c")
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
        if not self.is_load(node):
            return False
        value = self.cut.get(node)
        if value is not None and value.per == "chunk":
            return not self.is_state(node)
        if ROW not in node.axes or len(node.axes) > 2:
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
        first, last = ("i_first", "i_last") if self.kernel.span else ("0", "n_c")
        self.write(f"i_c = {f'{last} - 1' if reverse else first}")
        self.print_rows()
        if reverse:
            self.write("m_t = m_t & (i_c >= 0)")
        if self.slots_used:
            self.write(f"i_c = {self.inside('i_c')}")
            self.print_slot("i_slot", "i_c")
        rotated = []
        for node in nodes:
            self.guard = "" if ROW in node.axes else "(n_c > 0)"
            block = self.blocks.pop(id(node)) if id(node) in self.blocks else self.fetch(node)
            name = f"{block.text}_next"
            self.write(f"{name} = {block.text}")
            rotated.append((node, name))
        self.guard = ""
        return rotated

    def print_rotation(self, rotated: Sequence[tuple[Node, str]], reverse: bool) -> None:
        """Takes the blocks loaded an iteration ago and loads the next chunk's."""
        if not rotated:
            return
        self.write(f"i_ahead = i_c {'-' if reverse else '+'} 1")
        self.write("i_t_ahead = bos + i_ahead * C")
        if self.sectioned:
            self.write("i_t_all_ahead = bos_all + i_ahead * C")
        self.write("m_t_ahead = (i_ahead >= 0) & (i_ahead * C + o_t < T)")
        if self.slots_used:
            self.print_slot("i_slot_ahead", self.inside("i_ahead"))
        self.at, self.slot = ("i_t_ahead", "m_t_ahead"), "i_slot_ahead"
        for node, name in rotated:
            own = name.removesuffix("_next")
            self.write(f"{own} = {name}")
            block = self.fetch(node)
            self.write(f"{name} = {block.text}")
            self.blocks[id(node)] = Block(own, block.dims, block.type)
        self.at, self.slot = ("i_t", "m_t"), "i_slot"

    @property
    def slots_used(self) -> bool:
        return any(v.per == "chunk" for v in self.values())

    def inside(self, chunk: str) -> str:
        """A chunk of this sequence, also where `chunk` lies before its first or after its last."""
        return f"tl.maximum(tl.minimum({chunk}, n_c - 1), 0)"

    def print_slot(self, name: str, chunk: str) -> None:
        first = "bos // C + i_n" if self.plan.varlen else "i_n.to(tl.int64) * n_c"
        self.write(f"{name} = {first} + {chunk}")

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
        """The state carried through the spans that are scanned before this program's."""
        if self.kernel.order == "reverse":
            self.write("for i_r in range(i_s + 1, n_s):")
            self.depth += 1
            self.write("i_before = n_s + i_s - i_r")
        else:
            self.write("for i_before in range(0, i_s):")
            self.depth += 1
        self.at_span = "i_before"
        texts = []
        for value in carry.through or ():
            argument = identifier(value.name)
            self.args[argument] = value
            pointers, mask, own = self.place(value, argument)
            loaded = self.assign(argument, self.load_text(pointers, mask), own)
            texts.append(spread(loaded.text, own, dims))
        self.write(f"{name} = {name} * {texts[0]} + {texts[1]}")
        self.depth -= 1
        self.at_span = "i_s"

    def print_end(self, value: Value, name: str, axes: Sequence[str]) -> None:
        argument = identifier(value.name)
        self.args[argument] = value
        pointers, mask, dims = self.place(value, argument)
        masks = [mask] if mask else []
        if value.per != "scratch" and not value.parts:
            masks += [f"(i_{identifier(a)} == 0)" for a in self.kernel.tile_sizes if a not in dims]
        if self.kernel.span and value.per == "sequence":
            masks.append(f"({self.scanned_last})")
        tail = f", mask={' & '.join(masks)}" if masks else ""
        self.write(f"tl.store({pointers}, {name}{tail})")
