"""The table that says how each recurrence's inputs are made.

A `MixerSpec` is data: for each input of the recurrence, a `Projected` (a linear map of the tokens,
then functions) or a `Learned` (a parameter per head); then how the output is normed and gated.
A new recurrence needs a row here, or none: without a row, vector inputs are plain projections.
Next: mixers.py, the layer that reads a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_compiler.errors import InvalidModel
from lmoe_compiler.models import (
    delta_rule,
    diagonal_decay,
    nonlinear,
    scalar_decay,
    test_time_training,
)
from lmoe_compiler.models.own_mixers import is_own, own

Function = Callable[[Tensor], Tensor]


# -- functions of one projected input [..., H, *axes] --------------------------------------------


def l2norm(x: Tensor) -> Tensor:
    y: Tensor = F.normalize(x, dim=-1, eps=1e-6)
    return y


def scaled(x: Tensor) -> Tensor:
    """Queries are divided by the square root of their size, as in softmax attention."""
    return x * x.shape[-1] ** -0.5


def gentle_log_decay(x: Tensor) -> Tensor:
    """GLA's gate (arXiv 2312.06635, section 4.4): the 16th root of a sigmoid, as a logarithm."""
    return F.logsigmoid(x) / 16


def bounded_log_decay(x: Tensor) -> Tensor:
    """RWKV-7's decay (arXiv 2503.14456, eq. 9): the factor stays above exp(-exp(-1/2)) = 0.545."""
    return -math.exp(-0.5) * torch.sigmoid(x)


class SoftplusLogDecay(nn.Module):
    """-exp(A_log) softplus(x + dt_bias): Mamba-2's decay, used by Gated DeltaNet and KDA."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.A_log = nn.Parameter(log_of_uniform(shape[:1]))
        self.dt_bias = nn.Parameter(inverse_softplus_of_small_steps(shape))

    def forward(self, x: Tensor) -> Tensor:
        rate = self.A_log.exp().view(-1, *[1] * (self.dt_bias.ndim - 1))
        # A sum with a float32 parameter: the decay is float32 or wider.
        g: Tensor = -rate * F.softplus(x + self.dt_bias)
        return g


# -- initial values of learned inputs ------------------------------------------------------------


def log_of_uniform(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape).uniform_(1, 16).log()


def inverse_softplus_of_small_steps(shape: tuple[int, ...]) -> Tensor:
    """softplus of it is log-uniform in [0.001, 0.1]: memories of 10 to 1000 tokens."""
    step = torch.exp(torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)))
    return step + torch.log(-torch.expm1(-step))


def retention_decays(shape: tuple[int, ...]) -> Tensor:
    """1 - 2^(-5 - h) (RetNet, arXiv 2307.08621, section 2.1)."""
    return 1 - torch.exp2(-5.0 - torch.arange(shape[0]))


def small_normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * shape[-1] ** -0.5 / 4


# -- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projected:
    """A token input: a linear map of x (through `rank` channels if given), then `functions` in
    order.

    `conv` puts the short convolution before them. A function that is an `nn.Module` class is made
    with the input's shape (H, *axes) and may hold parameters.
    """

    functions: tuple[Function | type[nn.Module], ...] = ()
    conv: bool = False
    rank: int | None = None
    bias: float | None = None


@dataclass(frozen=True)
class Learned:
    """A head input: a parameter [H, *axes], or with `trained=False` a constant."""

    init: Callable[[tuple[int, ...]], Tensor]
    trained: bool = True


@dataclass(frozen=True)
class MixerSpec:
    """A recurrence and the layer around it. `sizes` gives dims other than K and V a length."""

    recurrence: Any
    inputs: Mapping[str, Projected | Learned]
    norm: bool = True
    gate: Function | None = F.silu
    gate_before_norm: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)


_PLAIN = Projected()
_QUERY = Projected((scaled,))
_CONV = Projected((F.silu,), conv=True)
_CONV_QUERY = Projected((F.silu, l2norm, scaled), conv=True)
_CONV_KEY = Projected((F.silu, l2norm), conv=True)
_RATE = Projected((torch.sigmoid,))

MIXERS: Mapping[str, MixerSpec] = {
    "linear_attention": MixerSpec(
        scalar_decay.linear_attention, {"q": _QUERY, "k": _PLAIN, "v": _PLAIN}
    ),
    "normalised_linear_attention": MixerSpec(
        scalar_decay.normalised_linear_attention, {"q": _PLAIN, "k": _PLAIN, "v": _PLAIN}
    ),
    "retention": MixerSpec(
        scalar_decay.retention,
        {"q": _QUERY, "k": _PLAIN, "v": _PLAIN, "gamma": Learned(retention_decays, trained=False)},
    ),
    "simple_gla": MixerSpec(
        scalar_decay.simple_gla,
        {"q": _QUERY, "k": _PLAIN, "v": _PLAIN, "g": Projected((gentle_log_decay,))},
    ),
    "mamba2": MixerSpec(
        scalar_decay.mamba2,
        {
            "q": _CONV,
            "k": _CONV,
            "v": _CONV,
            "dt": _PLAIN,
            "A_log": Learned(log_of_uniform),
            "dt_bias": Learned(inverse_softplus_of_small_steps),
            "D": Learned(torch.ones),
        },
        gate_before_norm=True,
    ),
    "gla": MixerSpec(
        diagonal_decay.gla,
        {
            "q": _QUERY,
            "k": _PLAIN,
            "v": _PLAIN,
            "g": Projected((gentle_log_decay,), rank=16, bias=0.0),
        },
    ),
    "hgrn2": MixerSpec(
        diagonal_decay.hgrn2,
        {"q": Projected((F.silu,)), "f": Projected(bias=2.0), "v": _PLAIN},
        gate=None,
    ),
    "delta_rule": MixerSpec(
        delta_rule.delta_rule, {"q": _CONV_QUERY, "k": _CONV_KEY, "v": _CONV, "beta": _RATE}
    ),
    "gated_delta_rule": MixerSpec(
        delta_rule.gated_delta_rule,
        {
            "q": _CONV_QUERY,
            "k": _CONV_KEY,
            "v": _CONV,
            "g": Projected((SoftplusLogDecay,)),
            "beta": _RATE,
        },
    ),
    "kda": MixerSpec(
        delta_rule.kda,
        {
            "q": _CONV_QUERY,
            "k": _CONV_KEY,
            "v": _CONV,
            "g": Projected((SoftplusLogDecay,), rank=16),
            "beta": _RATE,
        },
        gate=torch.sigmoid,
    ),
    "rwkv7": MixerSpec(
        delta_rule.rwkv7,
        {
            "q": _QUERY,
            "k": _PLAIN,
            "v": _PLAIN,
            "g": Projected((bounded_log_decay,), rank=16, bias=-2.0),
            "kappa": _PLAIN,
            "a": Projected((torch.sigmoid,), rank=16, bias=0.0),
        },
        gate=torch.sigmoid,
    ),
    "ttt_linear": MixerSpec(
        test_time_training.ttt_linear,
        {"q": _CONV_QUERY, "k": _CONV_KEY, "v": _CONV, "eta": _RATE},
    ),
    "slstm": MixerSpec(
        nonlinear.slstm,
        {
            "z": _PLAIN,
            "i": Projected((F.silu,), conv=True),
            "f": Projected((F.silu,), conv=True, bias=None),
            "o": _PLAIN,
            **{name: Learned(small_normal) for name in ("Rz", "Ri", "Rf", "Ro")},
        },
        gate=None,
    ),
}


def _example(recurrence: Any) -> str:
    """Rows for every input, to be adapted."""
    made = {"head": "Learned(torch.zeros)", "token": "Projected((torch.sigmoid,))"}
    rows = (
        f'"{v.name}": {"Projected()" if v.axes and v.kind == "token" else made[v.kind]}'
        for v in recurrence.inputs
    )
    return ", ".join(rows)


def mixer_spec(mixer: str | MixerSpec | Any) -> MixerSpec:
    """The row of a name, a spec as it is, or a recurrence with projections for its vectors.

    A name with a colon is of your own: `my_variant.py:name`.
    """
    if isinstance(mixer, str) and is_own(mixer):
        mixer = own(mixer)
    if isinstance(mixer, MixerSpec):
        return mixer
    if isinstance(mixer, str):
        if mixer not in MIXERS:
            raise InvalidModel(
                f"there is no mixer {mixer!r}",
                why=f"mixers are attention, {', '.join(MIXERS)}; or of your own, FILE.py:NAME",
                try_='mixers={"L": "gated_delta_rule", "N": "attention"}',
            )
        return MIXERS[mixer]
    unclear = [v.name for v in mixer.inputs if v.kind == "head" or not v.axes]
    if unclear:
        raise InvalidModel(
            f"nothing says how to make {', '.join(unclear)} of recurrence {mixer.name}",
            why="vector inputs are projections of the tokens; the others must be declared",
            try_="from lmoe_compiler.models.mixer_table import Learned, MixerSpec, Projected\n"
            f"mixer = MixerSpec({mixer.name}, {{{_example(mixer)}}})",
        )
    return MixerSpec(mixer, {v.name: _PLAIN for v in mixer.inputs})
