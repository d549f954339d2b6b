"""Which sequence, chunk, rows and tiles a program works on."""

from __future__ import annotations

from lmoe_compiler.codegen.expressions import Expressions
from lmoe_compiler.codegen.names import axis_name
from lmoe_compiler.codegen.plan import WALKS


class Indices(Expressions):
    """Prints what a kernel knows of its place."""

    def print_indices(self) -> None:
        kernel, varlen = self.kernel, self.plan.varlen
        self.write(f"i_p = {'i_far' if kernel.levels == 'far' else 'tl.program_id(0)'}")
        for axis in kernel.tile_sizes:
            a = axis_name(axis)
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
        a = axis_name(axis)
        start = f"i_{a} * B{a} + " if axis in self.kernel.block_sizes else ""
        primes = {d for d in self.primed if self.axis(d) == axis} | {axis}
        for dim in sorted(primes):
            d = axis_name(dim)
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

    @property
    def slots_used(self) -> bool:
        return any(v.per == "chunk" for v in self.values())

    def inside(self, chunk: str) -> str:
        """A chunk of this sequence, also where `chunk` lies before its first or after its last."""
        return f"tl.maximum(tl.minimum({chunk}, n_c - 1), 0)"

    def print_slot(self, name: str, chunk: str) -> None:
        first = "bos // C + i_n" if self.plan.varlen else "i_n.to(tl.int64) * n_c"
        self.write(f"{name} = {first} + {chunk}")
