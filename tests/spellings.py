"""Families of step functions that are one recurrence spelled differently, and near misses that are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from lmoe_compiler import Recurrence, State, Token, recurrence
from lmoe_compiler.dims import K, V
from lmoe_compiler.ir.nodes import Program

Step = Callable[..., tuple[torch.Tensor, torch.Tensor]]
HINTS = {"S": State[K, V], "q": Token[K], "k": Token[K], "v": Token[V]}


def define(step: Step, **gates: object) -> Recurrence:
    """A recurrence with states and tokens S, q, k, v and these further tokens."""
    step.__annotations__ = HINTS | gates
    return recurrence(step)


def nameless(program: Program) -> Program:
    return replace(program, name="")


def delta_rule() -> list[Recurrence]:
    def plain(S, q, k, v, b):
        S = S + torch.outer(k, b * (v - S.T @ k))
        return S, S.T @ q

    def matrix(S, q, k, v, b):
        S = (torch.eye(k.shape[0]) - b * torch.outer(k, k)) @ S + b * torch.outer(k, v)
        return S, S.T @ q

    def row(S, q, k, v, b):
        S = S - b * k[:, None] * (k @ S - v)[None, :]
        return S, q @ S

    def old_and_new_value(S, q, k, v, b):
        old = (S * k[:, None]).sum(0)
        new = b * v + (1 - b) * old
        S = S - torch.outer(k, old) + torch.outer(k, new)
        return S, torch.einsum("kv,k->v", S, q)

    def gradient(S, q, k, v, b):
        S = S - b * torch.func.grad(lambda W: 0.5 * ((W.T @ k - v) ** 2).sum())(S)
        return S, S.T @ q

    def addr(S, q, k, v, b):
        S = torch.addr(S, k, b * (v - torch.mv(S.t(), k)))
        return S, S.T @ q

    def einsum(S, q, k, v, b):
        S = S - b * torch.einsum("i,j,jv->iv", k, k, S) + torch.einsum("i,v->iv", b * k, v)
        return S, S.T @ q

    def transposed(S, q, k, v, b):
        P = S.T
        P = P - (P @ k)[:, None] * (b * k)[None] + torch.outer(v, b * k)
        return P.T, P @ q

    def mse_gradient(S, q, k, v, b):
        loss = torch.func.grad(lambda W: F.mse_loss(k @ W, v, reduction="sum"))
        return (S := S - 0.5 * b * loss(S)), S.T @ q

    def columns(S, q, k, v, b):
        def column(s, x):
            return s + b * k * (x - (s * k).sum())

        S = torch.func.vmap(column, in_dims=(1, 0), out_dims=1)(S, v)
        return S, torch.func.vmap(torch.dot, in_dims=(1, None))(S, q)

    steps = (
        plain,
        matrix,
        row,
        old_and_new_value,
        gradient,
        addr,
        einsum,
        transposed,
        mse_gradient,
        columns,
    )
    return [define(step, b=Token) for step in steps]


def diagonal_decay() -> list[Recurrence]:
    def broadcast(S, q, k, v, g):
        S = g.exp()[:, None] * S + k[:, None] * v[None, :]
        return S, (q[:, None] * S).sum(0)

    def diagonal_matrix(S, q, k, v, g):
        S = torch.diag(g.exp()) @ S + torch.outer(k, v)
        return S, S.T @ q

    def transposed(S, q, k, v, g):
        S = (S.T * g.exp()).T + torch.einsum("i,j->ij", k, v)
        return S, torch.einsum("i,ij->j", q, S)

    def einsum(S, q, k, v, g):
        S = torch.einsum("k,kv->kv", g.exp(), S) + k.unsqueeze(-1) * v
        return S, q @ S

    def forget(S, q, k, v, g):
        S = S - (1 - g.exp()).unsqueeze(1) * S
        S = S + (v[:, None] * k).T
        return S, torch.matmul(S.mT, q)

    def embedded(S, q, k, v, g):
        S = torch.diag_embed(torch.exp(g)).mm(S).addr(k, v)
        return S, torch.mv(S.t(), q)

    steps = (broadcast, diagonal_matrix, transposed, einsum, forget, embedded)
    return [define(step, g=Token[K]) for step in steps]


def scalar_gate() -> list[Recurrence]:
    gates = (
        torch.sigmoid,
        lambda x: 1 - torch.sigmoid(-x),
        lambda x: torch.exp(-F.softplus(-x)),
        lambda x: 1 / (1 + torch.exp(-x)),
        lambda x: F.logsigmoid(x).exp(),
        lambda x: torch.sigmoid(x).sqrt() * torch.sigmoid(x) ** 0.5,
    )

    def spelled(gate: Callable[[torch.Tensor], torch.Tensor]) -> Recurrence:
        def step(S, q, k, v, x):
            S = gate(x) * S + torch.outer(k, v)
            return S, S.T @ q

        return define(step, x=Token)

    return [spelled(gate) for gate in gates]


def gated_delta_rule(S, q, k, v, g, b):
    S = g.exp() * S
    S = S + torch.outer(k, b * (v - S.T @ k))
    return S, S.T @ q


def near_misses() -> list[Recurrence]:
    """Other recurrences than the gated delta rule, a small change away."""

    def reads_before_the_decay(S, q, k, v, g, b):
        S = g.exp() * S + torch.outer(k, b * (v - S.T @ k))
        return S, S.T @ q

    def reads_out_before_the_update(S, q, k, v, g, b):
        o = S.T @ q
        S = g.exp() * S
        S = S + torch.outer(k, b * (v - S.T @ k))
        return S, o

    def decays_the_write(S, q, k, v, g, b):
        S = g.exp() * (S + torch.outer(k, b * (v - S.T @ k)))
        return S, S.T @ q

    def reads_by_the_query(S, q, k, v, g, b):
        S = g.exp() * S
        S = S + torch.outer(k, b * (v - S.T @ q))
        return S, S.T @ q

    steps = (
        reads_before_the_decay,
        reads_out_before_the_update,
        decays_the_write,
        reads_by_the_query,
    )
    return [define(step, g=Token, b=Token) for step in steps]


FAMILIES = {
    "delta_rule": delta_rule,
    "diagonal_decay": diagonal_decay,
    "scalar_gate": scalar_gate,
}
