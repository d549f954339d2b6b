"""Every mistake in a step function, at its definition, or in an IR text: the error names the value, the user's line,
and code that works.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lmoe_compiler as lmoe
from lmoe_compiler import Head, State, Token, errors, recurrence
from lmoe_compiler.dims import K, V

OUTSIDE = torch.ones(3)
LOG: list[torch.Tensor] = []
COUNT = 0


def one_value(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S


def too_many(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, S, S.T @ q


def wrong_shape(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S.T, S.T @ q


def not_a_tensor(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, 1.0


def branches(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token):
    if g > 0:
        S = S + torch.outer(k, v)
    return S, S.T @ q


def converts(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token):
    S = S * float(g) + torch.outer(k, v)
    return S, S.T @ q


def adds_in_place(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S += torch.outer(k, v)
    return S, S.T @ q


def sets_a_row(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S[0] = v
    return S, S.T @ q


def appends(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    LOG.append(S)
    return S, S.T @ q


def counts(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    global COUNT
    COUNT = COUNT + 1
    return S, S.T @ q


def prints(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    print(S)
    return S, S.T @ q


def captures(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, S.T @ q * OUTSIDE.sum()


def mixes_dims(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + S.T
    return S, S.T @ q


def loops_over_a_dim(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    for _ in range(k.shape[0]):
        S = S + torch.outer(k, v)
    return S, S.T @ q


def sorts(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(torch.sort(k).values, v)
    return S, S.T @ q


def merges_axes(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    return S, S.reshape(-1)


def stops_a_gradient(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k.detach(), v)
    return S, S.T @ q


def stops_the_states_gradient(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    with torch.no_grad():
        old = S.T @ k
    S = S + torch.outer(k, v - old)
    return S, S.T @ q


def decides_by_a_size(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    if k.shape[0] > 64:
        S = 0.5 * S
    return S + torch.outer(k, v), S.T @ q


def compares_sizes(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    o = S.T @ q
    return S + torch.outer(k, v), o if k.shape[0] == v.shape[0] else 2 * o


def takes_a_root_of_a_size(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v) / math.sqrt(k.shape[0])
    return S, S.T @ q


def asserts_a_size(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    assert k.shape[0] % 2 == 0
    return S, S.T @ q


def rounds(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token):
    S = g.long() * S + torch.outer(k, v)
    return S, S.T @ q


def halves_precision(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S.to(torch.bfloat16).float() + torch.outer(k, v)
    return S, S.T @ q


def drops_out(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(F.dropout(k, 0.1), v)
    return S, S.T @ q


def numbers_an_axis(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = torch.arange(k.shape[0])[:, None] * S + torch.outer(k, v)
    return S, S.T @ q


def joins(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)
    return S, torch.cat([S.T @ q, S.T @ k])


def cuts(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    a, b = k.chunk(2)
    S = S + torch.outer(torch.cat([-b, a]), v)
    return S, S.T @ q


def uses_numpy(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(torch.tensor(np.exp(k)), v)
    return S, S.T @ q


def is_for_batches(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.einsum("bhk,bhv->bhkv", k, v)
    return S, S.T @ q


def indexes_a_number(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], g: Token):
    S = g[0] * S + torch.outer(k, v)
    return S, S.T @ q


def returns_nothing(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    S = S + torch.outer(k, v)


def returns_a_dict(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
    return {"S": S, "o": S.T @ q}


# step, error, what it says of the value, the user's line, part of the code that works
STEPS = (
    (one_value, errors.WrongReturn, "returned one value, not 2", "return S", "return S, output"),
    (
        too_many,
        errors.WrongReturn,
        "returned 3 values, not 2",
        "return S, S, S.T @ q",
        "return S, output",
    ),
    (
        wrong_shape,
        errors.WrongReturn,
        "state S as [V, K], not [K, V]",
        "return S.T, S.T @ q",
        "S is [K, V]",
    ),
    (not_a_tensor, errors.WrongReturn, "a float as output", "return S, 1.0", "return S, output"),
    (
        branches,
        errors.DataDependentControlFlow,
        "value of a tensor",
        "if g > 0:",
        "torch.where(g > 0",
    ),
    (converts, errors.DataDependentControlFlow, "value of a tensor", "float(g)", "torch.where"),
    (
        adds_in_place,
        errors.InPlaceUpdate,
        "in place (add_)",
        "S += torch.outer(k, v)",
        "S = S + torch",
    ),
    (sets_a_row, errors.InPlaceUpdate, "in place (copy_)", "S[0] = v", "S = S + torch"),
    (appends, errors.SideEffect, "calls .append(...)", "LOG.append(S)", "return S, o"),
    (counts, errors.SideEffect, "assigns the global COUNT", "COUNT = COUNT + 1", "return S, o"),
    (prints, errors.SideEffect, "prints", "print(S)", "return S, o"),
    (captures, errors.CapturedTensor, "shape [3]", "OUTSIDE.sum()", "u: Head[K]"),
    (mixes_dims, errors.MixedDims, "must match the size of tensor b", "S = S + S.T", "S.T @ k"),
    (loops_over_a_dim, errors.MixedDims, "K as a plain number", "range(k.shape[0])", "static=True"),
    (sorts, errors.UnsupportedOperation, "aten.sort", "torch.sort(k)", "a: Head[K]"),
    (stops_a_gradient, errors.UnsupportedOperation, "a gradient (detach)", "k.detach()", "outside"),
    (stops_the_states_gradient, errors.UnsupportedOperation, "(no_grad)", "no_grad():", "outside"),
    (decides_by_a_size, errors.MixedDims, "whether K <= 64", "k.shape[0] > 64", "static=True"),
    (compares_sizes, errors.MixedDims, "whether K == V", "== v.shape[0]", "static=True"),
    (takes_a_root_of_a_size, errors.MixedDims, "K as a plain number", "math.sqrt", "** -0.5"),
    (asserts_a_size, errors.MixedDims, "the step needs to know", "% 2 == 0", "static=True"),
    (rounds, errors.UnsupportedOperation, "whole numbers", "g.long()", "torch.outer"),
    (halves_precision, errors.UnsupportedOperation, "precision", "torch.bfloat16", "torch.outer"),
    (drops_out, errors.UnsupportedOperation, "bernoulli_", "F.dropout", "noise: Token[K]"),
    (numbers_an_axis, errors.UnsupportedOperation, "aten.arange", "torch.arange", "a: Head[K]"),
    (joins, errors.UnsupportedOperation, "aten.cat", "torch.cat", "before the call"),
    (cuts, errors.MixedDims, "== 2", "torch.cat([-b, a])", "Token[N, H]"),
    (uses_numpy, errors.DataDependentControlFlow, "value of a tensor", "np.exp", "g.exp()"),
    (is_for_batches, errors.MixedDims, "S is [K, V], q is [K]", "bhk,bhv", "S.T @ k"),
    (indexes_a_number, errors.MixedDims, "g is a number", "g[0]", "S.T @ k"),
    (returns_nothing, errors.WrongReturn, "returned nothing", "torch.outer", "return S, output"),
    (returns_a_dict, errors.WrongReturn, "returned a dict", "return {", "return S, output"),
    (merges_axes, errors.UnsupportedOperation, "aten.view", "S.reshape(-1)", "einsum"),
)


@pytest.mark.parametrize(("step", "error", "value", "line", "works"), STEPS)
def test_step_is_refused(step, error, value, line, works):
    with pytest.raises(error) as raised:
        recurrence(step)
    text = str(raised.value)
    assert value in text
    assert "test_errors_frontend.py" in raised.value.where
    assert line in raised.value.where
    assert raised.value.why
    assert works in raised.value.try_


def test_what_torch_differentiates_itself_stops_no_gradient():
    """Derivatives detach what they keep, and sizes that agree by name are no question."""

    @recurrence
    def learns(S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
        assert S.shape == (k.shape[0], v.shape[0])
        S = S - torch.func.grad(lambda W: ((W.T @ k).tanh() - v).square().sum())(S)
        return S, S.T @ (q / max(q.shape[0], 1))

    assert learns.transition.kind == "nonlinear"


def test_refused_step_stays_refused():
    for _ in range(2):
        with pytest.raises(errors.DataDependentControlFlow):
            recurrence(branches)


def no_annotation(S: State[K, V], q, k: Token[K]):
    return S, S.T @ q


def number_annotation(S: State[K, V], q: Token[3]):
    return S, S.T @ q


def unresolved(S: State[K, V], q: Token[Nowhere]):  # noqa: F821
    return S, S.T @ q


def no_state(q: Token[K]):
    return q


def no_token(S: State[K, V], u: Head[K]):
    return S, S.T @ u


def late_state(q: Token[K], S: State[K, V]):
    return S, S.T @ q


def with_default(S: State[K, V], q: Token[K], scale: Token = 1.0):
    return S, S.T @ q


def only_by_name(S: State[K, V], q: Token[K], *, k: Token[K]):
    return S, S.T @ q


def takes_a_calls_name(S: State[K, V], q: Token[K], initial_state: Token[K]):
    return S, S.T @ q


class H(lmoe.Dim):
    """halves"""


def takes_the_heads_name(S: State[H, V], q: Token[H]):
    return S, S.T @ q


SIGNATURES = (
    (only_by_name, errors.BadSignature, "'k' is not a plain one: it is keyword-only"),
    (takes_a_calls_name, errors.BadSignature, "an input is called 'initial_state'"),
    (takes_the_heads_name, errors.BadSignature, "a dim is called H"),
    (no_annotation, errors.UnknownAnnotation, "argument 'q' has no annotation"),
    (number_annotation, errors.UnknownAnnotation, "argument 'q' is annotated Token[3]"),
    (unresolved, errors.UnknownAnnotation, "Nowhere"),
    (no_state, errors.BadSignature, "states come first"),
    (no_token, errors.BadSignature, "no Token argument"),
    (late_state, errors.BadSignature, "states come first"),
    (with_default, errors.BadSignature, "scale"),
)


@pytest.mark.parametrize(("step", "error", "what"), SIGNATURES)
def test_signature_is_refused(step, error, what):
    with pytest.raises(error) as raised:
        recurrence(step)
    assert what in str(raised.value)
    assert "test_errors_frontend.py" in raised.value.where
    assert "@lmoe.recurrence" in raised.value.try_


class Method:
    def step(self, S: State[K, V], q: Token[K], k: Token[K], v: Token[V]):
        S = S + torch.outer(k, v)
        return S, S.T @ q

    async def later(self, S: State[K, V], q: Token[K]):
        return S, S.T @ q

    __call__ = step


@pytest.mark.parametrize("other", [3, Method, Method(), Method().later, partial(merges_axes)])
def test_what_is_no_function_is_refused(other):
    with pytest.raises(errors.BadSignature, match="recurrence\\(\\) got"):
        recurrence(other)
    made = recurrence(Method().step)
    assert made.transition.kind == "identity"
    with pytest.raises(errors.BadSignature, match="which is a recurrence already"):
        recurrence(made)


@pytest.mark.parametrize("bounds", [{"h": (0, 1)}, {"q": (1, 0)}, {"q": 3}])
def test_bound_is_refused(bounds):
    with pytest.raises(errors.BadBound) as raised:
        recurrence(bounds=bounds)(merges_axes)
    assert str(next(iter(bounds))) in str(raised.value)
    assert "bounds={" in raised.value.try_


PROGRAM = """recurrence r
  state S[K, V]
  token q[K] k[K] v[V]
  step S
    update k (x) v
  read o[V] = q' S
  output o
"""

# replace this by that: the error's words, line and column
SYNTAX = (
    ("output o", "outputs o", "unknown statement 'outputs'", 7, 3),
    ("k (x) v", "k (x) v *", "neither declared nor an op", 5, 0),
    ("k (x) v", "k v", "expected '(x)'", 5, 14),
    ("k (x) v", "k (x) w", "'w' is neither declared nor an op", 5, 18),
    ("q' S", "q' T", "'T' is not a state", 6, 18),
    ("  output o\n", "", "no output", 6, 0),
    ("[K] k[K]", "[K] q[K]", "'q' is declared twice", 3, 14),
    ("k (x) v", "k (x) dot[K(k, v)", "expected ']'", 5, 23),
    ("k (x) v", "k (x) v $", "unexpected character '$'", 5, 20),
    ("output o", "output o o", "after the end", 7, 12),
    ("recurrence r", "recurence r", "expected 'recurrence'", 1, 1),
)


@pytest.mark.parametrize(("old", "new", "words", "line", "column"), SYNTAX)
def test_syntax_error_has_line_and_column(old, new, words, line, column):
    with pytest.raises(errors.IRSyntaxError) as raised:
        lmoe.parse(PROGRAM.replace(old, new))
    assert words in str(raised.value) or column == 0
    place = f"line {line}, column {column}" if column else f"line {line}"
    assert place in raised.value.where
    assert "^" in raised.value.where
    assert lmoe.parse(raised.value.try_).ir.transition.kind == "identity"


INVALID = (
    ("k (x) v", "k (x) q", "nothing fills"),
    ("k (x) v", "v (x) v", "nothing fills"),
    ("q' S", "(q * v)' S", "one axis"),
    ("output o", "output prefix[axis=K](o)", "chunk programs only"),
    ("  state S[K, V]\n", "  state S[K, V]\n  bound g in [0, 1]\n", "bound of 'g'"),
)


@pytest.mark.parametrize(("old", "new", "words"), INVALID)
def test_invalid_program_is_refused(old, new, words):
    with pytest.raises(errors.LmoeError) as raised:
        lmoe.parse(PROGRAM.replace(old, new))
    assert words in str(raised.value)
