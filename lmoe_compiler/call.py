"""What calling a Recurrence does: binds arguments and runs the reference (the compiled path follows)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lmoe_compiler.errors import InvalidArgument

if TYPE_CHECKING:
    from lmoe_compiler.definition import Recurrence


def bind(r: Recurrence, args: Sequence[Tensor], named: Mapping[str, Tensor]) -> list[Tensor]:
    """Positional and named inputs in the signature's order."""
    names = [v.name for v in r.inputs]
    given = dict(zip(names, args, strict=False)) | dict(named)
    if len(args) > len(names) or set(given) != set(names):
        raise InvalidArgument(
            f"{r.name} got {len(args)} positional arguments and {sorted(named)}",
            why=f"its inputs are {', '.join(names)}", try_=f"{r.name}({', '.join(names)})",
        )  # fmt: skip
    return [given[name] for name in names]


def scan(r: Recurrence, *args: Tensor, **kwargs: Any) -> Any:
    return r.reference(*args, **kwargs)


def step(r: Recurrence, *args: Tensor, state: Any, **named: Tensor) -> Any:
    inputs = bind(r, args, named)
    at = [x.unsqueeze(1) if v.kind == "token" else x for v, x in zip(r.inputs, inputs, strict=True)]
    output, final = r.reference(*at, initial_state=state, return_state=True)
    return output.squeeze(1), final


def explain(r: Recurrence, *args: Tensor, **kwargs: Any) -> str:
    return str(r.ir)


def source(r: Recurrence, *args: Tensor, **kwargs: Any) -> str:
    return ""
