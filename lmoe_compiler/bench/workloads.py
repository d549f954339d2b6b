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

from lmoe_compiler.codegen import supported
from lmoe_compiler.models import RECURRENCES

Shape = tuple[int, int, int, int]
Maker = Callable[[Tensor], Tensor]
DTYPES = {name: dtype for dtype, name in supported.DTYPES.items()}

GATE_SHAPES: tuple[Shape, ...] = (
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (8, 1024, 8, 64),
)
WIDE_SHAPES: tuple[Shape, ...] = ((2, 16384, 16, 128),)
STEP_SHAPES: tuple[Shape, ...] = ((1, 1, 32, 128), (64, 1, 32, 128), (256, 1, 32, 128))
MORE_SHAPES: tuple[Shape, ...] = (
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (1, 65536, 8, 128),
    (1, 2048, 32, 128),
)


def shape_of(text: str) -> Shape:
    """A shape as it is written on a command line: 2,16384,16,128."""
    batch, length, heads, size = (int(n) for n in text.split(","))
    return batch, length, heads, size


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def bounded(x: Tensor) -> Tensor:
    """Log decays of RWKV-7: -0.6065 sigmoid."""
    return -0.6065 * torch.sigmoid(x)


def rates(x: Tensor) -> Tensor:
    return 1 - 2 ** (-5.0 - torch.arange(x.numel(), device=x.device, dtype=x.dtype))


@dataclass(frozen=True)
class Library:
    """A call of flash-linear-attention, or of torch.

    order     its tensors, by our names
    options   its keywords
    prepare   its tensors from our inputs, where they differ. This is done once and not timed: what our kernels do
              themselves (activations of gates, a skip connection) is given to the library for nothing.
    """

    module: str
    function: str
    order: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[..., dict[str, Tensor]] = dict

    def find(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return found

    def bind(self, inputs: dict[str, Tensor]) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """The call, and the tensors that it is differentiated by."""
        function, prepared = self.find(), self.prepare(**inputs)
        named = {name: prepared[name].detach().requires_grad_() for name in self.order}

        def call() -> Tensor:
            result = function(**named, **self.options)
            return result[0] if isinstance(result, tuple) else result

        return call, list(named.values())


@dataclass(frozen=True)
class Workload:
    """A recurrence by name, how its inputs are made from noise, and who else computes it. `family`: what the gates of
    issue 3 take together."""

    name: str
    gates: dict[str, Maker] = field(default_factory=dict)
    library: Library | None = None
    fp32: tuple[str, ...] = ("g",)
    family: str = ""


SCALE = {"scale": 1.0}
KEYS: dict[str, Maker] = {"q": unit, "k": unit}
DELTA: dict[str, Maker] = {**KEYS, "beta": torch.sigmoid}
QKV = ("q", "k", "v")


def _hgrn2(q: Tensor, f: Tensor, v: Tensor) -> dict[str, Tensor]:
    gate = torch.sigmoid(f.float())
    return {"q": q, "k": (1 - gate).to(f.dtype), "v": v, "g": gate.log().to(f.dtype)}


def _mamba2(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, A_log: Tensor, dt_bias: Tensor, D: Tensor
) -> dict[str, Tensor]:
    """Without the skip connection D v."""
    dt = F.softplus(dt + dt_bias)
    return {"q": q, "k": k, "v": (dt[..., None] * v).to(v.dtype), "g": -A_log.exp() * dt}


def _rwkv7(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, kappa: Tensor, a: Tensor
) -> dict[str, Tensor]:
    kappa = F.normalize(kappa.float(), dim=-1)
    removed = {"a": (-kappa).to(k.dtype), "b": (a * kappa).to(k.dtype)}
    return {"r": q, "w": g, "k": k, "v": v, **removed}


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    found = {"query": q, "key": k, "value": v}
    return {name: x.transpose(1, 2).contiguous() for name, x in found.items()}


GATE = (
    Workload(
        "linear_attention",
        KEYS,
        Library("fla.ops.linear_attn", "chunk_linear_attn", QKV, {**SCALE, "normalize": False}),
        family="scalar",
    ),
    Workload(
        "simple_gla",
        {**KEYS, "g": F.logsigmoid},
        Library("fla.ops.simple_gla", "chunk_simple_gla", (*QKV, "g"), SCALE),
        family="scalar",
    ),
    Workload(
        "gla",
        {**KEYS, "g": F.logsigmoid},
        Library("fla.ops.gla", "chunk_gla", (*QKV, "g"), SCALE),
        fp32=(),
        family="gla",
    ),
    Workload(
        "delta_rule",
        DELTA,
        Library("fla.ops.delta_rule", "chunk_delta_rule", (*QKV, "beta"), SCALE),
        family="delta",
    ),
    Workload(
        "gated_delta_rule",
        {**DELTA, "g": F.logsigmoid},
        Library("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", (*QKV, "g", "beta"), SCALE),
        family="delta",
    ),
    Workload(
        "kda",
        {**DELTA, "g": F.logsigmoid},
        Library("fla.ops.kda", "chunk_kda", (*QKV, "g", "beta"), SCALE),
        fp32=(),
        family="delta",
    ),
)
WIDE = (
    Workload(
        "retention",
        {**KEYS, "gamma": rates},
        Library("fla.ops.retention", "chunk_retention", QKV, SCALE),
    ),
    Workload(
        "hgrn2",
        {"q": unit},
        Library("fla.ops.gla", "chunk_gla", (*QKV, "g"), SCALE, _hgrn2),
        fp32=(),
    ),
    Workload(
        "rwkv7",
        {**KEYS, "g": bounded, "a": torch.sigmoid},
        Library("fla.ops.rwkv7", "chunk_rwkv7", ("r", "w", "k", "v", "a", "b"), SCALE, _rwkv7),
        fp32=(),
    ),
    Workload(
        "mamba2",
        KEYS,
        Library("fla.ops.simple_gla", "chunk_simple_gla", (*QKV, "g"), SCALE, _mamba2),
        fp32=("dt",),
    ),
)
SOFTMAX = Library(
    "torch.nn.functional",
    "scaled_dot_product_attention",
    ("query", "key", "value"),
    {"is_causal": True, **SCALE},
    _heads_first,
)
"""For scale: causal softmax attention over the same q, k and v."""
WORKLOADS = {w.name: w for w in (*GATE, *WIDE)}


def tuned_as(workload: Workload, shape: Shape) -> str:
    """The name of a cell's choices in the library: ops that call the same function share them."""
    assert workload.library is not None
    return f"{workload.library.function} {','.join(map(str, shape))}"


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
