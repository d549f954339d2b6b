"""Kernels that walk: a scan over the chunks of a sequence with its carried states, and the step of one token."""

from __future__ import annotations

from collections.abc import Sequence

from lmoe_compiler.codegen.names import axis_name, identifier
from lmoe_compiler.codegen.parallel import Parallel
from lmoe_compiler.codegen.plan import Carry, Value
from lmoe_compiler.codegen.statements import Block, spread
from lmoe_compiler.ir.nodes import ROW, Node, make


class Loops(Parallel):
    """Prints the body of a scan or a step."""

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
        self.print_parameters()
        reverse = self.kernel.order == "reverse"
        rotated = self.print_first(reverse)
        first, last = ("i_first", "i_last") if self.kernel.span else ("0", "n_c")
        tuning = self.kernel.tuning
        over = f"range({first}, {last})"
        if tuning.ahead:
            over = f"tl.range({first}, {last}, num_stages={tuning.num_stages})"
        self.write(f"for {'i_r' if reverse else 'i_c'} in {over}:")
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
        if self.kernel.ends:
            # What the loop computed is of its last chunk.
            for key in self.blocks.keys() - {id(c.leaf) for c in self.kernel.carries}:
                del self.blocks[key]
        for store in self.kernel.ends:
            self.store(store.node, store.value, at_end=True)
        return self.lines

    def print_parameters(self) -> None:
        """Loads of what is the same for all tokens of a head: in the loop they would wait for memory at every chunk."""
        heads = {var.name for var in self.plan.program.inputs if var.kind == "head"}
        for node in self.nodes:
            if node.op == "input" and node.name in heads:
                self.emit(node)

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
        if not nodes or self.kernel.tuning.num_stages < 2 or self.kernel.tuning.ahead:
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

    def print_start(self, carry: Carry, name: str) -> None:
        dims = tuple(sorted(carry.axes, key=self.order))
        for d in dims:
            self.axes_used[self.axis(d)] = None
        if carry.identity:
            one, other = (spread(f"o_{axis_name(a)}", [a], dims) for a in carry.axes)
            self.write(f"{name} = ({one} == {other}).to(tl.float32)  # {self.shape(dims)}")
        elif carry.start is None:
            full = f"tl.full({self.shape(dims)}, {carry.fill}, tl.float32)"
            self.write(f"{name} = {full}" if dims else f"{name} = {carry.fill}")
        else:
            argument = identifier(carry.start.name)
            self.args[argument] = carry.start
            # The first section, the last of the sequence, starts with nothing where the call is given nothing.
            nothing = any(p.into == carry.start and p.given is None for p in self.plan.passed)
            self.guard = "(T_0 + T < T_ALL)" if nothing else ""
            start, _ = self.loaded(carry.start)
            start = f"({start})" if carry.start.parts else start
            self.write(f"{name} = {start}.to(tl.float32)  # {self.shape(dims)}")
            self.guard = ""
        if carry.through is not None:
            self.print_through(carry, name, dims)
        self.blocks[id(carry.leaf)] = Block(name, dims)

    def print_through(self, carry: Carry, name: str, dims: Sequence[str]) -> None:
        """The state carried through the spans that are scanned before this program's."""
        # Matrices of several spans at a time would take all of the shared memory.
        matrix = any(a not in dims for value in carry.through or () for a in value.axes)
        over = ("tl.range({}, num_stages=1)" if matrix else "range({})").format
        if self.kernel.order == "reverse":
            self.write(f"for i_r in {over('i_s + 1, n_s')}:")
            self.depth += 1
            self.write("i_before = n_s + i_s - i_r")
        else:
            self.write(f"for i_before in {over('0, i_s')}:")
            self.depth += 1
        self.at_span = "i_before"
        loaded = []
        for value in carry.through or ():
            argument = identifier(value.name)
            self.args[argument] = value
            pointers, mask, own = self.place(value, argument)
            loaded.append(self.assign(argument, self.load_text(pointers, mask), own))
        m, total = loaded
        if not matrix:
            product = f"{name} * {spread(m.text, m.dims, dims)}"
        else:
            keys, columns = carry.axes[0], next(d for d in m.dims if d not in dims)
            renamed = make("rename", carry.leaf, old=keys, new=columns)
            x = self.rename(renamed, Block(name, tuple(dims)))
            product = self.dot(columns, m, x, full=True).text
        self.write(f"{name} = {product} + {spread(total.text, total.dims, dims)}")
        self.depth -= 1
        self.at_span = "i_s"

    def print_end(self, value: Value, name: str, axes: Sequence[str]) -> None:
        argument = identifier(value.name)
        self.args[argument] = value
        pointers, mask, dims = self.place(value, argument)
        masks = [mask] if mask else []
        if value.per != "scratch" and not value.parts:
            masks += [f"(i_{axis_name(a)} == 0)" for a in self.kernel.tile_sizes if a not in dims]
        if self.kernel.span and value.per == "sequence":
            masks.append(f"({self.scanned_last})")
        tail = f", mask={' & '.join(masks)}" if masks else ""
        self.write(f"tl.store({pointers}, {name}{tail})")
