"""Recurrences whose state is a model that each token trains by one gradient step.

The gradient is written with `torch.func.grad`; where the analysis proves it linear in the state,
the recurrence gets the delta rule's kernels. Stop 1 of the walk.
"""

import torch

from lmoe_compiler import State, Token, recurrence
from lmoe_compiler.dims import K, V


@recurrence
def ttt_linear(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], eta: Token):
    """TTT-linear, mini-batch 1, no layer norm (Sun et al. 2024, arXiv 2407.04620, eq. 1, 4-6).

    S <- S - eta dL/dS, L(S) = |S' k - v|^2 / 2;  o = S' q.   eta [B, T, H], the inner learning rate
    """

    def loss(W: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((W.T @ k - v) ** 2).sum()

    S = S - eta * torch.func.grad(loss)(S)
    return S, S.T @ q
