"""Step functions for every row of the transition table, with the kind that must be proved of each."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import lmoe_compiler as lmoe
from lmoe_compiler import Head, Recurrence, State, Token, recurrence
from lmoe_compiler.dims import K, V


class M(lmoe.Dim):
    """memory slots"""


class N(lmoe.Dim, static=True):
    """micro-steps of one token"""


@dataclass(frozen=True)
class Row:
    recurrence: Recurrence
    kind: str
    states: dict[str, str] = field(default_factory=dict)


ROWS: dict[str, Row] = {}


def row(kind, **states):
    def add(step):
        ROWS[step.__name__] = Row(recurrence(step), kind, states)
        return step

    return add


@row("identity")
def linear_attention(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, S.T @ q


@row("elementwise", S="scalar", h="elementwise")
def smoothed_values(
    S: State[K, V], h: State[V], q: Token[K], k: Token[K], v: Token[V], f: Token[V]
):
    """A state whose writes are another state as a whole."""
    f = torch.sigmoid(f)
    h = f * h + (1 - f) * v
    S = 0.99 * S + torch.outer(k, h)
    return S, h, S.T @ q + h


@row("scalar")
def retention(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], gamma: Head):
    S = gamma * S + torch.outer(k, v)
    return S, S.T @ q


@row("scalar")
def mamba2(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], dt: Token, A_log: Head):
    S = torch.exp(-A_log.exp() * F.softplus(dt)) * S + dt * torch.outer(k, v)
    return S, q @ S


@row("diagonal")
def hgrn2(S: State[K, V], q: Token[K], f: Token[K], v: Token[V]):
    f = torch.sigmoid(f)
    S = f[:, None] * S + torch.outer(1 - f, v)
    return S, S.T @ q


@row("diagonal")
def rwkv6(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], w: Token[K], u: Head[K]):
    kv = torch.outer(k, v)
    o = q @ (S + u[:, None] * kv)
    S = torch.exp(-torch.exp(w))[:, None] * S + kv
    return S, o


@row("diagonal", Hk="diagonal", Hv="diagonal")
def gated_slot_attention(
    Hk: State[K, M],
    Hv: State[M, V],
    q: Token[K],
    k: Token[K],
    v: Token[V],
    s: Token[M],
    g: Token[M],
):
    a = g.exp()
    Hk = Hk * a[None, :] + torch.outer(k, s)
    p = torch.softmax(Hk.T @ q, -1)
    Hv = a[:, None] * Hv + torch.outer(s, v)
    return Hk, Hv, Hv.T @ p


@row("identity", S="identity", z="identity")
def normalised(S: State[K, V], z: State[K], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    z = z + k
    return S, z, (S.T @ q) / ((z * q).sum() + 1e-6)


@row("rank_one")
def gated_delta(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, b: Token):
    S = g.exp() * (S - b * torch.outer(k, k @ S)) + b * torch.outer(k, v)
    return S, S.T @ q


@row("rank_one")
def comba(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, b: Token, p: Token[K]):
    S = g.exp() * S
    S = S + torch.outer(k, b * (v - S.T @ p))
    return S, S.T @ q


@row("rank_one")
def kimi_delta_attention(
    S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token[K], b: Token
):
    S = g.exp()[:, None] * S
    S = S + b * torch.outer(k, v - S.T @ k)
    return S, S.T @ q


@row("rank_one")
def gated_delta_2(
    S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token[K], b: Token[K], w: Token[V]
):
    S = g.exp()[:, None] * S
    S = S - torch.outer(k, (b * k) @ S) + torch.outer(k, w * v)
    return S, S.T @ q


@row("rank_one")
def rwkv7(
    S: State[K, V], q: Token[K], k: Token[K], v: Token[V], w: Token[K], a: Token[K], b: Token[K]
):
    S = torch.exp(w)[:, None] * S + torch.outer(b, a @ S) + torch.outer(k, v)
    return S, S.T @ q


@row("rank_one")
def oja(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token[V], b: Token):
    S = S * g.exp()[None, :]
    S = S + torch.outer(b * (k - S @ v), v)
    return S, S.T @ q


@row("rank_one")
def normalised_keys(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], b: Token):
    k = F.normalize(k, dim=0)
    S = S + torch.outer(k, b * (v - S.T @ k))
    return S, S.T @ (q * q.shape[0] ** -0.5)


@row("rank_one")
def masked_state(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], b: Token, m: Token):
    S = torch.where(m > 0, S, torch.zeros_like(S))
    S = S + torch.outer(k, b * (v - S.T @ k))
    return S, S.T @ q


@row("product")
def delta_product(
    S: State[K, V], q: Token[K], k: Token[N, K], v: Token[N, V], b: Token[N], g: Token
):
    S = g.exp() * S
    for i in range(k.shape[0]):
        S = S + torch.outer(k[i], b[i] * (v[i] - S.T @ k[i]))
    return S, S.T @ q


@row("product")
def delta_product_multiplied_out(
    S: State[K, V], q: Token[K], k: Token[N, K], v: Token[N, V], b: Token[N], g: Token
):
    unit = torch.eye(k.shape[1])
    A, W = g.exp() * unit, torch.zeros(k.shape[1], v.shape[1])
    for i in range(k.shape[0]):
        H = unit - b[i] * torch.outer(k[i], k[i])
        A, W = H @ A, H @ W + b[i] * torch.outer(k[i], v[i])
    S = A @ S + W
    return S, S.T @ q


@row("coupled", S="coupled", M="coupled")
def momentum(
    S: State[K, V], M: State[K, V], q: Token[K], k: Token[K], v: Token[V],
    mu: Token, eta: Token, al: Token, be: Token,
):  # fmt: skip
    M = mu * M + eta * torch.outer(k, S.T @ k - v)
    S = al * S - be * M
    return S, M, S.T @ q


@row("coupled", S="coupled", M="coupled")
def titans_with_quadratic_loss(
    S: State[K, V], M: State[K, V], q: Token[K], k: Token[K], v: Token[V],
    eta: Token, th: Token, al: Token,
):  # fmt: skip
    M = eta * M - th * torch.func.grad(lambda W: ((k @ W - v) ** 2).sum())(S)
    S = (1 - al) * S + M
    return S, M, q @ S


@row("elementwise")
def mamba1(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], dt: Token[V], A: Head[K, V]):
    S = torch.exp(dt[None, :] * A) * S + torch.outer(k, dt * v)
    return S, S.T @ q


@row("elementwise")
def sum_of_decays(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    """k[K] + v[V] is a sum, not a product: elementwise, not two diagonals."""
    S = (k[:, None] + v[None, :]) * S + torch.outer(k, v)
    return S, S.T @ q


@row("elementwise")
def hgrn(h: State[K], x: Token[K], f: Token[K]):
    f = torch.sigmoid(f)
    h = f * h + (1 - f) * x
    return h, h


@row("nonlinear")
def ttt_layer_norm(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], eta: Token):
    def loss(W):
        y = F.layer_norm(k @ W, (v.shape[0],))
        return 0.5 * ((y - v) ** 2).sum()

    S = S - eta * torch.func.grad(loss)(S)
    return S, S.T @ q


@row("nonlinear")
def recurrent_gate(h: State[K], c: State[K], x: Token[K], z: Token[K], R: Head[K, K]):
    i = torch.sigmoid(x + R @ h)
    c = torch.sigmoid(z) * c + i * torch.tanh(x)
    h = torch.tanh(c)
    return h, c, h


@row("nonlinear")
def gate_of_the_state(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = torch.sigmoid(S.T @ q)[None, :] * S + torch.outer(k, v)
    return S, S.T @ q


@row("nonlinear")
def beta_per_value_channel(
    S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token, b: Token[V]
):
    S = g.exp() * S
    S = S + torch.outer(k, b * (v - S.T @ k))
    return S, S.T @ q


@row("nonlinear")
def dense_transition(S: State[K, V], q: Token[K], A: Token[K, K], k: Token[K], v: Token[V]):
    S = A @ S + torch.outer(k, v)
    return S, S.T @ q


@row("nonlinear", S="identity", m="nonlinear")
def running_maximum(S: State[K, V], m: State, q: Token[K], k: Token[K], v: Token[V], g: Token):
    m = torch.maximum(m, g)
    S = S + torch.exp(g) * torch.outer(k, v)
    return S, m, torch.exp(-m) * (S.T @ q)
