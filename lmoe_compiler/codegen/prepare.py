"""What calls of the same lengths would compute again: shapes, places in one workspace, grids, and arguments as indices.

A plan in sections has launches for each, from the last to the first; what they pass on lies in two buffers in turn.
With `overlap`, so does all else: kernels of one section run beside those of the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from math import inf, prod
from typing import Any

import torch

from lmoe_compiler.codegen.concurrent import Touch, accompanied, depths, waits
from lmoe_compiler.codegen.cost import device
from lmoe_compiler.codegen.extent import Extent, programs, shape_of
from lmoe_compiler.codegen.launcher import Launcher, interpreting
from lmoe_compiler.codegen.names import identifier
from lmoe_compiler.codegen.plan import FAR, SCANS, Kernel, Passed, Plan, Value
from lmoe_compiler.codegen.prepared import Launch, Made, Prepared
from lmoe_compiler.codegen.workspace import WORKSPACE, Alive, places

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Preparation:
    """Makes `Prepared` of an executable, whose fields these are (launch.py)."""

    plan: Plan
    launchers: Sequence[Launcher]
    given: tuple[str, ...]
    results: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]

    def prepared(self, extent: Extent) -> Prepared:
        sections = self.sections(extent)
        own, shared, where = self.laid_out(extent, sections)
        names = [*self.given, *(m.name for m in (*own, *shared))]
        place = {name: i for i, name in enumerate(names)}
        memory = self.memory(own, shared, where)
        launches: list[Launch] = []
        touches: list[list[Touch]] = []
        for number, section in enumerate(sections):
            here = self.places_of_section(place, number, last=number == len(sections) - 1)
            for one in self.launches(extent, section, here):
                launches.append(one)
                touches.append([*self.touches(one, memory, number)])
        after = waits(touches)
        return Prepared(
            tuple(own),
            tuple(shared),
            tuple(where),
            size_of(where, shared),
            sum(m.bytes for m in shared if m.zeros),
            tuple([replace(one, after=after[i]) for i, one in enumerate(launches)]),
            tuple([place[name] for name in self.results]),
            frozenset(place[m.name] for m in own if m.parts),
            extent.batch * extent.length < 2**31,
        )

    def laid_out(
        self, extent: Extent, sections: Sequence[tuple[int, int]]
    ) -> tuple[list[Made], list[Made], list[tuple[int, int]]]:
        """Tensors of their own, what shares memory, and its places there."""
        longest = replace(extent, length=max(length for _, length in sections))
        made: dict[str, Made] = {}
        for kernel in self.plan.kernels:
            for value in kernel.written:
                within = extent if value.whole else longest
                made[identifier(value.name)] = self.made(value, within, kernel)
        for one in self.plan.passed:
            del made[one.out.name]
        own = [m for m in made.values() if m.name in self.results]
        shared = sorted((m for m in made.values() if m not in own), key=lambda m: not m.zeros)
        where = self.places(own if len(sections) == 1 else (), shared)
        if self.plan.choice.overlap and len(sections) > 1:
            size = size_of(where, shared)
            where += [(room, at + size) for room, at in where]
            shared = [replace(m, name=in_turn(m.name, i)) for i in range(2) for m in shared]
        for m in (m for one in self.plan.passed for m in self.buffers(one, extent)):
            if m.name in self.results:
                own.append(m)
            else:
                where.append((WORKSPACE, size_of(where, shared)))
                shared.append(m)
        return own, shared, where

    def places(self, own: Sequence[Made], shared: Sequence[Made]) -> list[tuple[int, int]]:
        """Where shared values lie: those with zeros one by one in the workspace, others as their kernels allow.

        Of `own`, results that only later kernels write have room for them.
        """
        deep = depths(self.plan.kernels)
        used: dict[str, list[int]] = {}
        for number, launcher in enumerate(self.launchers):
            for name in launcher.names:
                used.setdefault(name, []).append(number)

        def alive(name: str) -> Alive:
            at = [deep[i] for i in used[name]]
            return Alive(used[name][0], used[name][-1], min(at), max(at))

        *first, end = accumulate((m.bytes for m in shared if m.zeros), initial=0)
        slots = {len(self.given) + i: m for i, m in enumerate(own) if not (m.parts or m.zeros)}
        rooms = [
            (prod(m.shape) * m.dtype.itemsize, alive(m.name)._replace(last=inf, deep=inf))
            for m in slots.values()
        ]
        free = [m for m in shared if not m.zeros]
        found = places([m.bytes for m in free], [alive(m.name) for m in free], rooms)
        return [(WORKSPACE, at) for at in first] + [
            (WORKSPACE, end + at) if room == WORKSPACE else (list(slots)[room], at)
            for room, at in found
        ]

    def memory(
        self, own: Sequence[Made], shared: Sequence[Made], where: Sequence[tuple[int, int]]
    ) -> dict[int, tuple[int, int, float]]:
        """By slot: the tensor that it lies in, and its bytes there. The caller's tensors are left out: only a step in
        place writes them, which is one kernel.
        """
        first = len(self.given)
        found: dict[int, tuple[int, int, float]] = {
            first + i: (first + i, 0, inf) for i in range(len(own))
        }
        for slot, (m, (room, at)) in enumerate(zip(shared, where, strict=True), first + len(own)):
            found[slot] = room, at, at + m.bytes
        return found

    def touches(
        self, launch: Launch, memory: Mapping[int, tuple[int, int, float]], number: int
    ) -> Iterator[Touch]:
        """What a launch of one section reads and writes. Of results, every section has rows of its own."""
        writes = written(launch.launcher.kernel)
        for name, slot in zip(launch.launcher.names, launch.slots, strict=False):
            if slot in memory:
                room, first, end = memory[slot]
                yield Touch((room, number if slot == room else 0), first, end, name in writes)

    def sections(self, extent: Extent) -> list[tuple[int, int]]:
        """First token and length of the parts of all sequences that are worked on one after another."""
        size = self.plan.choice.section
        if not size or not self.plan.passed:
            return [(0, extent.length)]
        starts = range(0, max(extent.length, 1), size)
        return [(start, min(size, extent.length - start)) for start in reversed(starts)]

    def made(self, value: Value, extent: Extent, kernel: Kernel) -> Made:
        dot = torch.float32 if interpreting() else TORCH_DTYPE[self.plan.dtype]
        name = identifier(value.name)
        dtype = {"dot": dot, "fp32": torch.float32}.get(value.dtype) or self.dtypes[name]
        # Packed documents leave slots of chunks unused, which are read or summed with the others.
        zeros = value.per == "chunk" and extent.varlen
        shape = shape_of(value, self.plan, extent, kernel)
        return Made(name, shape, dtype, zeros, bool(value.parts) and name in self.results)

    def buffers(self, one: Passed, extent: Extent) -> list[Made]:
        """What a value passed between sections lies in: two in turn, and a result where there is one."""
        names = [in_turn(one.out.name, i) for i in range(2)]
        names += [one.result.name] if one.result.name in self.results else []
        shape = shape_of(one.out, self.plan, extent, self.plan.kernels[-1])
        return [Made(name, shape, torch.float32, False, False) for name in names]

    def places_of_section(
        self, place: Mapping[str, int], number: int, last: bool
    ) -> dict[str, int]:
        """Where the kernels of a section find their values, and leave what passes to the next section."""
        turn = number % 2
        own = in_turn("", turn)
        found = dict(place)
        found |= {n.removesuffix(own): slot for n, slot in place.items() if n.endswith(own)}
        for one in self.plan.passed:
            turns = [place[in_turn(one.out.name, i)] for i in range(2)]
            found[one.into.name] = turns[turn - 1]
            if one.given is not None and not number:
                found[one.into.name] = place[one.given.name]
            goes = last and one.result.name in place
            found[one.out.name] = place[one.result.name] if goes else turns[turn]
        return found

    @cached_property
    def in_company(self) -> set[str]:
        """Kernels beside which others may run, of their section or of the next."""
        kernels = self.plan.kernels
        both = self.plan.choice.overlap and self.plan.passed
        return {k.name for k in kernels} if both else accompanied(kernels)

    def launches(
        self, extent: Extent, section: tuple[int, int], place: Mapping[str, int]
    ) -> Iterator[Launch]:
        """The kernels of one section."""
        start, length = section
        within = replace(extent, length=length)
        for launcher in self.launchers:
            kernel = launcher.kernel
            slots = [place[name] for name in launcher.names]
            numbers: list[Any] = []
            if extent.varlen:
                slots.append(place["cu_seqlens"])
                numbers.append(extent.sequences)
            numbers += [extent.batch * length] if launcher.needs_tokens else []
            grid = programs(kernel, self.plan, within)
            if kernel.levels == "far":
                numbers.append(grid)
                grid = -(-grid // FAR)
            numbers += [start, extent.length] if self.plan.passed else []
            numbers.append(length)
            if grid:
                whole = kernel.order in SCANS and not kernel.span
                few = grid <= device().sms
                apart = whole and few and kernel.name in self.in_company
                yield Launch(launcher, grid, tuple(slots), tuple(numbers), apart)


def written(kernel: Kernel) -> set[str]:
    """Names of what it writes, as parameters."""
    return {identifier(v.name) for v in kernel.written}


def in_turn(name: str, number: int) -> str:
    """One of the two places of a value that one section still needs when the next one writes its own."""
    return f"{name} {number}"


def size_of(places: Sequence[tuple[int, int]], values: Sequence[Made]) -> int:
    """Bytes of a workspace with these values."""
    pairs = zip(places, values, strict=True)
    return max((at + m.bytes for (room, at), m in pairs if room == WORKSPACE), default=0)
