"""Checks before any work: shapes, dtypes, devices always; values on the CPU and under debug.

The ops' fake kernels run the shape checks too, so `torch.compile` reports the same errors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_compiler import interpreted
from lmoe_compiler.config import Options
from lmoe_compiler.errors import (
    BoundViolated,
    DeviceMismatch,
    DtypeMismatch,
    HeadCountMismatch,
    InvalidCuSeqlens,
    InvalidState,
    ShapeMismatch,
    WrongResult,
)
from lmoe_compiler.ir.nodes import Program, Var
from lmoe_compiler.layout import Measured, first_token, gates, leading, measure

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(
    program: Program,
    inputs: Sequence[Measured],
    states: Sequence[Measured],
    cu_seqlens: Measured | None,
    *,
    step: bool = False,
) -> None:
    """Raise the error of the first argument that does not fit; no value is read."""
    assert len(inputs) == len(program.inputs), (len(inputs), program.inputs)
    _check_ranks(program, inputs, step)
    _check_dtypes(program, inputs)
    _check_devices(program, inputs, states, cu_seqlens)
    _check_sizes(program, inputs, step)
    if cu_seqlens is not None:
        _check_cu_seqlens(program, cu_seqlens, inputs[first_token(program)])
    if states:
        _check_states(program, inputs, states, cu_seqlens, step)


def check_shapes(program: Program, inputs: Sequence[Measured]) -> None:
    """What `check` says of the shapes of a sequence, whatever the dtypes."""
    _check_ranks(program, inputs, step=False)
    _check_sizes(program, inputs, step=False)


def _check_ranks(program: Program, inputs: Sequence[Measured], step: bool) -> None:
    for var, x in zip(program.inputs, inputs, strict=True):
        if len(x.shape) != len(leading(var, step=step)) + len(var.axes):
            raise ShapeMismatch(
                f"{var.name} has {len(x.shape)} dimensions, shape {_shape(x)}",
                where=_where(program, var),
                why=f"it is declared {_declared(var)}, so it is {_layout(var, step)}",
                try_=_rank_fix(var, x, step),
            )


def check_values(
    program: Program, inputs: Sequence[Tensor], cu_seqlens: Tensor | None, *, debug: bool
) -> None:
    """What can only be seen in the numbers: offsets, and under debug the declared bounds."""
    if cu_seqlens is not None:
        length = inputs[first_token(program)].shape[1]
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or offsets != sorted(offsets):
            raise InvalidCuSeqlens(
                f"cu_seqlens = {_some(offsets)} with T = {length} tokens",
                where=f"the call of {program.name}",
                why="document i is tokens c[i] to c[i+1]: start at 0, never decrease, end at T",
                try_=f"cu_seqlens=torch.tensor([0, ..., {length}], dtype=torch.int32)",
            )
    if not debug:
        return
    by_name = {var.name: x for var, x in zip(program.inputs, inputs, strict=True)}
    for bound in program.bounds:
        x = by_name[bound.name].detach()
        if x.numel() and not bool(((x >= bound.low) & (x <= bound.high)).all()):
            raise BoundViolated(
                f"{bound.name} has values in [{float(x.min()):.6g}, {float(x.max()):.6g}]",
                where=f"the call of {program.name}",
                why=f"its declared range is [{bound.low:g}, {bound.high:g}], which the kernels rely on",
                try_=f'@lmoe.recurrence(bounds={{"{bound.name}": (low, high)}}) with the true range',
            )


# Relative RMS error beyond which a result is wrong and not just rounded, by the dtype of the inputs.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def verify(
    program: Program,
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    cu_seqlens: Tensor | None,
    results: Sequence[Tensor],
) -> None:
    """Under LMOE_VERIFY: the output and final states of a scan against the interpreted program in float64."""
    wide = [x.double() for x in inputs], [x.double() for x in states]
    output, finals, _ = interpreted.scan(program, wide[0], wide[1] or None, cu_seqlens, Options())
    names = ["the output", *(f"the final {var.name}" for var in program.states)]
    for name, actual, expected in zip(names, results, (output, *finals), strict=True):
        error = float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30))
        limit = _TOLERANCE[inputs[first_token(program)].dtype]
        if expected.numel() and not error <= limit:
            raise WrongResult(
                f"{name} of {program.name} has a relative error of {error:.2g}",
                where=f"a call with inputs {', '.join(_shape(x) for x in inputs)}",
                why=f"LMOE_VERIFY compares with the interpreted program; {limit:g} would be rounding",
                try_='r.with_options(implementation="reference"), and please report this call',
            )


def _check_dtypes(program: Program, inputs: Sequence[Measured]) -> None:
    loose = gates(program) | {var.name for var in program.inputs if var.kind == "head"}
    main: tuple[str, torch.dtype] | None = None
    for var, x in zip(program.inputs, inputs, strict=True):
        if x.dtype not in DTYPES:
            raise DtypeMismatch(
                f"{var.name} is {x.dtype}",
                where=_where(program, var),
                why="inputs are bfloat16, float16, float32 or float64",
                try_=f"{var.name}.to(torch.float32)",
            )
        if var.name not in loose:
            main = main or (var.name, x.dtype)
            if x.dtype != main[1]:
                raise DtypeMismatch(
                    f"{var.name} is {x.dtype} but {main[0]} is {main[1]}",
                    where=_where(program, var),
                    why="all vector inputs have one dtype; only gates and head parameters may be float32",
                    try_=f"{var.name}.to({main[0]}.dtype)",
                )
    token = first_token(program)
    main = main or (program.inputs[token].name, inputs[token].dtype)
    for var, x in zip(program.inputs, inputs, strict=True):
        if x.dtype not in (main[1], torch.float32):
            raise DtypeMismatch(
                f"{var.name} is {x.dtype} but {main[0]} is {main[1]}",
                where=_where(program, var),
                why=f"a gate or head parameter has the dtype of {main[0]}, or float32",
                try_=f"{var.name}.float()",
            )


def _check_devices(
    program: Program,
    inputs: Sequence[Measured],
    states: Sequence[Measured],
    cu_seqlens: Measured | None,
) -> None:
    device = inputs[0].device
    named = [(var.name, x) for var, x in zip(program.inputs, inputs, strict=True)]
    named += [(f"initial_state[{i}]", x) for i, x in enumerate(states)]
    if cu_seqlens is not None:
        named.append(("cu_seqlens", cu_seqlens))
    for name, x in named:
        if x.device != device:
            raise DeviceMismatch(
                f"{name} is on {x.device} but {program.inputs[0].name} is on {device}",
                where=f"the call of {program.name}",
                why="one kernel reads all arguments",
                try_=f"{name.split('[')[0]}.to({program.inputs[0].name}.device)",
            )


def _check_sizes(program: Program, inputs: Sequence[Measured], step: bool) -> None:
    """Each dimension name has one size; head counts divide the widest."""
    seen: dict[str, tuple[str, int]] = {
        axis: ("the definition", size) for axis, size in program.static
    }
    heads: tuple[str, int] = ("", 1)
    for var, x in zip(program.inputs, inputs, strict=True):
        for name, size in zip((*leading(var, step=step), *var.axes), x.shape, strict=True):
            if name == "H":
                heads = max(heads, (var.name, size), key=lambda pair: pair[1])
            elif seen.setdefault(name, (var.name, size))[1] != size:
                raise ShapeMismatch(
                    f"{var.name} has {name} = {size} but {seen[name][0]} has {name} = {seen[name][1]}",
                    where=_where(program, var),
                    why=f"{name} is one size in a call; {var.name} is {_layout(var, step)} = {_shape(x)}",
                    try_=_size_fix(program, name),
                )
    for var, x in zip(program.inputs, inputs, strict=True):
        count = x.shape[leading(var, step=step).index("H")]
        if count == 0 or heads[1] % count != 0:
            widest = f" but {heads[0]} has {heads[1]}" if heads[0] else ""
            raise HeadCountMismatch(
                f"{var.name} has {count} heads{widest}",
                where=_where(program, var),
                why="an input may have fewer heads only by an integer factor: head h reads group h // factor",
                try_=f"{var.name} of shape {_layout(var, step)} with H = {heads[1]} or a divisor of it",
            )


def _check_cu_seqlens(program: Program, cu_seqlens: Measured, token: Measured) -> None:
    where, length = f"the call of {program.name}", token.shape[1]
    example = f"cu_seqlens=torch.tensor([0, ..., {length}], dtype=torch.int32)"
    if cu_seqlens.dtype != torch.int32:
        raise InvalidCuSeqlens(
            f"cu_seqlens is {cu_seqlens.dtype}",
            where=where,
            why="kernels read int32 offsets",
            try_="cu_seqlens=cu_seqlens.to(torch.int32)",
        )
    if len(cu_seqlens.shape) != 1 or cu_seqlens.shape[0] < 2:
        raise InvalidCuSeqlens(
            f"cu_seqlens has shape {_shape(cu_seqlens)}",
            where=where,
            why="it is [N + 1]: the start of each of N documents, then T",
            try_=example,
        )
    if token.shape[0] != 1:
        raise InvalidCuSeqlens(
            f"cu_seqlens was given with a batch of {token.shape[0]}",
            where=where,
            why="packed documents lie one after another in one row: B = 1",
            try_="x.flatten(0, 1).unsqueeze(0) for every token input, and offsets into that row",
        )


def _check_states(
    program: Program,
    inputs: Sequence[Measured],
    states: Sequence[Measured],
    cu_seqlens: Measured | None,
    step: bool,
) -> None:
    name = "state" if step else "initial_state"
    where = f"{name}= of {program.name}"
    if len(states) != len(program.states):
        raise InvalidState(
            f"{name} has {len(states)} tensors",
            where=where,
            why=f"{program.name} has {len(program.states)} states: "
            + ", ".join(f"{var.name}[{', '.join(var.axes)}]" for var in program.states),
            try_=f"{name}=({', '.join(var.name for var in program.states)},)",
        )
    sizes = measure(program, inputs, (), cu_seqlens, step=step)
    for var, x in zip(program.states, states, strict=True):
        known = all(axis in sizes.dims for axis in var.axes)
        rank = len(x.shape) == 2 + len(var.axes)
        if not rank or (known and tuple(x.shape) != sizes.state(var)):
            expected = [*map(str, (sizes.documents, sizes.heads))]
            expected += [str(sizes.dims.get(axis, axis)) for axis in var.axes]
            raise InvalidState(
                f"{var.name} of {name} has shape {_shape(x)}",
                where=where,
                why=f"here it is [{', '.join(expected)}]: {_layout(var, step)}, "
                "N = B or the number of documents",
                try_=f"{name}=torch.zeros({', '.join(expected)}, dtype={sizes.accumulate})",
            )
        if x.dtype != sizes.accumulate:
            raise InvalidState(
                f"{var.name} of {name} is {x.dtype}",
                where=where,
                why="states are float32, and float64 for float64 inputs",
                try_=f"{name}.to({sizes.accumulate})",
            )


def _shape(x: Measured) -> str:
    return f"[{', '.join(str(n) for n in x.shape)}]"


def _some(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:12]))}, ...]"


def _layout(var: Var, step: bool) -> str:
    return f"[{', '.join((*leading(var, step=step), *var.axes))}]"


def _declared(var: Var) -> str:
    kind = var.kind.capitalize()
    return f"{kind}[{', '.join(var.axes)}]" if var.axes else kind


def _where(program: Program, var: Var) -> str:
    declared = var.loc or program.states[0].loc
    return f"argument {var.name} of {program.name}" + (f" ({declared})" if declared else "")


def _rank_fix(var: Var, x: Measured, step: bool) -> str:
    names = (*leading(var, step=step), *var.axes)
    if len(x.shape) + 1 == len(names) and var.kind == "token":
        return f"{var.name}.unsqueeze({names.index('H')})  # if there is one head"
    if len(x.shape) == len(names) + 1 and x.shape[-1] == 1:
        return f"{var.name}.squeeze(-1)"
    if len(x.shape) == len(names) + 1 and step and var.kind == "token":
        return f"{var.name}[:, t]  # a step takes one token"
    return f"{var.name} = torch.randn({', '.join(names)})"


def _size_fix(program: Program, name: str) -> str:
    users = [var.name for var in program.inputs if name in var.axes or var.kind == "token"]
    what = {"T": "tokens", "B": "sequences"}.get(name, f"entries in {name}")
    return f"pass {', '.join(users)} with the same number of {what}"
