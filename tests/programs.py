"""Programs as IR text, for tests of the lowering: what the named recurrences do not already show.

`make_inputs` gives inputs on which every program is stable: keys of length one, decays of at most 1.
"""

from __future__ import annotations

import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.ir.nodes import Program
from lmoe_compiler.ir.parse import parse

HEAD = "  state S[K, V]\n  token q[K] k[K] v[V] g w[K] b x[K]\n  head u[K] a\n"
NORM = "  state S[K, V]\n  state z[K]\n  token q[K] k[K] v[V] g\n"
DELTA = "    update k (x) b * v\n    update k (x) -b * (k' S)\n"
READ = "  read r[V] = q' S\n"

TEXTS = {
    "linear": HEAD + "  step S\n    update k (x) v\n" + READ + "  output r",
    "retention": HEAD + "  step S\n    decay log -abs(a)\n    update k (x) v\n" + READ + "  output r",
    "scalar": HEAD + "  step S\n    decay log g\n    update k (x) v\n" + READ + "  output r",
    "diagonal": HEAD + "  step S\n    decay log w\n    update k (x) v\n" + READ + "  output r",
    "both_decays": HEAD
    + "  step S\n    decay log w\n    decay log g\n    update k (x) v\n" + READ + "  output r",
    "bonus": HEAD + READ + "  step S\n    decay log w\n    update k (x) v\n"
    "  output r + dot[K](q * u, k) * v",
    "scalar_before": HEAD + READ + "  step S\n    decay log g\n    update k (x) v\n  output r",
    "between": HEAD + "  step S\n    decay log g\n" + READ + "  step S\n    update k (x) v\n  output r",
    "between_keys": HEAD
    + "  step S\n    decay log w\n" + READ + "  step S\n    update k (x) v\n  output r",
    "two_writes": HEAD
    + "  step S\n    decay log w\n    update k (x) v\n    update x (x) b * v\n" + READ + "  output r",
    "delta": HEAD + "  step S\n" + DELTA + READ + "  output r",
    "gated_delta": HEAD + "  step S\n    decay log g\n" + DELTA + READ + "  output r",
    "scaled_key": HEAD + "  step S\n    decay log g\n    update b * k (x) v\n"
    "    update k (x) -b * (k' S)\n" + READ + "  output r * sigmoid(g)",
    "keyed_delta": HEAD + "  step S\n    decay log w\n" + DELTA + READ + "  output r",
    "delta_before": HEAD + "  step S\n    decay log w\n    update k (x) b * v\n"
    "    update k (x) -b * (k' S) before\n" + READ + "  output r",
    "other_read": HEAD + "  step S\n    decay log g\n    update k (x) b * v\n"
    "    update k (x) -b * (x' S)\n" + READ + "  output r",
    "delta_of_other_keys": HEAD + "  step S\n    update k (x) b * v\n    update k (x) -b * (x' S)\n" + READ
    + "  output r",
    "delta_and_sum": "  state S[K, V]\n  state z[K]\n  token q[K] k[K] v[V] b\n  step S\n" + DELTA
    + "  step z\n    update k (x) 1\n" + READ + "  read n = q' z\n  output r + n * v",
    "delta_of_heads": HEAD + "  step S\n    update k (x) sigmoid(a) * v\n    update k (x) -sigmoid(a) * (k' S)\n"
    + READ + "  output r",
    "scaled_by_heads": HEAD + "  step S\n    decay log g\n    update k * u (x) v\n" + READ + "  output r",
    "other_key": HEAD + "  step S\n    decay log w\n    update k (x) v\n"
    "    update x * b (x) -1 * (x' S) before\n" + READ + "  output r",
    "two_feedbacks": HEAD + "  step S\n    decay log g\n    update k (x) v\n"
    "    update x (x) b * (k' S)\n    update k (x) -b * (k' S)\n" + READ + "  output r",
    "read_twice": HEAD + "  read p[V] = x' S\n  step S\n    decay log g\n" + DELTA + READ
    + "  output r + p * b",
    "gate_of_decay": HEAD + "  step S\n    decay log logsigmoid(w + u)\n    update (1 - sigmoid(w + u)) (x) v\n"
    + READ + "  output r",
    "normaliser": NORM + "  step S\n    decay log g\n    update exp(k) (x) v\n"
    "  step z\n    decay log g\n    update exp(k) (x) 1\n" + READ
    + "  read n = exp(q)' z\n  output r / (abs(n) + 1)",
    "chained": "  state A[K, M]\n  state B[M, V]\n  token q[K] k[K] v[V] f[M] g\n"
    "  step A\n    decay log g\n    update k (x) f\n  read p[M] = q' A\n"
    "  step B\n    decay log g\n    update f (x) v\n  read r[V] = (exp(p) / sum[M](exp(p)))' B\n  output r",
    "written_by_reads": "  state A[K, V]\n  state B[K, V]\n  token q[K] k[K] v[V] g\n"
    "  step A\n    decay log g\n    update k (x) v\n  read p[V] = q' A\n"
    "  step B\n    update k (x) p\n  read r[V] = q' B\n  output r",
    "transposed": "  state S[V, K]\n  token q[K] k[K] v[V] g b\n  step S\n    decay log g\n"
    "    update v (x) b * k\n    update k (x) -b * (k' S)\n  read r[V] = q' S\n  output r",
}  # fmt: skip

# Why each of these runs token by token.
SEQUENTIAL = {
    "two_steps": HEAD + "  step S\n" + DELTA + "  step S\n" + DELTA + READ + "  output r",
    "signed": HEAD + "  step S\n    decay tanh(g)\n    update k (x) v\n" + READ + "  output r",
    "elementwise": HEAD + "  step S\n    decay log w * exp(v)\n    update k (x) v\n" + READ
    + "  output r",
    "scaled_values": HEAD + "  step S\n    update k (x) v\n    update k (x) -sigmoid(v) * (k' S)\n" + READ
    + "  output r",
    "two_reads": HEAD + "  step S\n    update k (x) -b * (k' S)\n    update x (x) -b * (x' S)\n" + READ
    + "  output r",
    "whole": HEAD + "  step S\n    update k (x) v\n  read all[K, V] = S\n  output sum[K](all * q)",
}  # fmt: skip


def program(name: str) -> Program:
    return parse(f"recurrence {name}\n" + (TEXTS | SEQUENTIAL)[name] + "\n")


SIZES = {"K": 5, "V": 3, "M": 4}


def noise(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=seed, dtype=torch.float64).to(dtype)


def make_inputs(
    p: Program, B: int, T: int, H: int = 2, hard: bool = True, sizes: dict[str, int] = SIZES
) -> list[Tensor]:
    """Inputs [B, T, H, *axes] and [H, *axes]. `hard`: now and then a decay is exactly 0 (log -inf)."""
    result = []
    for var in p.inputs:
        lead = (B, T, H) if var.kind == "token" else (H,)
        x = 0.5 * noise(f"{p.name}.{var.name}", (*lead, *(sizes[a] for a in var.axes)))
        if var.name in "kxf":
            x = F.normalize(x, dim=-1)
        if var.name in "gw":
            x = -x.abs()
            x = torch.where(x < (-1.0 if hard else -9.0), -torch.inf, x)
        if var.name == "b":
            x = torch.sigmoid(x)
        result.append(x)
    return result


def make_states(p: Program, N: int, H: int = 2, sizes: dict[str, int] = SIZES) -> list[Tensor]:
    return [
        noise(f"{p.name}.{var.name}", (N, H, *(sizes[a] for a in var.axes))) for var in p.states
    ]
