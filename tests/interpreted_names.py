"""A dim may have any name that kernels use for something else; run by test_codegen.py."""

from __future__ import annotations

import pytest
import torch

import lmoe_compiler as lmoe
from lmoe_compiler import Dim, State, Token
from lmoe_compiler.codegen import run, tuned
from lmoe_compiler.codegen.plan import Choice, Tuning


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize(
    ("keys", "values"), [("N", "C"), ("n", "c"), ("tl", "o"), ("SPAN", "DOT"), ("K", "BK")]
)
def test_names_of_dims(keys, values, nonlinear):
    """The number of documents, rows of a chunk, program indices, Triton itself, constants, sizes of tiles."""
    A, B = (type(name, (Dim,), {"__doc__": name}) for name in (keys, values))

    def step(S, q, k, v, g):
        S = g.sigmoid()[:, None] * S + torch.outer(k, v)
        return (S.tanh() if nonlinear else S), S.T @ q

    step.__annotations__ = {
        "S": State[A, B], "q": Token[A], "k": Token[A], "v": Token[B], "g": Token[A],
    }  # fmt: skip
    recurrence = lmoe.recurrence(step)
    kernels = recurrence.with_options(implementation="triton")
    inputs = [torch.randn(1, 20, 2, size, requires_grad=True) for size in (6, 6, 5, 6)]
    for cu_seqlens in (None, torch.tensor([0, 7, 20], dtype=torch.int32)):
        outputs = [r(*inputs, cu_seqlens=cu_seqlens) for r in (kernels, recurrence.reference)]
        both = [[o, *torch.autograd.grad(o.square().sum(), inputs)] for o in outputs]
        for found, expected in zip(*both, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("query", "key"), [("exp", "reach"), ("k", "S_sum"), ("S_factor", "dS_sum")]
)
def test_names_of_inputs(query, key, monkeypatch):
    """Functions that kernels call, and names of what they pass on."""
    spans = Choice(16, span=32, prepare=True, prepare_rows=True, default=Tuning(16))
    monkeypatch.setattr(tuned, "lookup", lambda *_: spans)
    compare(query, key, "g", "g.exp()[:, None]", vector=True)


def compare(query: str, key: str, gate: str, decay: str, vector: bool) -> None:
    """Kernels of a recurrence whose inputs have these names against its reference."""
    source = (
        f"def step(S, {query}, {key}, value, {gate}):\n"
        f"    S = {decay} * S + torch.outer({key}, value)\n"
        f"    return S, S.T @ {query}\n"
    )
    K, V = (type(name, (Dim,), {"__doc__": name}) for name in "KV")
    kinds = {"S": State[K, V], query: Token[K], key: Token[K], "value": Token[V]}
    kinds[gate] = Token[K] if vector else Token[()]
    inputs = [torch.randn(1, 40, 1, size) for size in (6, 6, 5)]
    inputs.append(-torch.rand(1, 40, 1, 6) if vector else -torch.rand(1, 40, 1))
    run.forget()
    scope = {"torch": torch}
    exec(source, scope)
    step = scope["step"]
    step.__annotations__ = kinds
    recurrence = lmoe.recurrence(step)
    for x in inputs:
        x.requires_grad_()
    both = []
    for r in (recurrence.with_options(implementation="triton"), recurrence.reference):
        o = r(*inputs)
        both.append([o, *torch.autograd.grad(o.square().sum(), inputs)])
    for found, expected in zip(*both, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
    run.forget()


@pytest.mark.parametrize(
    "gate", ["S_from_exit", "S_error_from_exit", "S_entry_sum", "S_past", "S_product"]
)
def test_names_of_gates(gate, monkeypatch):
    """Names of what is left of inner products of states and their gradients."""
    recomputed = Choice(16, prepare=True, products=True, recompute=True, default=Tuning(16))
    monkeypatch.setattr(tuned, "lookup", lambda *_: recomputed)
    compare("q", "k", gate, f"{gate}.exp()", vector=False)
