"""Runs a plan: allocates what its kernels store and launches them.

A repeated call allocates its results and the workspace and hands addresses to the compiled kernels; what calls of the
same lengths have in common is prepared once (prepare.py).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler.codegen.extent import Extent
from lmoe_compiler.codegen.launcher import Launcher, compile_together, interpreting
from lmoe_compiler.codegen.load import load_module
from lmoe_compiler.codegen.names import identifier
from lmoe_compiler.codegen.plan import Kernel, Plan
from lmoe_compiler.codegen.prepare import Launch, Preparation, Prepared, Sum
from lmoe_compiler.codegen.triton import print_module
from lmoe_compiler.codegen.workspace import WORKSPACE


def allocate(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor that kernels write; with strides, torch takes two thirds of the time."""
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def added_up(parts: Tensor, one: Sum) -> Tensor:
    """Of the first elements, as many as there are now: a shorter section leaves fewer."""
    return parts.flatten()[: prod(one.shape)].view(one.shape).sum(0)


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


def launch(compiled: Any, grid: int, stream: int, addresses: Sequence[int], one: Launch) -> None:
    """Launch a compiled kernel; no profiler's hook is called."""
    compiled.run(
        grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
        *addresses, *one.lengths, *one.constants,
    )  # fmt: skip


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

    @property
    def spills(self) -> list[tuple[Kernel, int]]:
        """Bytes that a thread of each kernel spills, as compiled."""
        return [(one.kernel, one.spilled) for one in self.launchers]

    def prepare(self, extent: Extent) -> Prepared:
        """For all calls of these lengths."""
        made = Preparation(self.plan, self.launchers, self.given, self.results, self.dtypes)
        return made.prepared(extent)

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
        totals: dict[int, Tensor] = {}
        if index not in prepared.ready or bits & 15 or _hooked():
            self._through_jit(prepared, tensors, workspace, index, totals)
        else:
            if workspace is not None:
                bases = [*values, workspace.data_ptr()]
                values += [bases[slot] + at for slot, at in prepared.places]
            values += [values[slot] for slot in prepared.totals]
            stream = current_stream(index)
            for one in prepared.launches:
                args = [values[slot] for slot in one.slots]
                if one.grid:
                    launch(one.launcher.compiled[index], one.grid, stream, args, one)
                for parts in one.sums:
                    totals[parts.total] = added_up(tensors[parts.slot], parts)
                    values[parts.total] = totals[parts.total].data_ptr()
        return [totals[slot] if slot in totals else tensors[slot] for slot in prepared.results]

    def _through_jit(
        self,
        prepared: Prepared,
        tensors: list[Tensor],
        workspace: Tensor | None,
        index: int | None,
        totals: dict[int, Tensor],
    ) -> None:
        """The same with tensors as arguments: the first time, in the interpreter, and for unaligned inputs."""
        values: list[Tensor] = list(tensors)
        for m, (slot, at) in zip(prepared.shared, prepared.places, strict=True):
            room = workspace if slot == WORKSPACE else tensors[slot].view(-1).view(torch.uint8)
            assert room is not None
            size = prod(m.shape) * m.dtype.itemsize
            values.append(room[at : at + size].view(m.dtype).view(m.shape))
        values += [tensors[slot] for slot in prepared.totals]
        aligned = prepared.narrow and all(x.data_ptr() % 16 == 0 for x in tensors)

        def arguments(one: Launch) -> list[Any]:
            return [*(values[slot] for slot in one.slots), *one.lengths]

        launched = [one for one in prepared.launches if one.grid]
        if index not in prepared.ready and not interpreting():
            compile_together([(one.launcher, arguments(one)) for one in launched])
        for one in prepared.launches:
            if one.grid:
                one.launcher.compile(one.grid, arguments(one), index, keep=aligned)
            for parts in one.sums:
                totals[parts.total] = values[parts.total] = added_up(tensors[parts.slot], parts)
        if all(index in one.launcher.compiled for one in launched) and prepared.narrow:
            prepared.ready.add(index)
