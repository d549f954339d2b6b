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
    """What kernels write: results are tensors of their own, the rest lies in the workspace or in results.

    A result in `parts` is their sum over the first axis, taken when all kernels have run.
    """

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
    """One kernel of a call.

    Arguments: slots (inputs, own tensors, the workspace), then lengths. It waits for the launches `after`, by
    their places among those of the call, and with them for those that they wait for. `apart`: its few programs scan
    for long beside other kernels, and take longer where two of them share an SM.
    """

    launcher: Launcher
    grid: int
    slots: tuple[int, ...]
    lengths: tuple[int, ...]
    apart: bool = False
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """What calls of one extent have in common. The workspace begins with what has to be zero.

    `places` of the shared values: the slot of a result, or WORKSPACE, and bytes from its start. `bytes` are the
    workspace's. `sums` are the slots of results in parts. `ready` are the launches of devices on which every kernel has
    run, None where only Triton can launch them.
    """

    own: tuple[Made, ...]
    shared: tuple[Made, ...]
    places: tuple[tuple[int, int], ...]
    bytes: int
    zeros: int
    launches: tuple[Launch, ...]
    results: tuple[int, ...]
    sums: frozenset[int]
    narrow: bool
    ready: dict[int | None, Launches | None] = field(default_factory=dict)
