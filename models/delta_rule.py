"""Recurrences that correct the state along a key: what `k` recalls is replaced, not added to.

Each is the paper's step for one token of one head, with states `S [K, V]`: stop 1 of the walk.
"""

import torch
import torch.nn.functional as F

from lmoe_compiler import State, Token, recurrence
from lmoe_compiler.dims import K, V


@recurrence
def delta_rule(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], beta: Token):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484, eq. 3; Schlag et al. 2021, arXiv 2102.11174).

    S <- S + beta k (v - S' k)';  o = S' q.   beta [B, T, H] in [0, 1], k of length 1
    """
    S = S + torch.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@recurrence
def gated_delta_rule(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, beta: Token):
    """Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464, eq. 10): forget, then correct.

    S <- exp(g) S;  S <- S + beta k (v - S' k)';  o = S' q.
    g, beta [B, T, H]; g <= 0 is a log decay
    """
    S = g.exp() * S
    S = S + torch.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@recurrence
def kda(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token[K], beta: Token):
    """Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692, eq. 1): a decay per key channel.

    S <- diag(exp(g)) S;  S <- S + beta k (v - S' k)';  o = S' q.   g [B, T, H, K], beta [B, T, H]
    """
    S = g.exp()[:, None] * S
    S = S + torch.outer(k, beta * (v - S.T @ k))
    return S, S.T @ q


@recurrence(bounds={"g": (-0.607, 0.0)})
def rwkv7(
    S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token[K], kappa: Token[K], a: Token[K]
):
    """RWKV-7 "Goose" (Peng et al. 2025, arXiv 2503.14456, eq. 17): q is the receptance r.

    kappa <- kappa / |kappa|;  S <- diag(exp(g)) S - (a kappa) (S' kappa)' + k v';  o = S' q.
    The correction reads the state before its decay. g, kappa, a [B, T, H, K]; the paper's log decay
    g = -exp(-1/2) sigmoid(..) lies in the declared bounds, a is in [0, 1].
    """
    kappa = F.normalize(kappa, dim=0)
    S = g.exp()[:, None] * S - torch.outer(a * kappa, S.T @ kappa) + torch.outer(k, v)
    return S, S.T @ q
