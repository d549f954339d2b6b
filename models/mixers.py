"""The one layer around every recurrence. It never asks which recurrence it holds: a row says it all.

Notation: B batch, T tokens, D hidden size, H heads, C convolved channels, W taps, N sequences in
decode.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_compiler.cuts import Part, share
from lmoe_compiler.errors import InvalidModel
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.mixer_table import Learned, MixerSpec, Projected
from lmoe_compiler.models.short_convolution import last_tokens, short_conv


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
        shapes = _input_shapes(config, spec)
        tokens = {n: s for n, s in spec.inputs.items() if isinstance(s, Projected)}
        # Convolved inputs first, so that they are one slice of one matmul.
        self.order = sorted(tokens, key=lambda name: not tokens[name].conv)
        size = config.linear_heads * config.value_dim
        # Stretches of the projection's rows: (length, whether heads own it; a low rank is for all heads).
        rows = {n: (s.rank or math.prod(shapes[n]), not s.rank) for n, s in tokens.items()}
        self.convolved = [rows[n] for n in self.order if tokens[n].conv]
        self.rest = [rows[n] for n in self.order if not tokens[n].conv]
        self.rest += [(size, True)] if spec.gate else []
        channels = sum(_widths(self.convolved))
        self.in_proj = nn.Linear(config.hidden_size, channels + sum(_widths(self.rest)), bias=False)
        self.conv_weight = None
        if channels:
            bound = config.conv_size**-0.5
            weight = torch.empty(channels, config.conv_size).uniform_(-bound, bound)
            self.conv_weight = nn.Parameter(weight)
        self.inputs = nn.ModuleDict(
            {name: _TokenInput(tokens[name], shapes[name]) for name in self.order}
        )
        self.learned = nn.ParameterDict(
            {
                name: nn.Parameter(s.init(shapes[name]).float(), requires_grad=s.trained)
                for name, s in spec.inputs.items()
                if isinstance(s, Learned)
            }
        )
        self.norm_weight = nn.Parameter(torch.ones(config.value_dim)) if spec.norm else None
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def tensor_parts(self, ranks: int) -> dict[str, Part]:
        """What heads own, for parallelize(tensor_parallel=...); from here on this is one rank's layer.

        Parameters of inputs and learned inputs are heads' where their first dimension is a multiple of the heads.
        """
        heads, self.num_heads = self.num_heads, share(self.num_heads, ranks, "heads")
        parts = {
            "in_proj.weight": Part(0, (*self.convolved, *self.rest)),
            "o_proj.weight": Part.even(self.o_proj.weight, 1, summed=True),
        }
        if self.conv_weight is not None:
            parts["conv_weight"] = Part(0, tuple(self.convolved))
        for owner in ("inputs", "learned"):
            for name, parameter in self.get_submodule(owner).named_parameters():
                if parameter.dim() and parameter.shape[0] % heads == 0:
                    parts[f"{owner}.{name}"] = Part.even(parameter, 0)
        self.convolved, self.rest = (
            [(length // ranks if own else length, own) for length, own in stretches]
            for stretches in (self.convolved, self.rest)
        )
        return parts

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
        widths = [sum(_widths(self.convolved)), sum(_widths(self.rest))]
        convolved, rest = projected.split(widths, dim=-1)
        return convolved, rest

    def _arguments(
        self, convolved: Tensor, rest: Tensor, cu_seqlens: Tensor | None, history: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Every input of the recurrence, [B, T, H, *axes] or [H, *axes], and the output's gate."""
        if self.conv_weight is not None:
            convolved = short_conv(convolved, self.conv_weight, cu_seqlens, history)
        parts = (
            *convolved.split(_widths(self.convolved), -1),
            *rest.split(_widths(self.rest), -1),
        )
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


def _widths(stretches: list[tuple[int, bool]]) -> list[int]:
    return [length for length, _ in stretches]


class _TokenInput(nn.Module):
    """From its slice of the projection to one input of the recurrence."""

    def __init__(self, projected: Projected, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.axes, size = shape[1:], math.prod(shape)
        self.up = nn.Linear(projected.rank, size, bias=False) if projected.rank else None
        self.bias = (
            None if projected.bias is None else nn.Parameter(torch.full((size,), projected.bias))
        )
        self.stateful = nn.ModuleList(f(shape) for f in projected.functions if isinstance(f, type))
        self.functions = projected.functions

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.up is None else self.up(x)
        x = x if self.bias is None else x + self.bias.to(x.dtype)
        x = x.unflatten(-1, (-1, *self.axes))
        stateful = iter(self.stateful)
        for function in self.functions:
            x = next(stateful)(x) if isinstance(function, type) else function(x)
        return x


def base(axis: str) -> str:
    """The dim of an axis: a second axis of one dim is written V'."""
    return axis.rstrip("'")


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
    for axis in (base(a) for v in variables.values() for a in v.axes):
        if axis not in sizes:
            raise InvalidModel(
                f"nothing says how long the dim {axis} of recurrence {spec.recurrence.name} is",
                why="K is key_dim and V is value_dim of the model; others are the MixerSpec's",
                try_=f"MixerSpec({spec.recurrence.name}, {{...}}, sizes={{{axis!r}: 16}})",
            )
    static = {dim: sizes[dim] for dim in spec.recurrence.static_dims}
    output = spec.recurrence.program(**static).output.axes
    if output != ("V",):
        raise InvalidModel(
            f"the output of recurrence {spec.recurrence.name} is [{', '.join(output)}], not [V]",
            why="the layer around it norms, gates and projects heads of value_dim",
            try_="return S, S.T @ q   # [K, V] and [K] -> [V]",
        )
    return {
        name: (config.linear_heads, *(sizes[base(axis)] for axis in v.axes))
        for name, v in variables.items()
    }
