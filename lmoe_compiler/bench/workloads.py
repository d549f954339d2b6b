"""What is timed: recurrences with inputs as a trained layer would make them, and the library call for the same numbers.

Shapes are (B, T, H, D) with K = V = D, as in the library's own benchmark.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.models import RECURRENCES

Shape = tuple[int, int, int, int]
Maker = Callable[[Tensor], Tensor]

GATE_SHAPES: tuple[Shape, ...] = (
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (8, 1024, 8, 64),
)
WIDE_SHAPES: tuple[Shape, ...] = ((2, 16384, 16, 128),)
MORE_SHAPES: tuple[Shape, ...] = (
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (1, 65536, 8, 128),
    (1, 2048, 32, 128),
)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def bounded(x: Tensor) -> Tensor:
    """Log decays of RWKV-7: -0.6065 sigmoid."""
    return -0.6065 * torch.sigmoid(x)


def rates(x: Tensor) -> Tensor:
    return 1 - 2 ** (-5.0 - torch.arange(x.numel(), device=x.device, dtype=x.dtype))


@dataclass(frozen=True)
class Library:
    """A call of flash-linear-attention. `order` are its tensors by our names, `options` its keywords."""

    module: str
    function: str
    order: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def bind(self, tensors: dict[str, Tensor]) -> Callable[[], Tensor]:
        function = getattr(importlib.import_module(f"fla.ops.{self.module}"), self.function)
        named = {name: tensors[name] for name in self.order}

        def call() -> Tensor:
            result: Tensor = function(**named, **self.options)[0]
            return result

        return call


@dataclass(frozen=True)
class Workload:
    """A recurrence by name, how its inputs are made from noise, and who else computes it."""

    name: str
    gates: dict[str, Maker] = field(default_factory=dict)
    library: Library | None = None
    fp32: tuple[str, ...] = ("g",)


SCALE = {"scale": 1.0}
KEYS: dict[str, Maker] = {"q": unit, "k": unit}
DELTA: dict[str, Maker] = {**KEYS, "beta": torch.sigmoid}
QKV = ("q", "k", "v")

GATE = (
    Workload(
        "linear_attention",
        KEYS,
        Library("linear_attn", "chunk_linear_attn", QKV, {**SCALE, "normalize": False}),
    ),
    Workload(
        "simple_gla",
        {**KEYS, "g": F.logsigmoid},
        Library("simple_gla", "chunk_simple_gla", (*QKV, "g"), SCALE),
    ),
    Workload(
        "gla",
        {**KEYS, "g": F.logsigmoid},
        Library("gla", "chunk_gla", (*QKV, "g"), SCALE),
        fp32=(),
    ),
    Workload(
        "delta_rule",
        DELTA,
        Library("delta_rule", "chunk_delta_rule", (*QKV, "beta"), SCALE),
    ),
    Workload(
        "gated_delta_rule",
        {**DELTA, "g": F.logsigmoid},
        Library("gated_delta_rule", "chunk_gated_delta_rule", (*QKV, "g", "beta"), SCALE),
    ),
    Workload(
        "kda",
        {**DELTA, "g": F.logsigmoid},
        Library("kda", "chunk_kda", (*QKV, "g", "beta"), SCALE),
        fp32=(),
    ),
)
WIDE = (
    Workload(
        "retention", {**KEYS, "gamma": rates}, Library("retention", "chunk_retention", QKV, SCALE)
    ),
    Workload("hgrn2", {"f": torch.sigmoid}, fp32=()),
    Workload("rwkv7", {**KEYS, "g": bounded, "a": torch.sigmoid}, fp32=()),
    Workload("mamba2", KEYS, fp32=("dt",)),
)
WORKLOADS = {w.name: w for w in (*GATE, *WIDE)}


def make_inputs(
    workload: Workload, shape: Shape, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Every input of the recurrence by name, requiring gradients."""
    batch, length, heads, size = shape
    generator = torch.Generator(device).manual_seed(zlib.crc32(workload.name.encode()))
    inputs = {}
    for var in RECURRENCES[workload.name].inputs:
        lead = (batch, length) if var.kind == "token" else ()
        noise = torch.randn(
            *lead, heads, *(size for _ in var.axes), device=device, generator=generator
        )
        made = workload.gates.get(var.name, lambda x: x)(noise)
        kept = torch.float32 if var.name in workload.fp32 or var.kind == "head" else dtype
        inputs[var.name] = made.to(kept).requires_grad_()
    return inputs


def bytes_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
