"""What calling a Recurrence does: bind arguments, check them, run the op. Dynamo traces these functions.

    o = r(q, k, v)                                       [B, T, H, ...]
    o, S = r(q, k, v, initial_state=S, return_state=True)
    o, S = r.step(q, k, v, state=S)                      [B, H, ...]
    o, S = r.step(q, k, v, state=S, inplace=True)        S becomes the next state

Shapes, dtypes and devices are checked before any work (checks.py). Next: library.py.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lmoe_compiler import library, stages
from lmoe_compiler.errors import InvalidArgument

if TYPE_CHECKING:
    from lmoe_compiler.definition import Recurrence

State = Tensor | Sequence[Tensor] | None


def bind(r: Recurrence, args: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
    """Positional and named inputs in the signature's order."""
    if not named and len(args) == len(r.inputs) and all([isinstance(x, Tensor) for x in args]):
        return list(args)
    names = [var.name for var in r.inputs]
    if len(args) > len(names):
        raise _misfit(r, f"got {len(args)} positional arguments", f"takes {len(names)} inputs")
    given = dict(zip(names, args, strict=False))
    for name, x in named.items():
        if name not in names:
            raise _misfit(r, f"got an unknown argument {name!r}", "has no such input")
        if name in given:
            raise _misfit(r, f"got {name!r} twice", "takes it by position or by name")
        given[name] = x
    for name in names:
        if name not in given:
            raise _misfit(r, f"misses the argument {name!r}", "needs every input")
        if not isinstance(given[name], Tensor):
            raise _misfit(r, f"got {type(given[name]).__name__} for {name!r}", "takes tensors")
    return [given[name] for name in names]


def scan(
    r: Recurrence,
    /,
    *args: Tensor,
    initial_state: State = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **named: Tensor,
) -> Any:
    """o, or (o, final states) with `return_state`. One state comes as a tensor, several as a tuple."""
    inputs = bind(r, args, named)
    states = _as_list(r, initial_state, "initial_state")
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        raise _misfit(r, f"got {type(cu_seqlens).__name__} for 'cu_seqlens'", "takes tensors")
    if r.options.implementation == "reference":
        return r.reference(
            *inputs,
            initial_state=initial_state,
            return_state=return_state,
            cu_seqlens=cu_seqlens,
        )
    text = (r.origin or r).text(**static_sizes(r, inputs))
    results = library.scan(text, inputs, states, cu_seqlens, r.options)
    output, *finals = results[: 1 + len(r.states)]
    return (output, _as_given(finals)) if return_state else output


def step(
    r: Recurrence, /, *args: Tensor, state: State = None, inplace: bool = False, **named: Tensor
) -> Any:
    """(o, next states) of one token; `state=None` is the start of a sequence.

    With `inplace` the given states become the next ones: no second copy is allocated or written.
    """
    inputs = bind(r, args, named)
    states = _as_list(r, state, "state")
    if inplace and not states:
        raise _misfit(r, "got inplace=True without a state", "writes the next state over state=")
    if r.options.implementation == "reference":
        rows = [
            x.unsqueeze(1) if var.kind == "token" else x
            for var, x in zip(r.inputs, inputs, strict=True)
        ]
        output, final = r.reference(*rows, initial_state=state, return_state=True)
        if inplace:
            for old, new in zip(states, _as_list(r, final, "state"), strict=True):
                old.copy_(new)
            final = state
        return output.squeeze(1), final
    text = (r.origin or r).text(**static_sizes(r, inputs))
    if inplace:
        return library.step_(text, inputs, states, r.options), state
    output, *following = library.step(text, inputs, states, r.options)
    return output, _as_given(following)


def explain(r: Recurrence, /, *args: Tensor, **named: Tensor) -> str:
    """Every stage as text; with arguments also who would run this call."""
    if not args and not named:
        return stages.render(stages.of_program(r.ir))
    inputs = bind(r, args, named)
    program = r.program(**static_sizes(r, inputs))
    return stages.render([*stages.of_program(program), *stages.of_call(program, inputs, r.options)])


def source(r: Recurrence, /, *args: Tensor, **named: Tensor) -> str:
    """The generated kernels of this call, as text."""
    inputs = bind(r, args, named)
    return stages.source(r.program(**static_sizes(r, inputs)), inputs, r.options)


def _as_list(r: Recurrence, state: State, name: str) -> list[Tensor]:
    if state is None:
        return []
    if not isinstance(state, (Tensor, list, tuple)):
        raise _misfit(r, f"got {type(state).__name__} for {name!r}", "takes tensors")
    states = [state] if isinstance(state, Tensor) else list(state)
    for x in states:
        if not isinstance(x, Tensor):
            raise _misfit(r, f"got {type(x).__name__} in {name!r}", "takes tensors")
    return states


def _as_given(states: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return states[0] if len(states) == 1 else tuple(states)


def static_sizes(r: Recurrence, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Lengths of the dims that the step loops over: each is a program of its own."""
    if not r.static_dims:
        return {}
    sizes: dict[str, int] = {}
    for dim in r.static_dims:
        for var, x in zip(r.inputs, inputs, strict=True):
            if dim in var.axes:
                # Not int(): under torch.compile this is what makes a symbolic size a number.
                sizes[dim] = operator.index(x.shape[var.axes.index(dim) - len(var.axes)])
    return sizes


def _misfit(r: Recurrence, what: str, why: str) -> InvalidArgument:
    names = ", ".join(var.name for var in r.inputs)
    return InvalidArgument(
        f"{r.name} {what}",
        where=f"the call of {r.name}",
        why=f"it {why}: {names}; and initial_state=, return_state=, cu_seqlens= (a step: state=, inplace=)",
        try_=f"{r.name}({names})",
    )
