"""Causal softmax attention with rotary positions and grouped key-value heads (the N layers).

Notation: B batch, T tokens, H query heads, G key-value heads, E head size, N sequences in decode,
S cache slots.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lmoe_compiler.cuts import Part, share
from lmoe_compiler.models.config import ModelConfig
from lmoe_compiler.models.document_attention import document_attention
from lmoe_compiler.models.short_convolution import document_starts

_LIBRARY = torch.library.Library("lmoe", "FRAGMENT")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens=None, Tensor? offset=None)"
    " -> Tensor"
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Softmax over all earlier tokens of the same document: q [B, T, H, E], k and v [B, S, G, E].

    One marked op, composite like `lmoe::short_conv`. On a shard of the sequence the keys are
    everybody's (S > T), and `offset` [1] is the place of the first query among them.
    """
    if cu_seqlens is None and offset is None:
        return attend(q, k, v, None)
    o: Tensor = document_attention(q, k, v, cu_seqlens, offset)[0]
    return o


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, T, H, E], k and v [B, S, G, E] -> [B, T, H, E]; mask broadcastable to [B, H, T, S], or
    None for causal.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # float64 as on a GPU: torch 2.11's Inductor takes the CPU kernel's row sums for float32.
    wide = sdpa_kernel(SDPBackend.MATH) if q.dtype == torch.float64 else nullcontext()
    with wide:
        o = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
    return o.transpose(1, 2)


_LIBRARY.impl("attention", attention, "CompositeImplicitAutograd")


@dataclass
class AttentionCache:
    """Keys (already rotated) and values of N sequences, [N, S, G, E]; a sequence's own length is
    elsewhere.
    """

    keys: Tensor
    values: Tensor


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864), half-split pairs: x [..., T, H, E],
    position [..., T].
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=wide) / half)
    angle = (position[..., None] * frequency)[..., None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Softmax attention over all earlier tokens of the same document."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        kv_size = self.num_kv_heads * self.head_dim
        q_size = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def tensor_parts(self, ranks: int) -> dict[str, Part]:
        """What heads own, for parallelize(tensor_parallel=...); from here on this is one rank's layer.

        With fewer key-value heads than ranks, neighbours whose queries share one each have it.
        """
        copies = ranks // self.num_kv_heads if ranks % self.num_kv_heads == 0 else 1
        self.num_kv_heads = share(self.num_kv_heads, ranks // copies, "key-value heads")
        self.num_heads = share(self.num_heads, ranks, "heads")
        parts = {
            f"{name}.weight": Part.even(
                self.get_parameter(f"{name}.weight"), 0, copies=1 if name == "q_proj" else copies
            )
            for name in ("q_proj", "k_proj", "v_proj")
        }
        return parts | {"o_proj.weight": Part.even(self.o_proj.weight, 1, summed=True)}

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return rotate(q, position, self.theta), rotate(k, position, self.theta), v

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self._sequence(x, cu_seqlens)[0]

    def _sequence(self, x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        position = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            position = position - document_starts(cu_seqlens, x.shape[1])
        q, k, v = self._project(x, position)
        o = torch.ops.lmoe.attention(q, k, v, cu_seqlens)
        return self.o_proj(o.flatten(-2)), k, v

    def prefill(
        self, x: Tensor, cu_seqlens: Tensor, capacity: int
    ) -> tuple[Tensor, AttentionCache]:
        """Packed prompts x [1, T, D] -> [1, T, D] and a cache with room for `capacity` tokens
        each.
        """
        y, k, v = self._sequence(x, cu_seqlens)
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        slot = starts[:, None] + torch.arange(capacity, device=x.device)
        known = (slot < ends[:, None])[..., None, None]
        slot = slot.clamp_max(x.shape[1] - 1)
        return y, AttentionCache(k[0, slot] * known, v[0, slot] * known)

    def step(
        self, x: Tensor, cache: AttentionCache, lengths: Tensor
    ) -> tuple[Tensor, AttentionCache]:
        """One token x [N, D] of each sequence, which has `lengths` [N] tokens so far -> [N, D]."""
        q, k, v = self._project(x[:, None], lengths[:, None])
        row = torch.arange(x.shape[0], device=x.device)
        cache.keys[row, lengths] = k[:, 0].to(cache.keys.dtype)
        cache.values[row, lengths] = v[:, 0].to(cache.values.dtype)
        slots = torch.arange(cache.keys.shape[1], device=x.device)
        seen = (slots <= lengths[:, None])[:, None, None]
        o = attend(q, cache.keys, cache.values, seen)
        return self.o_proj(o.flatten(-2))[:, 0], cache
