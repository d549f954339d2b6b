"""Recurrences whose state decays by nothing or by one number per token and head.

Each is the paper's step for one token of one head, with states `S [K, V]`: stop 1 of the walk.
The scale of `q` (usually K ** -0.5) belongs to the layer around a recurrence.
"""

import torch
import torch.nn.functional as F

from lmoe_compiler import Head, State, Token, recurrence
from lmoe_compiler.dims import K, V


@recurrence
def linear_attention(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    """Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 18-20), identity features.

    S <- S + k v';  o = S' q.   q, k [B, T, H, K], v [B, T, H, V] -> o [B, T, H, V]
    """
    S = S + torch.outer(k, v)
    return S, S.T @ q


@recurrence
def normalised_linear_attention(S: State[K, V], z: State[K], q: Token[K], k: Token[K], v: Token[V]):
    """Linear attention with phi(x) = elu(x) + 1 and normaliser z (arXiv 2006.16236, eq. 7, 18-20).

    S <- S + phi(k) v';  z <- z + phi(k);  o = S' phi(q) / (z . phi(q)).   States S [K, V], z [K]
    """
    q, k = F.elu(q) + 1, F.elu(k) + 1
    S = S + torch.outer(k, v)
    z = z + k
    return S, z, (S.T @ q) / (z @ q + 1e-10)


@recurrence(bounds={"gamma": (0.9, 1.0)})
def retention(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], gamma: Head):
    """RetNet (Sun et al. 2023, arXiv 2307.08621, eq. 6): each head forgets at its own fixed rate.

    S <- gamma S + k v';  o = S' q.   gamma [H], in the paper 1 - 2 ** (-5 - h)
    """
    S = gamma * S + torch.outer(k, v)
    return S, S.T @ q


@recurrence
def simple_gla(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token):
    """Linear attention with one learned decay per token (Yang et al. 2024, arXiv 2312.06635, 4.2).

    S <- exp(g) S + k v';  o = S' q.   g [B, T, H], log decay <= 0
    """
    S = g.exp() * S + torch.outer(k, v)
    return S, S.T @ q


@recurrence
def mamba2(
    S: State[K, V],
    q: Token[K],
    k: Token[K],
    v: Token[V],
    dt: Token,
    A_log: Head,
    dt_bias: Head,
    D: Head,
):
    """Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, eq. 1 and section 7): q is C, k is B and v is x.

    dt <- softplus(dt + dt_bias);  S <- exp(-exp(A_log) dt) S + dt k v';  o = S' q + D v.
    dt [B, T, H]; A_log, dt_bias, D [H]
    """
    dt = F.softplus(dt + dt_bias)
    S = torch.exp(-A_log.exp() * dt) * S + torch.outer(k, dt * v)
    return S, S.T @ q + D * v
