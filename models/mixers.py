"""The one layer around every recurrence, and the table that says how its inputs are made.

A `MixerSpec` is data: for each input of the recurrence, a `Projected` (a linear map of the
tokens, then functions) or a `Learned` (a parameter per head); then how the output is normed and
gated. The layer never asks which recurrence it holds. A new recurrence needs a row here, or none:
without a row, vector inputs are plain projections.
Notation: B batch, T tokens, D hidden size, H heads, C convolved channels, W taps, N sequences in
decode.
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
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.short_convolution import last_tokens, short_conv

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


def mixer_spec(mixer: str | MixerSpec | Any) -> MixerSpec:
    """The row of a name, a spec as it is, or a recurrence with projections for its vectors."""
    if isinstance(mixer, MixerSpec):
        return mixer
    if isinstance(mixer, str):
        if mixer not in MIXERS:
            raise InvalidModel(
                f"there is no mixer {mixer!r}",
                why=f"mixers are attention, {', '.join(MIXERS)}",
                try_='mixers={"L": "gated_delta_rule", "N": "attention"}',
            )
        return MIXERS[mixer]
    unclear = [v.name for v in mixer.inputs if v.kind == "head" or not v.axes]
    if unclear:
        raise InvalidModel(
            f"nothing says how to make {', '.join(unclear)} of recurrence {mixer.name}",
            why="vector inputs are projections of the tokens; the others must be declared",
            try_=f'MixerSpec(recurrence, {{"{unclear[0]}": Projected((torch.sigmoid,)), ...}})',
        )
    return MixerSpec(mixer, {v.name: _PLAIN for v in mixer.inputs})


# -- the layer -----------------------------------------------------------------------------------


@dataclass
class RecurrentCache:
    """What decoding keeps of any number of tokens: states [N, H, ...] and the convolution's
    inputs.
    """

    states: tuple[Tensor, ...]
    history: Tensor


class RecurrentMixer(nn.Module):
    """x [B, T, D] -> [B, T, D] through one recurrence with H heads."""

    def __init__(self, config: ModelConfig, spec: MixerSpec) -> None:
        super().__init__()
        self.spec, self.num_heads = spec, config.linear_heads
        self.conv_size, self.norm_eps = config.conv_size, config.norm_eps
        self.shapes = _input_shapes(config, spec)
        tokens = {n: s for n, s in spec.inputs.items() if isinstance(s, Projected)}
        # Convolved inputs first, so that they are one slice of one matmul.
        self.order = sorted(tokens, key=lambda name: not tokens[name].conv)
        width = {n: tokens[n].rank or math.prod(self.shapes[n]) for n in self.order}
        size = config.linear_heads * config.value_dim
        self.conv_widths = [width[n] for n in self.order if tokens[n].conv]
        self.rest_widths = [width[n] for n in self.order if not tokens[n].conv]
        self.rest_widths += [size] if spec.gate else []
        self.channels = sum(self.conv_widths)
        self.in_proj = nn.Linear(
            config.hidden_size, self.channels + sum(self.rest_widths), bias=False
        )
        self.conv_weight = None
        if self.channels:
            bound = config.conv_size**-0.5
            weight = torch.empty(self.channels, config.conv_size).uniform_(-bound, bound)
            self.conv_weight = nn.Parameter(weight)
        self.inputs = nn.ModuleDict(
            {name: _TokenInput(tokens[name], self.shapes[name]) for name in self.order}
        )
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(s.init(self.shapes[name]).float(), requires_grad=s.trained)
                for name, s in spec.inputs.items()
                if isinstance(s, Learned)
            }
        )
        self.norm_weight = nn.Parameter(torch.ones(config.value_dim)) if spec.norm else None
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; with `cu_seqlens` (B = 1) the state restarts at every
        boundary.
        """
        convolved, rest = self._project(x)
        arguments, gate = self._arguments(convolved, rest, cu_seqlens, None)
        return self._output(self.spec.recurrence(**arguments, cu_seqlens=cu_seqlens), gate)

    def prefill(
        self, x: Tensor, cu_seqlens: Tensor, capacity: int
    ) -> tuple[Tensor, RecurrentCache]:
        """Packed prompts x [1, T, D] -> [1, T, D] and their states; `capacity` costs nothing
        here.
        """
        convolved, rest = self._project(x)
        arguments, gate = self._arguments(convolved, rest, cu_seqlens, None)
        o, states = self.spec.recurrence(**arguments, cu_seqlens=cu_seqlens, return_state=True)
        states = states if isinstance(states, tuple) else (states,)
        return self._output(o, gate), RecurrentCache(
            states, last_tokens(convolved, self.conv_size, cu_seqlens)
        )

    def step(
        self, x: Tensor, cache: RecurrentCache, lengths: Tensor
    ) -> tuple[Tensor, RecurrentCache]:
        """One token x [N, D] of each sequence -> [N, D]."""
        convolved, rest = self._project(x[:, None])
        arguments, gate = self._arguments(convolved, rest, None, cache.history)
        now = {n: a if n in self.learned else a[:, 0] for n, a in arguments.items()}
        state = cache.states if len(cache.states) > 1 else cache.states[0]
        o, states = self.spec.recurrence.step(**now, state=state)
        states = states if isinstance(states, tuple) else (states,)
        history = torch.cat([cache.history, convolved.to(cache.history.dtype)], dim=1)[:, 1:]
        return self._output(o[:, None], gate)[:, 0], RecurrentCache(states, history)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.in_proj(x)
        convolved, rest = projected.split([self.channels, sum(self.rest_widths)], dim=-1)
        return convolved, rest

    def _arguments(
        self, convolved: Tensor, rest: Tensor, cu_seqlens: Tensor | None, history: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every input of the recurrence, [B, T, H, *axes] or [H, *axes], and the output's gate."""
        if self.conv_weight is not None:
            convolved = short_conv(convolved, self.conv_weight, cu_seqlens, history)
        parts = (*convolved.split(self.conv_widths, -1), *rest.split(self.rest_widths, -1))
        arguments = {n: self.inputs[n](part) for n, part in zip(self.order, parts, strict=False)}
        arguments.update(self.learned.items())
        return arguments, parts[-1] if self.spec.gate else None

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """Norm of each head's o [B, T, H, V], gate, and back to D."""
        if gate is not None and self.spec.gate is not None:
            gate = self.spec.gate(gate).unflatten(-1, (self.num_heads, -1))
        if gate is not None and self.spec.gate_before_norm:
            o = o * gate
        if self.norm_weight is not None:
            o = F.rms_norm(o, (o.shape[-1],), self.norm_weight.to(o.dtype), self.norm_eps)
        if gate is not None and not self.spec.gate_before_norm:
            o = o * gate
        y: Tensor = self.o_proj(o.flatten(-2))
        return y


class _TokenInput(nn.Module):
    """From its slice of the projection to one input of the recurrence."""

    def __init__(self, projected: Projected, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, size = shape, math.prod(shape)
        self.up = nn.Linear(projected.rank, size, bias=False) if projected.rank else None
        self.bias = (
            None if projected.bias is None else nn.Parameter(torch.full((size,), projected.bias))
        )
        functions = [f(shape) if isinstance(f, type) else f for f in projected.functions]
        self.stateful = nn.ModuleList(f for f in functions if isinstance(f, nn.Module))
        self.functions = functions

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.up is None else self.up(x)
        x = x if self.bias is None else x + self.bias.to(x.dtype)
        x = x.unflatten(-1, self.shape)
        for function in self.functions:
            x = function(x)
        return x


def _input_shapes(config: ModelConfig, spec: MixerSpec) -> dict[str, tuple[int, ...]]:
    """(H, *axes) of every input; a mismatch between the table and the recurrence is the user's
    error.
    """
    variables = {v.name: v for v in spec.recurrence.inputs}
    if set(variables) != set(spec.inputs):
        raise InvalidModel(
            f"recurrence {spec.recurrence.name} takes {', '.join(variables)}",
            why=f"its MixerSpec makes {', '.join(spec.inputs)}",
            try_="one Projected or Learned for each input of the recurrence",
        )
    sizes = {"K": config.key_dim, "V": config.value_dim, **spec.sizes}
    return {
        # A second axis of one dim is written V'.
        name: (config.linear_heads, *(sizes[axis.rstrip("'")] for axis in v.axes))
        for name, v in variables.items()
    }
