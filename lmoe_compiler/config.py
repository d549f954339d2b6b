"""Options of a recurrence, and the only reader of LMOE_* variables. Both are checked here.

variable         values                            meaning
LMOE_DEBUG       ir,analysis,chunk,triton,fx|all   print these stages of every compilation
LMOE_VERIFY      0 | 1                             compare every scan with the interpreted program
LMOE_KERNEL_DIR  a folder                          generated kernels go there; edits are used as is
LMOE_CACHE_DIR   a folder (~/.cache/lmoe)          everything else that is kept between runs
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from lmoe_compiler.errors import InvalidOption

IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")
STAGES = ("ir", "analysis", "chunk", "triton", "fx")


@dataclass(frozen=True)
class Options:
    """How a recurrence is run. Its text is an op argument: `parse(options.text) == options`."""

    implementation: str = "auto"
    chunk_size: int | None = None
    debug: bool = False
    # Ready-made, because Dynamo reads it while tracing a call.
    text: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.implementation not in IMPLEMENTATIONS:
            raise InvalidOption(
                f"implementation={self.implementation!r} does not exist",
                why=f"it is one of {', '.join(IMPLEMENTATIONS)}",
                try_='r.with_options(implementation="auto")',
            )
        size = self.chunk_size
        if size is not None and (type(size) is not int or size < 1):
            raise InvalidOption(
                f"chunk_size={size!r} is not a positive integer",
                why="it is the number of tokens that are computed at once",
                try_="r.with_options(chunk_size=64)",
            )
        if type(self.debug) is not bool:
            raise InvalidOption(
                f"debug={self.debug!r} is not a bool", try_="r.with_options(debug=True)"
            )
        text = " ".join(f"{name}={value}" for name, value in self.changes.items())
        object.__setattr__(self, "text", text)

    @property
    def changes(self) -> dict[str, Any]:
        """The options that are not the default ones."""
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self) if f.init)
        return {name: value for name, value, default in given if value != default}

    def with_(self, changes: Mapping[str, Any]) -> Options:
        """These options with some changed; names are checked."""
        known = [f.name for f in fields(self) if f.init]
        for name in changes:
            if name not in known:
                raise InvalidOption(
                    f"there is no option {name!r}",
                    why=f"options of a recurrence are {', '.join(known)}",
                    try_=f"r.with_options({known[0]}=...)",
                )
        return replace(self, **changes)

    @staticmethod
    @cache
    def parse(text: str) -> Options:
        """The options that print as `text`."""
        values: dict[str, Any] = dict(part.split("=", 1) for part in text.split())
        if "chunk_size" in values:
            values["chunk_size"] = int(values["chunk_size"])
        if "debug" in values:
            values["debug"] = values["debug"] == "True"
        return Options().with_(values)


SCHEDULES = ("auto", "all_gather", "transpose")
INNER = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class CompileOptions:
    """What `lmoe.compile(...)` and `torch.compile(..., backend="lmoe", options={...})` understand.

    inner: the compiler below our passes. disable: names of passes to leave out. mode, inductor: Inductor's settings.
    after_aot: passes (passes/base.py) for the forward and backward graphs that AOTAutograd makes.
    mesh, sequence_parallel, data_parallel, expert_parallel (names of mesh axes; the last two may be tuples of names)
    and sequence_dim: how the model is spread over ranks. Ranks along any of these axes hold different tokens: parts of
    a sequence along the first, other rows of the batch along the others. The loss is that of all of them.
    expert_capacity: a factor; an expert has places for factor * (its share if all had as many) rows of each rank, and
    the model's `expert_dropped` counts what found none. All ranks need as many tokens in a call; others stop all of
    them. None: exact.
    even_tokens: True promises that in every call all ranks of the sequence hold as many tokens. Softmax layers then do
    without telling each other's hosts how many, and every size of the graph follows from this rank's.
    schedule: how recurrences exchange states, "auto" (the planner's choice), "all_gather" or "transpose".
    sum_gradients: over which of these axes each parameter's gradient is summed in the graph, experts' over those that
    they are not cut over: True for all, or names; wrappers (lmoe.data_parallel) take the other sums. It must be sums:
    means make the gradients too small.
    tensor_parallel: an axis whose ranks hold the same tokens, and parts of heads and hidden channels.
    cuts: what `lmoe.parallelize` has cut of the module's weights; `lmoe.compile` looks it up.
    record: an object that keeps what happened (passes/base.py); `lmoe.explain` sets it.
    """

    inner: str = "inductor"
    disable: tuple[str, ...] = ()
    mesh: Any = None
    sequence_parallel: str | None = None
    data_parallel: str | tuple[str, ...] | None = None
    expert_parallel: str | tuple[str, ...] | None = None
    expert_capacity: float | None = None
    tensor_parallel: str | None = None
    sequence_dim: int = 1
    even_tokens: bool = False
    schedule: str = "auto"
    sum_gradients: bool | str | tuple[str, ...] = True
    after_aot: tuple[Any, ...] = ()
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    cuts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    record: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> CompileOptions:
        """Checked options from the dictionary of `torch.compile(options=...)`."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise InvalidOption(
                    f"the backend has no option {name!r}",
                    why=f"options are {', '.join(known[:-2])}",
                    try_='torch.compile(model, backend="lmoe", options={"inner": "aot_eager"})',
                )
        disable = given.get("disable", ())
        names = (disable,) if isinstance(disable, str) else tuple(disable)
        return cls(**{**given, "disable": names})

    def __post_init__(self) -> None:
        if self.inner not in INNER:
            raise InvalidOption(
                f"inner={self.inner!r} is not a compiler",
                why=f"below our passes there is {', '.join(INNER)}",
                try_='lmoe.compile(model, inner="aot_eager")',
            )
        if self.schedule not in SCHEDULES:
            raise InvalidOption(
                f"schedule={self.schedule!r} does not exist",
                why=f"state exchanges are {', '.join(SCHEDULES)}",
                try_='lmoe.compile(model, ..., schedule="auto")',
            )
        self._check_axes()
        factor = self.expert_capacity
        if factor is not None and (
            type(factor) not in (int, float) or not 0 < factor < float("inf")
        ):
            raise InvalidOption(
                f"expert_capacity={factor!r} is not a positive number",
                why="it says how many rows an expert has places for, in units of a balanced load",
                try_="lmoe.compile(model, expert_capacity=1.25)",
            )

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """Axes whose ranks hold different rows of the batch, each once."""
        given = (*_names(self.data_parallel), *_names(self.expert_parallel))
        return tuple(dict.fromkeys(name for name in given if name != self.sequence_parallel))

    @property
    def token_axes(self) -> tuple[str, ...]:
        """All axes whose ranks hold different tokens."""
        return (*_names(self.sequence_parallel), *self.batch_axes)

    @property
    def summed_axes(self) -> tuple[str, ...]:
        """Axes of `token_axes` over which the graph sums gradients."""
        if isinstance(self.sum_gradients, bool):
            return self.token_axes if self.sum_gradients else ()
        return tuple(name for name in self.token_axes if name in _names(self.sum_gradients))

    @property
    def expert_axes(self) -> tuple[str, ...]:
        return _names(self.expert_parallel)

    def _check_axes(self) -> None:
        known = tuple(getattr(self.mesh, "mesh_dim_names", None) or ())
        for option in (
            "sequence_parallel", "data_parallel", "expert_parallel", "tensor_parallel"
        ):  # fmt: skip
            for axis in _names(getattr(self, option)):
                if axis not in known:
                    raise InvalidOption(
                        f"{option}={axis!r} is not an axis of the mesh",
                        why=f"the mesh has {', '.join(known) or 'no named axes'}"
                        if self.mesh is not None
                        else "no mesh was given",
                        try_=f'mesh=init_device_mesh("cuda", (8,), mesh_dim_names=("{axis}",))',
                    )
        if self.sequence_parallel in _names(self.data_parallel):
            raise InvalidOption(
                f"axis {self.sequence_parallel!r} is given to sequence_parallel and data_parallel",
                why="its ranks hold parts of one sequence, or other rows of the batch, not both",
                try_='sequence_parallel="sp", data_parallel="dp"',
            )
        for name in () if isinstance(self.sum_gradients, bool) else _names(self.sum_gradients):
            if name not in self.token_axes:
                raise InvalidOption(
                    f"sum_gradients={name!r} is no axis with different tokens",
                    why=f"gradients are summed over some of {', '.join(self.token_axes) or 'none'}",
                    try_="sum_gradients=True",
                )
        if self.tensor_parallel in self.token_axes:
            raise InvalidOption(
                f"axis {self.tensor_parallel!r} is given to tensor_parallel and for tokens",
                why="its ranks hold the same tokens, or different ones, not both",
                try_='tensor_parallel="tp", sequence_parallel="sp"',
            )


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


CACHE_DIR = "LMOE_CACHE_DIR"
"""The variable that a process gets to keep what it caches apart (bench/kernels.py)."""


@dataclass(frozen=True)
class Environment:
    """The LMOE_* variables, checked."""

    debug: frozenset[str] = frozenset()
    verify: bool = False
    kernel_dir: Path | None = None
    cache_dir: Path = Path("~/.cache/lmoe")

    @classmethod
    def read(cls, variables: Mapping[str, str]) -> Environment:
        names = {"LMOE_DEBUG", "LMOE_VERIFY", "LMOE_KERNEL_DIR", CACHE_DIR}
        for name in variables:
            if name.startswith("LMOE_") and name not in names:
                raise InvalidOption(
                    f"there is no environment variable {name}",
                    why=f"known are {', '.join(sorted(names))}",
                )
        kernels = variables.get("LMOE_KERNEL_DIR")
        return cls(
            debug=_stages(variables.get("LMOE_DEBUG", "")),
            verify=_flag("LMOE_VERIFY", variables.get("LMOE_VERIFY", "0")),
            kernel_dir=Path(kernels).expanduser() if kernels else None,
            cache_dir=Path(variables.get(CACHE_DIR) or "~/.cache/lmoe").expanduser(),
        )


def _stages(text: str) -> frozenset[str]:
    stages = [stage.strip() for stage in text.split(",") if stage.strip()]
    for stage in stages:
        if stage not in (*STAGES, "all"):
            raise InvalidOption(
                f"LMOE_DEBUG={text}: there is no stage {stage!r}",
                why=f"stages are {', '.join(STAGES)}, or all",
                try_="LMOE_DEBUG=ir,fx",
            )
    return frozenset(STAGES if "all" in stages else stages)


def _flag(name: str, text: str) -> bool:
    if text not in ("0", "1", ""):
        raise InvalidOption(f"{name}={text} is neither 0 nor 1", try_=f"{name}=1")
    return text == "1"


@cache
def environment() -> Environment:
    """The process's variables, read at first use (`environment.cache_clear()` reads them again)."""
    return Environment.read(os.environ)
