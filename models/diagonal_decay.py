"""Recurrences in which every key channel of the state decays at its own rate.

Each is the paper's step for one token of one head, with states `S [K, V]`: stop 1 of the walk.
"""

import torch

from lmoe_compiler import State, Token, recurrence
from lmoe_compiler.dims import K, V


@recurrence
def gla(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token[K]):
    """Gated linear attention (Yang et al. 2024, arXiv 2312.06635, eq. 3).

    S <- diag(exp(g)) S + k v';  o = S' q.   g [B, T, H, K], log decay <= 0
    """
    S = g.exp()[:, None] * S + torch.outer(k, v)
    return S, S.T @ q


@recurrence
def hgrn2(S: State[K, V], q: Token[K], f: Token[K], v: Token[V]):
    """HGRN2 (Qin et al. 2024, arXiv 2404.07904, eq. 3): the key is what the forget gate lets go of.

    f <- sigmoid(f);  S <- diag(f) S + (1 - f) v';  o = S' q.   f [B, T, H, K], before its sigmoid
    """
    f = torch.sigmoid(f)
    S = f[:, None] * S + torch.outer(1 - f, v)
    return S, S.T @ q
