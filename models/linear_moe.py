"""Linear-MoE: a causal language model whose layers mix tokens by recurrence (L) or softmax (N).

Pre-norm blocks, x + mixer(norm(x)), then x + experts(norm(x)); the layer pattern says which mixer.
Notation: B batch, T tokens, D hidden size, E experts, N sequences in decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmoe_compiler.models.attention import Attention, AttentionCache
from lmoe_compiler.models.config import ATTENTION, ModelConfig
from lmoe_compiler.models.mixer_table import mixer_spec
from lmoe_compiler.models.mixers import RecurrentCache, RecurrentMixer
from lmoe_compiler.models.moe import Routing, SparseMoE, SwiGLU


class CausalLMOutput(NamedTuple):
    """What one forward gives. Losses are None without labels; loads are those of the sparse
    layers.
    """

    logits: Tensor  # [B, T, vocabulary]
    loss: Tensor | None  # cross entropy + weighted router losses
    cross_entropy: Tensor | None  # nats per token
    aux_loss: Tensor  # mean over sparse layers
    z_loss: Tensor
    expert_load: Tensor  # [sparse layers, E] tokens per expert
    expert_dropped: Tensor  # [sparse layers, E] of these, left out for lack of capacity


@dataclass
class Cache:
    """The memory of N sequences: one entry a layer, and how many tokens each sequence has had."""

    layers: list[AttentionCache | RecurrentCache]
    lengths: Tensor  # [N]


class Block(nn.Module):
    """x [B, T, D] -> [B, T, D] and the routing of its experts (None if dense)."""

    def __init__(self, config: ModelConfig, letter: str) -> None:
        super().__init__()
        mixer = config.mixers[letter]
        self.mixer_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: Attention | RecurrentMixer = (
            Attention(config)
            if isinstance(mixer, str) and mixer == ATTENTION
            else RecurrentMixer(config, mixer_spec(mixer))
        )
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp: SparseMoE | SwiGLU = (
            SparseMoE(config)
            if config.num_experts
            else SwiGLU(config.hidden_size, config.expert_size)
        )

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        return self._mlp(x + self.mixer(self.mixer_norm(x), cu_seqlens))

    def prefill(
        self, x: Tensor, cu_seqlens: Tensor, capacity: int
    ) -> tuple[Tensor, AttentionCache | RecurrentCache]:
        y, cache = self.mixer.prefill(self.mixer_norm(x), cu_seqlens, capacity)
        return self._mlp(x + y)[0], cache

    def step(
        self, x: Tensor, cache: AttentionCache | RecurrentCache, lengths: Tensor
    ) -> tuple[Tensor, AttentionCache | RecurrentCache]:
        y, cache = self.mixer.step(self.mixer_norm(x), cache, lengths)  # type: ignore[arg-type]
        return self._mlp(x + y)[0], cache

    def _mlp(self, x: Tensor) -> tuple[Tensor, Routing | None]:
        normed = self.mlp_norm(x)
        if isinstance(self.mlp, SparseMoE):
            y, routing = self.mlp(normed)
            return x + y, routing
        return x + self.mlp(normed), None


class Outputs(nn.Module):
    """Logits, labels and the layers' routings -> losses and loads. A module, though it has no parameters, so that all
    of a model's work is done by its child modules (lmoe_compiler/blocks.py).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, logits: Tensor, labels: Tensor | None, routings: list[Routing | None]
    ) -> CausalLMOutput:
        """logits [B, T, vocabulary], labels [B, T] or None; one routing a layer, None where it is dense."""
        aux_loss, z_loss, *loads = _over_layers([r for r in routings if r is not None], logits)
        if labels is None:
            return CausalLMOutput(logits, None, None, aux_loss, z_loss, *loads)
        wide = torch.promote_types(logits.dtype, torch.float32)
        cross_entropy = F.cross_entropy(logits.flatten(0, -2).to(wide), labels.flatten())
        config = self.config
        loss = cross_entropy + config.aux_loss_weight * aux_loss + config.z_loss_weight * z_loss
        return CausalLMOutput(logits, loss, cross_entropy, aux_loss, z_loss, *loads)


class LinearMoEForCausalLM(nn.Module):
    """The language model of a `ModelConfig`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.letters)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.outputs = Outputs(config)
        self._initialise()
        if config.tie_embeddings:
            self.lm_head.weight = self.embed.weight

    def _initialise(self) -> None:
        """Normal weights; what is added to the residual stream is scaled down by its depth
        (GPT-2).
        """
        std = self.config.init_std
        residual = std / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 2)[-2:]
            if "o_proj" in last or "down_proj" in last or last[-1] == "down":
                nn.init.normal_(parameter, std=residual)
            elif last[-1] == "gate_up" or isinstance(
                self.get_submodule(name.rsplit(".", 1)[0]), nn.Linear | nn.Embedding
            ):
                nn.init.normal_(parameter, std=std)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> CausalLMOutput:
        """input_ids [B, T]; labels [B, T] are the next tokens (already shifted, -100 is ignored).

        `cu_seqlens` [documents + 1] (B = 1) keeps packed documents apart in every layer.
        """
        x = self.embed(input_ids)
        routings = []
        for layer in self.layers:
            x, routing = layer(x, cu_seqlens)
            routings.append(routing)
        return self.outputs(self.lm_head(self.norm(x)), labels, routings)

    def prefill(self, input_ids: Tensor, cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Cache]:
        """Read N packed prompts [1, T] at once -> next-token logits [N, vocabulary] and their
        memory.

        Packing is what makes unequal lengths exact: there are no padding tokens to hide.
        `capacity` bounds prompt plus generated tokens of a sequence (softmax layers only).
        """
        x = self.embed(input_ids)
        caches = []
        for layer in self.layers:
            x, cache = layer.prefill(x, cu_seqlens, capacity)  # type: ignore[operator]
            caches.append(cache)
        last = x[0, cu_seqlens[1:].long() - 1]
        lengths = cu_seqlens.diff().long()
        return self.lm_head(self.norm(last)), Cache(caches, lengths)

    def step(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One more token [N] of each sequence -> logits [N, vocabulary] and the memory after it."""
        x = self.embed(tokens)
        caches = []
        for layer, entry in zip(self.layers, cache.layers, strict=True):
            x, entry = layer.step(x, entry, cache.lengths)  # type: ignore[operator]
            caches.append(entry)
        return self.lm_head(self.norm(x)), Cache(caches, cache.lengths + 1)


def _over_layers(routings: list[Routing], x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not routings:
        zero, none = (x.new_zeros(size, dtype=torch.float32) for size in ((), (0, 0)))
        return zero, zero, none, none
    return (
        torch.stack([r.aux_loss for r in routings]).mean(),
        torch.stack([r.z_loss for r in routings]).mean(),
        torch.stack([r.load for r in routings]),
        torch.stack([r.dropped for r in routings]),
    )
