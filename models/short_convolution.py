"""A causal depthwise convolution over the last few tokens, as one marked op, and packed positions.

`lmoe::short_conv` is composite, like `lmoe::experts`: one node for passes (a sequence shard needs
the last W - 1 tokens of the rank before it as `history`), plain arithmetic for everybody else.
Notation: B batch, T tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARY = torch.library.Library("lmoe", "FRAGMENT")
_LIBRARY.define(
    "short_conv(Tensor x, Tensor weight, Tensor? cu_seqlens=None, Tensor? history=None) -> Tensor"
)


def document_starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """For each of the T tokens, where its document starts: [T] int64."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].long().contiguous(), tokens, right=True)
    return cu_seqlens.long()[document]


def short_conv(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor | None = None, history: Tensor | None = None
) -> Tensor:
    """`causal_taps` as the marked op `lmoe::short_conv`: what models call."""
    y: Tensor = torch.ops.lmoe.short_conv(x, weight, cu_seqlens, history)
    return y


def causal_taps(
    x: Tensor, weight: Tensor, cu_seqlens: Tensor | None = None, history: Tensor | None = None
) -> Tensor:
    """y[t] = sum_j weight[:, W-1-j] x[t-j], j < W; x [B, T, C], weight [C, W], history [B, W-1, C].

    Tokens before the first are `history`'s, or zero; with `cu_seqlens` no tap crosses a boundary.
    """
    length, taps = x.shape[1], weight.shape[1]
    if history is None:
        padded = F.pad(x, (0, 0, taps - 1, 0))
    else:
        padded = torch.cat([history.to(x.dtype), x], dim=1)
    weight = weight.to(x.dtype)
    y = x * weight[:, -1]
    if cu_seqlens is not None:
        starts = document_starts(cu_seqlens, length)
        position = torch.arange(length, device=x.device) - starts
    for back in range(1, taps):
        tap = padded.narrow(1, taps - 1 - back, length) * weight[:, -1 - back]
        y = y + (tap if cu_seqlens is None else tap * (position >= back).to(x.dtype)[:, None])
    return y


_LIBRARY.impl("short_conv", causal_taps, "CompositeImplicitAutograd")


def token_shift(
    x: Tensor, cu_seqlens: Tensor | None = None, history: Tensor | None = None
) -> Tensor:
    """The token before each token: x [B, T, C] -> y[t] = x[t-1], zero where a document begins.

    RWKV mixes both, `x + mu * (token_shift(x) - x)` (Peng et al. 2023, arXiv 2305.13048, eq. 11). It is a short
    convolution whose one tap looks back, so passes know it by that mark. `history` [B, 1, C] as in `causal_taps`.
    """
    looks_back = torch.arange(1, -1, -1, device=x.device).to(x.dtype)
    return short_conv(x, looks_back.expand(x.shape[-1], 2), cu_seqlens, history)


def last_tokens(x: Tensor, taps: int, cu_seqlens: Tensor) -> Tensor:
    """`history` after each packed document of x [1, T, C]: [N, W-1, C], zero-padded."""
    ends, starts = cu_seqlens[1:].long(), cu_seqlens[:-1].long()
    index = ends[:, None] + torch.arange(1 - taps, 0, device=x.device)
    known = (index >= starts[:, None]).to(x.dtype)
    return x[0, index.clamp_min(0)] * known[..., None]
