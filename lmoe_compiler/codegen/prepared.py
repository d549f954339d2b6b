"""What calls of the same lengths have in common, as data: tensors to be made, their places, launches."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch

from lmoe_compiler.codegen.driver import Launches
from lmoe_compiler.codegen.launcher import Launcher

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

    Arguments: slots (inputs, own tensors, the workspace, sums), then lengths. It waits for the launches `after`, by
    their places among those of the call, and with them for those that they wait for. `apart`: its few programs scan
    for long beside other kernels, and take longer where two of them share an SM.
    """

    launcher: Launcher
    grid: int
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    sums: tuple[Sum, ...]
    apart: bool = False
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What calls of one extent have in common. The workspace begins with what has to be zero.

    `places` of the shared values: the slot of a result, or WORKSPACE, and bytes from its start. `bytes` are the
    workspace's. `totals` are the slots of parts that are added up; their totals have the slots after all others, in
    this order. `ready` are the launches of devices on which every kernel has run, None where only Triton can launch
    them.
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
