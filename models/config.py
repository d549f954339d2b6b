"""What a Linear-MoE model is made of: sizes, which mixer each layer has, and its experts.

`ModelConfig` is plain data (numbers and names), so a checkpoint and a TOML file can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lmoe_compiler.errors import InvalidModel

ATTENTION = "attention"


def _default_mixers() -> dict[str, Any]:
    return {"L": "gated_delta_rule", "N": ATTENTION}


def _option(default: Any, what: str) -> Any:
    """A field with one line on what it is, which `lmoe train --help` shows."""
    return field(default=default, metadata={"help": what})


@dataclass(frozen=True)
class ModelConfig:
    """A causal language model: embedding, `num_layers` blocks of token mixer and MLP, a norm, a
    head.

    `layer_pattern` has one letter a layer and is repeated to `num_layers`; `mixers` says what a
    letter means: the name of a row of `models.mixer_table.MIXERS`, a `MixerSpec`, a recurrence, or
    "attention". `num_experts=0` makes every MLP dense, of size `expert_size`.
    """

    vocab_size: int = _option(256, "different tokens")
    hidden_size: int = _option(128, "width of the residual stream")
    num_layers: int = _option(4, "blocks")
    layer_pattern: str = _option("LLLN", "a letter a layer, repeated: L recurrence, N softmax")
    mixers: Mapping[str, Any] = field(default_factory=_default_mixers)

    num_heads: int = _option(4, "query heads of softmax layers")
    num_kv_heads: int = _option(2, "their key-value heads")
    head_dim: int = _option(32, "their size")
    rope_theta: float = _option(10_000.0, "slowest rotation of positions")

    linear_heads: int = _option(4, "heads of recurrent layers")
    key_dim: int = _option(32, "K: rows of a head's state")
    value_dim: int = _option(32, "V: columns of a head's state")
    conv_size: int = _option(4, "tokens that a short convolution sees")

    num_experts: int = _option(8, "experts of a layer; 0: dense MLPs")
    top_k: int = _option(2, "experts a token goes to")
    expert_size: int = _option(128, "width of an expert, or of a dense MLP")
    shared_expert_size: int = _option(128, "width of the expert that all tokens visit; 0: none")
    renormalise: bool = _option(True, "weights of the chosen experts add to 1")
    aux_loss_weight: float = _option(0.01, "of the loss that balances experts")
    z_loss_weight: float = _option(0.001, "of the loss that keeps router logits small")

    tie_embeddings: bool = _option(False, "embedding and head share their weights")
    norm_eps: float = _option(1e-6, "added to mean squares")
    init_std: float = _option(0.02, "of initial weights")

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_pattern(self)
        _check_attention(self)
        _check_experts(self)

    @property
    def letters(self) -> str:
        """One letter for each of the `num_layers` layers."""
        return self.layer_pattern * (self.num_layers // len(self.layer_pattern))


def _check_sizes(config: ModelConfig) -> None:
    positive = (
        "vocab_size hidden_size num_layers num_heads num_kv_heads head_dim linear_heads key_dim "
        "value_dim conv_size expert_size"
    ).split()
    for name in positive:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise InvalidModel(f"{name}={value!r} is not a positive integer")


def _check_pattern(config: ModelConfig) -> None:
    pattern, known = config.layer_pattern, ", ".join(config.mixers)
    for position, letter in enumerate(pattern):
        if letter not in config.mixers:
            raise InvalidModel(
                f"layer_pattern={pattern!r}: letter {letter!r} at position {position} is unknown",
                why=f"mixers has {known}",
                try_='layer_pattern="LLLN"',
            )
    if not pattern or config.num_layers % len(pattern):
        raise InvalidModel(
            f"layer_pattern={pattern!r} cannot be repeated to num_layers={config.num_layers}",
            why="the number of layers must be a multiple of the pattern's length",
            try_=f"num_layers={max(1, len(pattern))}",
        )


def _check_attention(config: ModelConfig) -> None:
    if config.num_heads % config.num_kv_heads:
        raise InvalidModel(
            f"num_kv_heads={config.num_kv_heads} does not divide num_heads={config.num_heads}",
            why="each key-value head serves the same number of query heads",
            try_=f"num_kv_heads={config.num_heads}",
        )
    if config.head_dim % 2:
        raise InvalidModel(
            f"head_dim={config.head_dim} is odd",
            why="rotary embeddings turn pairs of channels",
            try_=f"head_dim={config.head_dim + 1}",
        )


def _check_experts(config: ModelConfig) -> None:
    if config.num_experts < 0:
        raise InvalidModel(
            f"num_experts={config.num_experts} is negative", try_="num_experts=0  # dense"
        )
    if config.num_experts and not 1 <= config.top_k <= config.num_experts:
        raise InvalidModel(
            f"top_k={config.top_k} of num_experts={config.num_experts}",
            why="a token goes to at least one and at most all of the experts",
            try_=f"top_k={min(2, config.num_experts)}",
        )
