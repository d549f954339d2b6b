"""Prints kernels that walk a sequence token by token, the state in registers: what runs a state without a chunk form.

`tokens` carries states forward. `tokens_reverse` carries their adjoints backward: chunk by chunk it first replays the
states from the chunk's entry into a scratch of its own, then walks the chunk from its end. Vectors of the next token
are loaded while the current one is computed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from lmoe_compiler.codegen.loops import Loops
from lmoe_compiler.codegen.names import axis_name, identifier
from lmoe_compiler.codegen.plan import Carry, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.statements import Block, spread
from lmoe_compiler.ir.nodes import Node

SLOT = {False: "i_n.to(tl.int64) * n_c + {0}", True: "bos // C + i_n + {0}"}


class Walk(Loops):
    """The body of a kernel whose graph is of one token."""

    in_time = ""
    """The condition under which a token that is loaded ahead exists."""

    primes_left: frozenset[str] = frozenset()
    """Primed dimensions of blocks that went out of scope with their loop."""

    @property
    def primed(self) -> set[str]:
        return super().primed | self.primes_left

    def leave(self, blocks: dict[Hashable, Block], casts: dict[str, str]) -> None:
        """The end of a loop: what was written in it is not visible any more."""
        self.primes_left = self.primes_left | super().primed
        self.blocks.clear()
        self.blocks.update(blocks)
        self.casts = dict(casts)

    def place(
        self, value: Value, name: str, part: int | None = None
    ) -> tuple[str, str, tuple[str, ...]]:
        if not self.kernel.walks:
            return super().place(value, name, part)
        if value.per == "scratch":
            return self.scratch_block(name, value.axes)
        index = {"row": f"({self.at[0]} * H + i_h)", "chunk": "(i_slot * H + i_h)"}.get(
            value.per, "(i_n.to(tl.int64) * H + i_h)"
        )
        if value.parts:
            rows = "TOKENS" if value.per == "row" else f"(tl.num_programs(0) // (H * {self.tiles}))"
            index = f"({self.part(part)} * {rows} * H + {index.removeprefix('(')}"
        return self.state_block(name, index, value.axes)

    @property
    def tiles(self) -> str:
        (axis,) = (axis_name(a) for a in self.kernel.tile_sizes)
        return f"tl.cdiv({axis}, B{axis})"

    def scratch_block(self, name: str, axes: Sequence[str]) -> tuple[str, str, tuple[str, ...]]:
        """Pointers of one token's block in this program's scratch: whole blocks, nothing masked."""
        dims = tuple(sorted(axes, key=self.order))
        lengths = [f"B{axis_name(axis)}" for axis in dims]
        self.axes_used.update(dict.fromkeys(dims))
        size = " * ".join(lengths) or "1"
        terms = [f"{name} + (tl.program_id(0).to(tl.int64) * C + i_r) * ({size})"]
        for position, axis in enumerate(dims):
            rest = " * ".join(lengths[position + 1 :])
            at = spread(f"tl.arange(0, {lengths[position]})", [axis], dims)
            terms.append(f"{at} * ({rest})" if rest else at)
        return " + ".join(terms), "", dims

    def load_text(self, pointers: str, mask: str, other: float = 0.0) -> str:
        mask = " & ".join(filter(None, [mask, self.in_time]))
        return super().load_text(pointers, mask, other)

    # ---- loads ahead of time

    def print_kept(self) -> None:
        for node in self.nodes:
            if node.op == "input" and node.name in self.kernel.kept:
                self.emit(node)

    def print_ahead(
        self, roots: Iterable[Node], row: str, in_time: str = ""
    ) -> list[tuple[Node, str]]:
        """Loads the first token's vectors, before the loop."""
        carried = {id(c.leaf) for c in (*self.kernel.carries, *self.kernel.replay)}
        loaded = []
        for node in closure(roots):
            if self.is_token(node) and len(node.axes) < 2 and id(node) not in carried:
                block = self.load_ahead(node, row, in_time)
                name = f"{block.text}_next"
                self.write(f"{name} = {block.text}")
                loaded.append((node, name))
        return loaded

    def print_next(self, ahead: Sequence[tuple[Node, str]], row: str, in_time: str) -> None:
        """Takes the vectors loaded a token ago and loads the next token's."""
        for node, name in ahead:
            own = name.removesuffix("_next")
            self.write(f"{own} = {name}")
            block = self.load_ahead(node, row, in_time)
            self.write(f"{name} = {block.text}")
            self.blocks[id(node)] = Block(own, block.dims, block.type)

    def load_ahead(self, node: Node, row: str, in_time: str) -> Block:
        self.at, self.in_time = (row, ""), in_time
        block = self.input(node)
        self.at, self.in_time = ("i_t", ""), ""
        return block

    # ---- bodies

    def print_tokens(self) -> list[str]:
        names = [f"b_{identifier(c.leaf.name)}" for c in self.kernel.carries]
        for carry, name in zip(self.kernel.carries, names, strict=True):
            self.print_start(carry, name)
        self.print_kept()
        ahead = self.print_ahead(self.kernel.roots, "bos", "(T > 0)")
        self.write("for i_r in range(0, T):")
        self.depth += 1
        self.write("i_t = bos + i_r")
        self.print_next(ahead, "(i_t + 1)", "(i_r + 1 < T)")
        entries = [s for s in self.kernel.stores if s.value.per == "chunk"]
        if entries:
            self.write("if i_r % C == 0:")
            self.depth += 1
            self.write(f"i_slot = {SLOT[self.plan.varlen].format('i_r // C')}")
            for store in entries:
                self.store(store.node, store.value)
            self.depth -= 1
        for store in self.kernel.stores:
            if store not in entries:
                self.store(store.node, store.value)
        self.print_following(self.kernel.carries, names)
        self.depth -= 1
        for carry, name in zip(self.kernel.carries, names, strict=True):
            if carry.end is not None:
                self.print_end(carry.end, name, carry.axes)
        return self.lines

    def print_tokens_reverse(self) -> list[str]:
        kernel = self.kernel
        names = [f"b_{identifier(c.leaf.name)}" for c in kernel.carries]
        for carry, name in zip(kernel.carries, names, strict=True):
            self.print_start(carry, name)
        totals = []
        for summed in kernel.sums:
            dims = tuple(sorted(summed.value.axes, key=self.order))
            totals.append(self.assign("sum", f"tl.zeros({self.shape(dims)}, tl.float32)", dims))
        self.print_kept()
        self.write("for i_x in range(0, n_c):")
        self.depth += 1
        self.write("i_first = (n_c - 1 - i_x) * C")
        self.write("n_r = tl.minimum(T - i_first, C)")
        self.write(f"i_slot = {SLOT[self.plan.varlen].format('(n_c - 1 - i_x)')}")
        outside, casts = dict(self.blocks), dict(self.casts)
        self.print_replay()
        self.leave(outside, casts)
        roots = [s.node for s in (*kernel.stores, *kernel.sums)]
        roots += [c.following for c in kernel.carries]
        ahead = self.print_ahead(roots, "(bos + i_first + n_r - 1)")
        self.write("for i_y in range(0, n_r):")
        self.depth += 1
        self.write("i_r = n_r - 1 - i_y")
        self.write("i_t = bos + i_first + i_r")
        self.print_next(ahead, "(i_t - 1)", "(i_r > 0)")
        for carry in kernel.replay:
            self.print_state(carry)
        for store in kernel.stores:
            self.store(store.node, store.value)
        for total, summed in zip(totals, kernel.sums, strict=True):
            self.write(f"{total.text} += {self.broadcast(self.emit(summed.node), total.dims)}")
        self.print_following(kernel.carries, names)
        self.depth -= 2
        self.leave(outside, casts)
        for total, summed in zip(totals, kernel.sums, strict=True):
            self.print_end(summed.value, total.text, summed.value.axes)
        for carry, name in zip(kernel.carries, names, strict=True):
            if carry.end is not None:
                self.print_end(carry.end, name, carry.axes)
        return self.lines

    def print_replay(self) -> None:
        """The chunk's states into the scratch. Barriers: other threads of the program write what one reads."""
        replay = self.kernel.replay
        if not replay:
            return
        names = [f"b_{identifier(c.leaf.name)}" for c in replay]
        for carry, name in zip(replay, names, strict=True):
            self.print_start(carry, name)
        self.write("tl.debug_barrier()")
        roots = [c.following for c in replay]
        ahead = self.print_ahead(roots, "(bos + i_first)")
        self.write("for i_r in range(0, n_r):")
        self.depth += 1
        self.write("i_t = bos + i_first + i_r")
        self.print_next(ahead, "(i_t + 1)", "(i_r + 1 < n_r)")
        for carry, name in zip(replay, names, strict=True):
            assert carry.end is not None
            self.print_end(carry.end, name, carry.axes)
        self.print_following(replay, names)
        self.depth -= 1
        self.write("tl.debug_barrier()")

    def print_state(self, carry: Carry) -> None:
        """A replayed state before this token, from the scratch."""
        assert carry.end is not None
        argument = identifier(carry.end.name)
        pointers, mask, dims = self.place(carry.end, argument)
        self.blocks[id(carry.leaf)] = self.assign(argument, self.load_text(pointers, mask), dims)

    def print_following(self, carries: Sequence[Carry], names: Sequence[str]) -> None:
        """Every next value is written before the first is assigned: they see each other as they were."""
        after = []
        for carry in carries:
            block = self.fp32(self.emit(carry.following))
            text = self.broadcast(block, carry.axes)
            if carry.following.op == "const" and not carry.axes:
                text = f"tl.full([], {text}, tl.float32)"
            if block.text in names:
                text = self.assign("after", text, sorted(carry.axes, key=self.order)).text
            after.append(text)
        for name, text in zip(names, after, strict=True):
            self.write(f"{name} = {text}")
