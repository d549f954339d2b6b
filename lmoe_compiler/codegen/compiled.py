"""From a call to compiled kernels: planned once for its kind, prepared once for its lengths, then looked up.

Directions: `forward`; `ends`, forward without an output; `backward`; `pullback`, backward without an output's
gradient; `step` and `step_`, one token, the latter into the states that it was given.
A plan that needs more shared memory than the device has gives way to the next that fits (fit.py); on a GPU that
nobody has measured its numbers are compared with ATen's at first use (first_use.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmoe_compiler import layout
from lmoe_compiler.codegen import first_use, miscompiled, sequential, stepping, tuned
from lmoe_compiler.codegen.backward import backward_plan
from lmoe_compiler.codegen.cost import device
from lmoe_compiler.codegen.describe import header, lines
from lmoe_compiler.codegen.extent import Extent
from lmoe_compiler.codegen.fit import DoesNotFit, relieved, smaller, too_large
from lmoe_compiler.codegen.forward import forward_plan, step_plan
from lmoe_compiler.codegen.launch import Executable
from lmoe_compiler.codegen.launcher import interpreting
from lmoe_compiler.codegen.miscompiled import avoided
from lmoe_compiler.codegen.names import printable
from lmoe_compiler.codegen.plan import KEPT_SPAN, OUTPUT, Call, Choice, Plan, Value, kept_states
from lmoe_compiler.codegen.prepared import Prepared
from lmoe_compiler.codegen.recomputing import recomputing_plan
from lmoe_compiler.codegen.rules import by_rule
from lmoe_compiler.codegen.supported import DTYPES, axis_sizes
from lmoe_compiler.config import Options
from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.lower.adjoint import adjoint
from lmoe_compiler.lower.chunk import build
from lmoe_compiler.lower.program import ChunkAdjoint, ChunkProgram

Tensors = Sequence[Tensor]
MOST = 1024
"""Calls of different lengths that are remembered. The graphs of a training step took 0.2 MiB a length on an H200."""


@dataclass
class Entry:
    """What a kind of call needs to run again: `kind` is what its executable was made for."""

    executable: Executable
    prepared: Prepared
    kind: tuple[Any, ...]
    verified: bool


_calls: dict[tuple[Any, ...], Entry] = {}
_executables: dict[tuple[Any, ...], Executable] = {}
_kept: dict[int, Program] = {}


def forget() -> None:
    """Drops compiled plans, so that the next call plans again."""
    _calls.clear()
    _executables.clear()


def call(
    direction: str,
    program: Program,
    inputs: Tensors,
    given: Tensors,
    *,
    has_states: bool,
    documents: int | None,
    ends: tuple[bool, ...] = (),
    options: Options,
    into: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """Run a direction. `given` are its tensors in the order of `Request.names`, ready for kernels."""
    key = (
        direction,
        id(program),
        tuple([x.shape for x in inputs]),
        tuple([x.dtype for x in inputs]),
        inputs[0].device,
        has_states,
        documents,
        ends,
        options.chunk_size,
    )
    entry = _calls.get(key)
    if entry is None or not entry.verified:
        _kept[id(program)] = program
        request = Request(
            direction, printable(program), inputs, has_states, documents, ends, options
        )
        return _first(key, request, given, into)
    return entry.executable(entry.prepared, given, into)


@dataclass(frozen=True)
class Request:
    """All of a call that its plan depends on; `program` has names that kernels can use."""

    direction: str
    program: Program
    inputs: Sequence[layout.Measured]
    has_states: bool
    documents: int | None
    ends: tuple[bool, ...]
    options: Options

    @property
    def is_step(self) -> bool:
        return self.direction in ("step", "step_")

    @property
    def is_backward(self) -> bool:
        return self.direction in ("backward", "pullback")

    @property
    def lengths(self) -> tuple[int, int]:
        """B and T; a step has one token."""
        shape = self.inputs[layout.first_token(self.program)].shape
        return shape[0], 1 if self.is_step else shape[1]

    @property
    def heads(self) -> dict[str, int]:
        place = 1 if self.is_step else 2
        return {
            v.name: x.shape[place if v.kind == "token" else 0]
            for v, x in zip(self.program.inputs, self.inputs, strict=True)
        }

    @property
    def call(self) -> Call:
        heads = self.heads
        return Call(
            tuple(axis_sizes(self.program, self.inputs).items()),
            max(heads.values()),
            tuple(heads.items()),
            DTYPES[self.inputs[layout.first_token(self.program)].dtype],
            self.documents is not None,
            self.has_states,
            self.ends or tuple(False for _ in self.program.states),
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What an executable serves: lengths of the same size share it."""
        batch, length = self.lengths
        dtypes = tuple(x.dtype for x in self.inputs)
        size = (batch, length.bit_length())
        chosen = (self.inputs[0].device, self.options.chunk_size)
        return (self.direction, self.program, self.call, dtypes, size, chosen)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that a call passes."""
        states = [v.name for v in self.program.states]
        names = [v.name for v in self.program.inputs]
        names += [f"{name}_start" for name in states] if self.has_states else []
        if self.is_backward:
            names += self.kept
            names += [f"d{OUTPUT}"] if self.direction == "backward" else []
            names += [f"d{n}_end" for n, there in zip(states, self.ends, strict=True) if there]
        return (*names, "cu_seqlens") if self.documents is not None else tuple(names)

    @property
    def results(self) -> tuple[str, ...]:
        states = [v.name for v in self.program.states]
        if self.is_backward:
            starts = [f"d{name}_start" for name in states] if self.has_states else []
            return (*(f"d{v.name}" for v in self.program.inputs), *starts)
        output = () if self.direction == "ends" else (OUTPUT,)
        kept = () if self.is_step else self.kept
        return (*output, *(f"{name}_end" for name in states), *kept)

    @property
    def kept(self) -> list[str]:
        """What the forward keeps for the backward."""
        return [v.name for v in kept(self.program)]

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the results: as the inputs are; gradients that are yet to be summed over a group stay fp32."""
        first = self.inputs[layout.first_token(self.program)].dtype
        found = {OUTPUT: computed(first)}
        heads = self.heads
        for var, x in zip(self.program.inputs, self.inputs, strict=True):
            whole = heads[var.name] == max(heads.values())
            found[f"d{var.name}"] = computed(x.dtype) if whole else torch.float32
        return found

    @property
    def tuned_as(self) -> str:
        """The direction whose measured choices it takes."""
        if self.is_step:
            return self.direction
        return "backward" if self.is_backward else "forward"

    @property
    def measured(self) -> Choice | None:
        """The choice of the table, if this device and kind of call are in it."""
        return tuned.lookup(device().name, self.program, self.tuned_as, self.call, *self.lengths)

    @property
    def wanted(self) -> Choice:
        """How the call is run if it is compiled as written, in chunks as long as was asked for."""
        chosen, size = self.measured or self.rule(), self.options.chunk_size
        if size is None or self.is_step:
            return chosen
        return replace(chosen, chunk=min(max(16, 1 << (size - 1).bit_length()), KEPT_SPAN))

    def choice(self) -> Choice:
        """How the call is run: as measured, else by the rules, but for what is compiled wrongly."""
        return avoided(self.wanted, self.program) if self.is_backward else self.wanted

    def rule(self) -> Choice:
        """How the call is run where nobody has measured."""
        program, call, (batch, length) = self.program, self.call, self.lengths
        if self.is_step:
            return stepping.choose(program, call, batch, in_place=self.direction == "step_")
        if chunk_of(program) is None:
            return sequential.choose(program, length)
        choice = by_rule(program, self.tuned_as, call, batch, length)
        if choice.recompute and recomputing_plan(adjoint_of(program), choice, call) is None:
            return by_rule(program, self.tuned_as, call, batch, length, may_recompute=False)
        return choice

    def plan(self, choice: Choice) -> Plan:
        program, call = self.program, self.call
        chunk = chunk_of(program)
        if self.is_step:
            return step_plan(program, choice, call)
        if self.is_backward:
            if chunk is None:
                return sequential.backward_plan(program, choice, call)
            return backward_plan(adjoint_of(program), choice, call)
        plan = (
            sequential.forward_plan(program, choice, call)
            if chunk is None
            else forward_plan(chunk, choice, call)
        )
        return _without_output(plan) if self.direction == "ends" else plan

    @property
    def extent(self) -> Extent:
        batch, length = self.lengths
        return Extent(batch, length, self.documents or batch, self.documents is not None)

    def make(self, choice: Choice, notes: Sequence[str] = ()) -> Executable:
        plan = self.plan(choice)
        return Executable(plan, header(plan), self.names, self.results, self.dtypes, list(notes))


def _first(
    key: tuple[Any, ...],
    request: Request,
    given: Tensors,
    into: Mapping[str, Tensor] | None,
) -> list[Tensor]:
    """Plan, compile and run; a plan that does not fit gives way to a smaller one, or to one with more warps."""
    executable = executable_of(request)
    while True:
        prepared = executable.prepare(request.extent)
        try:
            results = executable(prepared, given, into)
            if request.measured is not None or into is not None:
                break
            choice, notes = relieved(executable.plan.choice, executable.spills)
            if choice == executable.plan.choice:
                break
        except DoesNotFit as reason:
            fits, notes = smaller(executable.plan.choice, reason.kernel), [reason.note]
            if fits is None:
                raise too_large(request.program, reason) from None
            choice = fits
        executable = request.make(choice, [*executable.notes, *notes])
        _executables[request.kind] = executable
    verified = first_use.verified(request, executable, given)
    if len(_calls) >= MOST:
        _calls.clear()
    _calls[key] = Entry(executable, prepared, request.kind, verified)
    return results


def executable_of(request: Request) -> Executable:
    kind = request.kind
    if kind not in _executables:
        notes = miscompiled.notes(request.wanted, request.program) if request.is_backward else []
        _executables[kind] = request.make(request.choice(), [*first_use.notes(), *notes])
    return _executables[kind]


def requests(
    program: Program, inputs: Sequence[layout.Measured], options: Options
) -> tuple[Request, Request]:
    """Forward and backward of a call without states, as training makes it."""
    ends, program = tuple(False for _ in program.states), printable(program)
    return (
        Request("forward", program, inputs, False, None, (), options),
        Request("backward", program, inputs, False, None, ends, options),
    )


def report(program: Program, inputs: Sequence[layout.Measured], options: Options) -> str:
    """The plans of a call in words, and what was decided about them."""
    walked = chunk_of(printable(program)) is None
    pages = ["sequential Triton kernels" if walked else "Triton kernels over chunks"]
    for request in requests(program, inputs, options):
        executable = executable_of(request)
        pages += [f"{request.direction}:", *(f"  {line}" for line in lines(executable.plan))]
        pages += [f"  note: {note}" for note in executable.notes]
    return "\n".join(pages)


def kept(program: Program) -> tuple[Value, ...]:
    """The states that a forward in chunks keeps; a walk token by token keeps none."""
    return () if chunk_of(program) is None else kept_states(program)


def _without_output(plan: Plan) -> Plan:
    kernels = tuple(
        replace(k, stores=tuple(s for s in k.stores if s.value.name != OUTPUT))
        for k in plan.kernels
    )
    return replace(plan, kernels=kernels)


def computed(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels see a tensor: the interpreter multiplies bit patterns of bf16."""
    return torch.float32 if interpreting() else dtype


_chunks: dict[int, tuple[Program, ChunkProgram | None]] = {}
_adjoints: dict[int, tuple[Program, ChunkAdjoint]] = {}


def chunk_of(program: Program) -> ChunkProgram | None:
    """The chunk form, or None for a program that goes token by token."""
    if id(program) not in _chunks:
        _chunks[id(program)] = program, build(program)
    return _chunks[id(program)][1]


def adjoint_of(program: Program) -> ChunkAdjoint:
    if id(program) not in _adjoints:
        chunk = chunk_of(program)
        assert chunk is not None
        _adjoints[id(program)] = program, adjoint(chunk)
    return _adjoints[id(program)][1]
