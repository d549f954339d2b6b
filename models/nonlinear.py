"""Recurrences that are nonlinear in their state. Stop 1 of the walk.

They run token by token, with a checkpointed backward.
"""

import torch
import torch.nn.functional as F

from lmoe_compiler import Head, State, Token, recurrence
from lmoe_compiler.dims import V


@recurrence
def slstm(
    c: State[V], n: State[V], m: State[V], h: State[V],
    z: Token[V], i: Token[V], f: Token[V], o: Token[V],
    Rz: Head[V, V], Ri: Head[V, V], Rf: Head[V, V], Ro: Head[V, V],
):  # fmt: skip
    """sLSTM of xLSTM (Beck et al. 2024, arXiv 2405.04517, eq. 8-18), kept in range by m.

    z, i, f, o += R h;  f <- log sigmoid(f) + m;  m <- max(f, i);
    c <- exp(f - m) c + exp(i - m) tanh(z);  n <- exp(f - m) n + exp(i - m);  h <- sigmoid(o) c / n.
    z, i, f, o [B, T, H, V]; R [H, V, V]
    """
    i, f = i + Ri @ h, F.logsigmoid(f + Rf @ h) + m
    m = torch.maximum(f, i)
    i, f = torch.exp(i - m), torch.exp(f - m)
    c = f * c + i * torch.tanh(z + Rz @ h)
    n = f * n + i
    h = torch.sigmoid(o + Ro @ h) * c / n
    return c, n, m, h, h
