"""What calls of the same lengths would compute again: shapes, places in one workspace, grids, and arguments as indices.

A plan in sections has launches for each, from the last to the first; what they pass on lies in two buffers in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch

from lmoe_compiler.codegen.driver import Launches
from lmoe_compiler.codegen.extent import Extent, programs, shape_of
from lmoe_compiler.codegen.launcher import Launcher, interpreting
from lmoe_compiler.codegen.names import identifier
from lmoe_compiler.codegen.plan import FAR, Kernel, Passed, Plan, Value
from lmoe_compiler.codegen.workspace import WORKSPACE, places

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALIGNMENT = 256


@dataclass(frozen=True)
class Made:
    """What kernels write: results and parts are tensors of their own, the rest lies in the workspace or in results."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zeros: bool
    parts: bool
    strides: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        rest = (self.shape[i + 1 :] for i in range(len(self.shape)))
        strides = tuple(prod(max(n, 1) for n in sizes) for sizes in rest)
        object.__setattr__(self, "strides", strides)

    @property
    def bytes(self) -> int:
        size = prod(self.shape) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Sum:
    """Parts that a kernel leaves in `slot`, [parts, ...], are added up: other kernels and callers get `total`."""

    slot: int
    shape: tuple[int, ...]
    total: int


@dataclass(frozen=True)
class Launch:
    """One kernel of a call, not launched where its grid is empty.

    Arguments: slots (inputs, own tensors, the workspace, sums), then lengths.
    """

    launcher: Launcher
    grid: int
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    sums: tuple[Sum, ...]


@dataclass(frozen=True)
class Prepared:
    """What calls of one extent have in common. The workspace begins with what has to be zero.

    `places` of the shared values: the slot of a result, or WORKSPACE, and bytes from its start. `bytes` are the
    workspace's. `totals` are the slots of the parts of sums. `ready` are the launches of devices on which every kernel
    has run, None where only Triton can launch them.
    """

    own: tuple[Made, ...]
    shared: tuple[Made, ...]
    places: tuple[tuple[int, int], ...]
    bytes: int
    zeros: int
    launches: tuple[Launch, ...]
    results: tuple[int, ...]
    totals: tuple[int, ...]
    narrow: bool
    ready: dict[int | None, Launches | None] = field(default_factory=dict)


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
        longest = replace(extent, length=max(length for _, length in sections))
        made: dict[str, Made] = {}
        for kernel in self.plan.kernels:
            for value in kernel.written:
                within = extent if value.whole else longest
                made[identifier(value.name)] = self.made(value, within, kernel)
        for one in self.plan.passed:
            del made[one.out.name]
            made |= self.buffers(one, extent)
        own = [m for m in made.values() if m.name in self.results or m.parts]
        shared = sorted((m for m in made.values() if m not in own), key=lambda m: not m.zeros)
        zeros = sum(m.bytes for m in shared if m.zeros)
        where = self.places(own if len(sections) == 1 else (), shared)
        names = [*self.given, *(m.name for m in (*own, *shared))]
        parts = [m.name for m in own if m.parts]
        place = {name: i for i, name in enumerate([*names, *map(total_of, parts)])}
        results = tuple(place.get(total_of(name), place[name]) for name in self.results)
        launches: list[Launch] = []
        for number, section in enumerate(sections):
            here = place | self.between(place, number, last=number == len(sections) - 1)
            launches += self.launches(extent, section, here)
        # Parts of a result are added up when all sections have left theirs, others in each section.
        ends = {
            x.total: i for i, one in enumerate(launches) for x in one.sums if x.total in results
        }
        launches = [
            replace(one, sums=tuple(x for x in one.sums if ends.get(x.total, i) == i))
            for i, one in enumerate(launches)
        ]
        return Prepared(
            tuple(own),
            tuple(shared),
            tuple(where),
            max(
                (
                    at + m.bytes
                    for (room, at), m in zip(where, shared, strict=True)
                    if room == WORKSPACE
                ),
                default=0,
            ),
            zeros,
            tuple(launches),
            results,
            tuple(place[name] for name in parts),
            extent.batch * extent.length < 2**31,
        )

    def places(self, own: Sequence[Made], shared: Sequence[Made]) -> list[tuple[int, int]]:
        """Where shared values lie: those with zeros one by one in the workspace, others as their kernels allow.

        Of `own`, results that only later kernels write have room for them.
        """
        used: dict[str, list[int]] = {}
        for number, launcher in enumerate(self.launchers):
            for name in launcher.names:
                used.setdefault(name, []).append(number)
        # What passes from section to section has other names in kernels, and is needed all the time.
        always = [0, len(self.launchers)]
        needed = [used.get(m.name, always) for m in shared if not m.zeros]
        *first, end = accumulate((m.bytes for m in shared if m.zeros), initial=0)
        sizes = [m.bytes for m in shared if not m.zeros]
        slots = {len(self.given) + i: m for i, m in enumerate(own) if not (m.parts or m.zeros)}
        rooms = [
            (prod(m.shape) * m.dtype.itemsize, used.get(m.name, [0])[0]) for m in slots.values()
        ]
        found = places(sizes, [(n[0], n[-1]) for n in needed], rooms)
        return [(WORKSPACE, at) for at in first] + [
            (WORKSPACE, end + at) if room == WORKSPACE else (list(slots)[room], at)
            for room, at in found
        ]

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
        return Made(name, shape, dtype, zeros, bool(value.parts))

    def buffers(self, one: Passed, extent: Extent) -> dict[str, Made]:
        """What a value passed between sections lies in: two in turn, a zero start and a result where there are such."""
        names = {f"{one.out.name}_{i}": False for i in range(2)}
        names |= {} if one.given.name in self.given else {one.given.name: True}
        names |= {one.result.name: False} if one.result.name in self.results else {}
        shape = shape_of(one.out, self.plan, extent, self.plan.kernels[-1])
        return {name: Made(name, shape, torch.float32, zero, False) for name, zero in names.items()}

    def between(self, place: Mapping[str, int], number: int, last: bool) -> dict[str, int]:
        """Where a section finds, and where it leaves, what passes from section to section."""
        found = {}
        for one in self.plan.passed:
            turns = [place[f"{one.out.name}_{i}"] for i in range(2)]
            found[one.into.name] = turns[(number - 1) % 2] if number else place[one.given.name]
            goes = last and one.result.name in place
            found[one.out.name] = place[one.result.name] if goes else turns[number % 2]
        return found

    def launches(
        self, extent: Extent, section: tuple[int, int], place: Mapping[str, int]
    ) -> Iterator[Launch]:
        """The kernels of one section."""
        start, length = section
        within = replace(extent, length=length)
        for launcher in self.launchers:
            kernel = launcher.kernel
            own = {identifier(v.name) for v in kernel.written}
            slots = [
                place[name] if name in own else place.get(total_of(name), place[name])
                for name in launcher.names
            ]
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
            written = kernel.written if kernel.levels != "near" else ()
            sums = [self.sum(v, kernel, extent, within, place) for v in written if v.parts]
            # Parts without rows have a sum all the same: no rows.
            if grid or sums:
                yield Launch(launcher, grid, tuple(slots), tuple(numbers), tuple(sums))

    def sum(
        self, value: Value, kernel: Kernel, extent: Extent, within: Extent, place: Mapping[str, int]
    ) -> Sum:
        """The shape is that of a section's parts, but for what comes from all sections."""
        name = identifier(value.name)
        shape = shape_of(value, self.plan, extent if value.whole else within, kernel)
        return Sum(place[name], shape, place[total_of(name)])


def total_of(name: str) -> str:
    """What the sum of a value's parts is found by: no name of a tensor has a space."""
    return f"{name} total"
