"""A small recurrence and arguments for tests of what surrounds recurrences: ops, calls, passes, the backend."""

from __future__ import annotations

import torch
from torch import Tensor

import lmoe_compiler as lmoe
from lmoe_compiler.dims import K, V


@lmoe.recurrence(bounds={"g": (-5, 0)})
def gated(
    S: lmoe.State[K, V],
    q: lmoe.Token[K],
    k: lmoe.Token[K],
    v: lmoe.Token[V],
    g: lmoe.Token,
    u: lmoe.Head[K],
):
    """A delta rule with a scalar decay and a bonus: every kind of argument, and a solve."""
    old = g.exp() * S
    S = old + torch.outer(k, v - old.T @ k)
    return S, S.T @ q + (u * k) @ q * v


def arguments(
    B: int = 2, T: int = 5, H: int = 4, *, dtype: torch.dtype = torch.float64, grad: bool = False
) -> list[Tensor]:
    """Inputs of `gated`: two query heads for `H` key heads, K = 3, V = 2."""
    made = [
        torch.randn(B, T, 2, 3) * 0.5,
        torch.nn.functional.normalize(torch.randn(B, T, H, 3), dim=-1),
        torch.randn(B, T, H, 2),
        -torch.rand(B, T, H),
        torch.randn(H, 3) * 0.5,
    ]
    return [x.to(dtype).requires_grad_(grad) for x in made]


def state(B: int = 2, H: int = 4, *, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, H, 3, 2).to(dtype)
