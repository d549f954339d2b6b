"""The table of variants: a row each. Every test runs over it; a new variant adds no test code.

A row gives what the inputs look like in a trained model (gates are not Gaussian), what the analysis
must prove, and which independent implementations there are.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.definition import Recurrence
from lmoe_compiler.models import RECURRENCES

Maker = Callable[[Tensor], Tensor]


def unit(x: Tensor) -> Tensor:
    """Keys of length one: what the delta rules' layers feed them."""
    return F.normalize(x, dim=-1)


def log_decay(x: Tensor) -> Tensor:
    """Mostly slow, now and then a hard reset: log decays from about -1e-3 to -10."""
    return -F.softplus(3 * x - 3)


def log_decay_rwkv7(x: Tensor) -> Tensor:
    return -0.6065 * torch.sigmoid(x)


def retention_rate(x: Tensor) -> Tensor:
    return 1 - 2 ** (-5.0 - torch.arange(x.numel(), dtype=x.dtype).reshape(x.shape))


def small(x: Tensor) -> Tensor:
    return 0.3 * x


@dataclass(frozen=True)
class Case:
    """`gates`: how a named input is made from Gaussian noise; without an entry it is the noise.

    `extremes`: values a named input may also take, which must stay exact side by side.
    """

    name: str
    kind: str
    gates: dict[str, Maker] = field(default_factory=dict)
    states: dict[str, Maker] = field(default_factory=dict)
    oracles: tuple[str, ...] = ("fla",)
    extremes: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def recurrence(self) -> Recurrence:
        return RECURRENCES[self.name]

    def __str__(self) -> str:
        return self.name


# A log decay of nothing, of a reset, and of all between.
LOG_DECAYS = {"g": (0.0, -1e-4, -1.0, -30.0, -1000.0, -math.inf)}
PRE_SIGMOID = {"f": (-1000.0, -30.0, 0.0, 30.0, 1000.0)}


@dataclass(frozen=True)
class Sizes:
    B: int = 2
    T: int = 37
    H: int = 2
    K: int = 8
    V: int = 6

    def of(self, *axes: str) -> tuple[int, ...]:
        return tuple(getattr(self, axis[0]) for axis in axes)


CASES = (
    Case("linear_attention", "identity"),
    Case("normalised_linear_attention", "identity", states={"z": torch.exp}),
    Case("retention", "scalar", {"gamma": retention_rate}),
    Case("simple_gla", "scalar", {"g": log_decay}, extremes=LOG_DECAYS),
    Case(
        "mamba2",
        "scalar",
        {"A_log": small},
        oracles=("fla", "transformers"),
        extremes={"dt": (-50.0, 0.0, 500.0)},
    ),
    Case("gla", "diagonal", {"g": log_decay}, extremes=LOG_DECAYS),
    Case("hgrn2", "diagonal", extremes=PRE_SIGMOID),
    Case(
        "delta_rule",
        "rank_one",
        {"k": unit, "beta": torch.sigmoid},
        oracles=("fla", "transformers"),
    ),
    Case(
        "gated_delta_rule",
        "rank_one",
        {"k": unit, "g": log_decay, "beta": torch.sigmoid},
        oracles=("fla", "transformers"),
        extremes=LOG_DECAYS,
    ),
    Case(
        "kda",
        "rank_one",
        {"k": unit, "g": log_decay, "beta": torch.sigmoid},
        oracles=("fla", "transformers"),
        extremes=LOG_DECAYS,
    ),
    Case("rwkv7", "rank_one", {"g": log_decay_rwkv7, "a": torch.sigmoid}, oracles=("fla", "numpy")),
    Case("ttt_linear", "rank_one", {"k": unit, "eta": torch.sigmoid}, oracles=("fla", "numpy")),
    Case(
        "slstm",
        "nonlinear",
        dict.fromkeys(("Rz", "Ri", "Rf", "Ro"), small),
        states={"n": torch.exp},
        oracles=("numpy",),
    ),
)


def make_inputs(
    case: Case, sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs by name and initial states; the noise of a name depends on nothing else."""

    def noise(name: str, shape: tuple[int, ...]) -> Tensor:
        seed = torch.Generator().manual_seed(zlib.crc32(f"{case.name}.{name}".encode()))
        return torch.randn(shape, generator=seed, dtype=torch.float64)

    def same(x: Tensor) -> Tensor:
        return x

    program = case.recurrence.ir
    lead = {"token": sizes.of("B", "T", "H"), "head": sizes.of("H")}
    inputs = {
        var.name: case.gates.get(var.name, same)(
            noise(var.name, lead[var.kind] + sizes.of(*var.axes))
        ).to(dtype)
        for var in program.inputs
    }
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    states = [
        case.states.get(var.name, same)(noise(var.name, sizes.of("B", "H", *var.axes))).to(
            state_dtype
        )
        for var in program.states
    ]
    return inputs, states


def weights_like(*tensors: Tensor) -> list[Tensor]:
    """Fixed random cotangents: a loss <x, w> sees every entry of every x."""
    return [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(x)
        for n, x in enumerate(tensors)
    ]


def with_extremes(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with every third entry of a gate replaced by one of its extreme values, at random."""
    seed = torch.Generator().manual_seed(1)
    changed = dict(inputs)
    for name, values in case.extremes.items():
        x = inputs[name]
        choice = torch.randint(3 * len(values), x.shape, generator=seed)
        for n, value in enumerate(values):
            x = torch.where(choice == n, torch.full_like(x, value), x)
        changed[name] = x
    return changed
