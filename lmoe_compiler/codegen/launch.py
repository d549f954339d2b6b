"""Runs a plan: allocates what its kernels store and launches them.

What a call of the same lengths would compute again is prepared once (`Prepared`): shapes, places in one workspace,
grids, and every kernel's arguments as indices. A repeated call allocates its results and the workspace and hands
addresses to the compiled kernels.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.codegen.addresses import identifier
from lmoe_compiler.codegen.fit import DoesNotFit
from lmoe_compiler.codegen.load import load_module
from lmoe_compiler.codegen.plan import FAR, Kernel, Passed, Plan, Value, padded
from lmoe_compiler.codegen.triton import function_name, print_module

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ALIGNMENT = 256


@functools.cache
def interpreting() -> bool:
    """Whether Triton runs its interpreter (on CPU tensors): fixed when triton is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Extent:
    """The lengths of one call: `sequences` is B, or the number of packed documents."""

    batch: int
    length: int
    sequences: int
    varlen: bool

    def slots(self, tokens: int) -> int:
        """Parts of so many tokens in all sequences; packed documents leave at most one slot each unused."""
        if self.varlen:
            return self.length // tokens + self.sequences
        return self.batch * -(-self.length // tokens)


def shape_of(value: Value, plan: Plan, extent: Extent, kernel: Kernel) -> tuple[int, ...]:
    if value.parts:
        return (value.parts, *shape_of(replace(value, parts=0), plan, extent, kernel))
    sizes = plan.size_of | {"s": plan.chunk}
    axes = [sizes[a.rstrip("'")] for a in value.axes]
    if value.per == "row":
        return (extent.batch, extent.length, plan.heads, *axes)
    if value.per == "vector":
        return (plan.heads, extent.batch * extent.length)
    if value.per == "chunk":
        return (extent.slots(plan.chunk), plan.heads, *axes)
    if value.per == "span":
        return (extent.slots(value.span), plan.heads, *axes)
    if value.per == "program":
        return (programs(kernel, plan, extent),)
    if value.per == "scratch":
        blocks = (kernel.block_sizes.get(a, padded(sizes[a])) for a in value.axes)
        return (programs(kernel, plan, extent), plan.chunk, *blocks)
    return (extent.sequences, plan.heads, *axes)


def programs(kernel: Kernel, plan: Plan, extent: Extent) -> int:
    """All on the first axis of the grid, the only one that goes beyond 65535."""
    part = plan.chunk if kernel.order == "parallel" else kernel.span
    rows = extent.slots(part) if part else extent.sequences
    tiles = prod(-(-plan.size_of[axis] // block) for axis, block in kernel.tiles)
    return rows * plan.heads * tiles


class Launcher:
    """One kernel of a loaded module. Its first launch on a device goes through Triton's JIT, later ones do not."""

    def __init__(self, plan: Plan, kernel: Kernel, module: ModuleType, printer: Any) -> None:
        self.kernel = kernel
        self.function = getattr(module, function_name(plan, kernel))
        self.names = tuple(printer.args)
        self.needs_tokens = printer.needs_tokens
        self.constants = _constants(plan, printer.constant_names())
        tuning = kernel.tuning
        self.options: dict[str, Any] = {
            "num_warps": tuning.num_warps,
            "num_stages": tuning.num_stages,
        }
        # By device; compiled for aligned pointers and 32-bit lengths.
        self.compiled: dict[int | None, Any] = {}

    def compile(self, grid: int, args: Sequence[Any], device: int | None, keep: bool) -> None:
        """Launch through Triton's JIT, and keep what it compiled."""
        from triton.runtime.errors import OutOfResources

        try:
            compiled = self.function[(grid,)](*args, **self.constants, **self.options)
        except OutOfResources as error:
            raise DoesNotFit(
                self.kernel.tuned_as, error.name, error.required, error.limit
            ) from None
        if keep and not interpreting():
            self.compiled[device] = compiled


def allocate(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor that kernels write; with strides, torch takes two thirds of the time."""
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def current_stream(device: int) -> int:
    """The address of a device's current stream."""
    return int(torch._C._cuda_getCurrentRawStream(device))


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _hooked() -> bool:
    """Whether a profiler wants to hear of every launch."""
    hook = _runtime().launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))


def _constants(plan: Plan, names: Mapping[str, int | str]) -> dict[str, Any]:
    import triton.language as tl

    half = plan.dtype != "fp32" and not plan.walks
    settings = {
        "DOT": {"bf16": tl.bfloat16, "fp16": tl.float16}[plan.dtype]
        if half and not interpreting()
        else tl.float32,
        # tf32 has the mantissa of fp16: where fp16 is not enough, neither is tf32.
        "PRECISION": "ieee"
        if interpreting()
        else "tf32"
        if half and plan.dtype == "bf16"
        else "tf32x3",
        "INVERSE": "ieee" if interpreting() else "tf32" if half else "tf32x3",
        # Scaled operands stay within the range of the products' type: exp(80) = 5e34, exp(8) = 3e3.
        # In fp32 an error of their exponents (1e-7 of the sum) may not show.
        "NEAR": {"bf16": 80.0, "fp16": 8.0, "fp32": 16.0}[plan.dtype],
        "SPLIT": half and not interpreting(),
    }
    return {
        name: settings[name] if isinstance(value, str) else value for name, value in names.items()
    }


@dataclass(frozen=True)
class Made:
    """A tensor that a call allocates: results and parts are tensors of their own, the rest lies in the workspace."""

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
class Launch:
    """One kernel of a call. Arguments: slots (inputs, own tensors, the workspace), lengths, constants."""

    launcher: Launcher
    grid: int
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    constants: tuple[Any, ...]
    # Slots of own tensors that are parts of sums, once it has run.
    parts: tuple[int, ...]


def launch(compiled: Any, grid: int, stream: int, addresses: Sequence[int], one: Launch) -> None:
    """Launch a compiled kernel; no profiler's hook is called."""
    compiled.run(
        grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *addresses, *one.lengths, *one.constants,
    )  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """What calls of one extent have in common. The workspace begins with what has to be zero.

    `ready` are the devices on which every kernel has run.
    """

    own: tuple[Made, ...]
    shared: tuple[Made, ...]
    offsets: tuple[int, ...]
    bytes: int
    zeros: int
    launches: tuple[Launch, ...]
    results: tuple[int, ...]
    narrow: bool
    ready: set[int | None] = field(default_factory=set)


@dataclass
class Executable:
    """A plan with its kernels loaded.

    given     names of the tensors that a call passes, in order; `cu_seqlens` comes last where there is one
    results   names of the tensors that it returns, in order
    dtypes    of the results whose dtype the plan leaves open
    notes     what was decided while it was made, for `explain`
    """

    plan: Plan
    header: Sequence[str]
    given: tuple[str, ...]
    results: tuple[str, ...]
    dtypes: Mapping[str, torch.dtype]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.text, printers = print_module(self.plan, self.header)
        module = load_module(identifier(self.plan.program.name), self.text)
        self.launchers = [
            Launcher(self.plan, k, module, printers[k.name]) for k in self.plan.kernels
        ]

    def prepare(self, extent: Extent) -> Prepared:
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
        offsets = [0]
        for m in shared:
            offsets.append(offsets[-1] + m.bytes)
        names = [*self.given, *(m.name for m in (*own, *shared))]
        place = {name: i for i, name in enumerate(names)}
        launches: list[Launch] = []
        for number, section in enumerate(sections):
            here = place | self.between(place, number, last=number == len(sections) - 1)
            launches += self.launches(extent, section, here)
        # Parts of a result are added up when all sections have left theirs.
        ends = {slot: i for i, one in enumerate(launches) for slot in one.parts}
        launches = [
            replace(one, parts=tuple(slot for slot in one.parts if ends[slot] == i))
            for i, one in enumerate(launches)
        ]
        return Prepared(
            tuple(own),
            tuple(shared),
            tuple(offsets[:-1]),
            offsets[-1],
            sum(m.bytes for m in shared if m.zeros),
            tuple(launches),
            tuple(place[name] for name in self.results),
            extent.batch * extent.length < 2**31,
        )

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
            written = kernel.written if kernel.levels != "near" else ()
            parts = [place[identifier(v.name)] for v in written if v.parts]
            constants = tuple(launcher.constants.values())
            if grid:
                yield Launch(launcher, grid, tuple(slots), tuple(numbers), constants, tuple(parts))

    def __call__(
        self, prepared: Prepared, given: Sequence[Tensor], into: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """The results. `into` has tensors that take the place of results allocated here."""
        device = given[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(prepared, given, into)
        tensors = list(given)
        for m in prepared.own:
            if into is not None and m.name in into:
                tensors.append(into[m.name])
            else:
                x = allocate(m.shape, m.strides, m.dtype, device)
                tensors.append(x.zero_() if m.zeros else x)
        workspace = None
        if prepared.shared:
            workspace = allocate((prepared.bytes,), (1,), torch.uint8, device)
            if prepared.zeros:
                workspace[: prepared.zeros].zero_()
        values = [x.data_ptr() for x in tensors]
        bits = functools.reduce(operator.or_, values)
        index = device.index
        if index not in prepared.ready or bits & 15 or _hooked():
            self._through_jit(prepared, tensors, workspace, index)
        else:
            if workspace is not None:
                base = workspace.data_ptr()
                values += [base + offset for offset in prepared.offsets]
            stream = current_stream(index)
            for one in prepared.launches:
                args = [values[slot] for slot in one.slots]
                launch(one.launcher.compiled[index], one.grid, stream, args, one)
                for slot in one.parts:
                    tensors[slot] = tensors[slot].sum(0)
                    values[slot] = tensors[slot].data_ptr()
        return [tensors[slot] for slot in prepared.results]

    def _through_jit(
        self,
        prepared: Prepared,
        tensors: list[Tensor],
        workspace: Tensor | None,
        index: int | None,
    ) -> None:
        """The same with tensors as arguments: the first time, in the interpreter, and for unaligned inputs."""
        values: list[Tensor] = list(tensors)
        for m, offset in zip(prepared.shared, prepared.offsets, strict=True):
            assert workspace is not None
            size = prod(m.shape) * m.dtype.itemsize
            values.append(workspace[offset : offset + size].view(m.dtype).view(m.shape))
        aligned = prepared.narrow and all(x.data_ptr() % 16 == 0 for x in tensors)
        for one in prepared.launches:
            args = [*(values[slot] for slot in one.slots), *one.lengths]
            one.launcher.compile(one.grid, args, index, keep=aligned)
            for slot in one.parts:
                tensors[slot] = values[slot] = values[slot].sum(0)
        if all(index in one.launcher.compiled for one in prepared.launches) and prepared.narrow:
            prepared.ready.add(index)
