"""From a decorated function to expressions: signatures, sizes, source lines, and the reference."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kinds import ROWS, M, N
from random_expressions import SIZES
from spellings import define, delta_rule, gated_delta_rule

import lmoe_compiler as lmoe
from lmoe_compiler import Head, State, Token, definition, recurrence
from lmoe_compiler.dims import K
from lmoe_compiler.ir.interpret import Value, evaluate
from lmoe_compiler.ir.nodes import topological
from lmoe_compiler.symbols import Symbols
from lmoe_compiler.trace import _run as run_on
from lmoe_compiler.trace import by_numbers, trace

pytestmark = pytest.mark.filterwarnings("error")


def traced(r, **static):
    return trace(r.name, r.definition, r.states, r.inputs, tuple(static.items()))


def values_of(r, t, **static):
    """The traced expressions and the step itself at one set of random inputs."""
    sizes = {"K": 3, "V": 4, "M": 5, "K'": 3} | static
    random = torch.Generator().manual_seed(0)
    variables = (*r.states, *r.inputs)
    xs = [
        torch.randn([sizes[a] for a in v.axes], dtype=torch.float64, generator=random)
        for v in variables
    ]
    env = {v.node: Value(x, v.axes) for v, x in zip(variables, xs, strict=True)}
    axes = [*(v.axes for v in t.states), t.output_axes]
    found = evaluate([*t.next_states, t.output], env, sizes)
    return [v.to(a) for v, a in zip(found, axes, strict=True)], r.definition(*xs)


@pytest.mark.parametrize("name", ROWS)
def test_expressions_have_the_steps_values(name):
    r = ROWS[name].recurrence
    static = dict.fromkeys(r.static_dims, 3)
    if static:
        torch.set_default_dtype(torch.float64)
    try:
        found, expected = values_of(r, traced(r, **static), **static)
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.expand(y.shape), y)


@pytest.mark.parametrize("name", ROWS)
def test_every_operation_keeps_a_line_of_the_step(name):
    step = ROWS[name].recurrence.definition
    source, start = inspect.getsourcelines(step)
    r = ROWS[name].recurrence
    t = traced(r, **dict.fromkeys(r.static_dims, 2))
    for node in topological([*t.next_states, t.output]):
        if node.op in ("input", "const", "size"):
            continue
        assert node.loc is not None
        assert node.loc.file == step.__code__.co_filename
        assert start <= node.loc.line < start + len(source)
        assert node.loc.text in source[node.loc.line - start]


def looks_at_a_size(S, q, k, v):
    S = S + torch.outer(k, v) if q.shape[0] > 5 else S
    return S, S.T @ q


def computes_with_a_size(S, q, k, v):
    S = S + torch.outer(k, v)
    return S, S.T @ q * len(q) ** -0.5


def walks_along_a_dim(S, q, k, v):
    return sum(row * 0 for row in S) + S, S.T @ q


def averages(S, q, k, v):
    S = S + torch.outer(k, v)
    return S, torch.nn.functional.layer_norm(S.T @ q, v.shape)


@pytest.mark.parametrize("name", ROWS)
def test_numbers_for_sizes_give_what_symbols_give(name):
    """Most steps are traced without a symbol; the expressions are the same ones."""
    r = ROWS[name].recurrence
    static = tuple(dict.fromkeys(r.static_dims, 2).items())
    run = partial(run_on, r.name, r.definition, r.states, r.inputs, static)
    found = by_numbers(run, [*r.states, *r.inputs], dict(static))
    if found is not None:
        assert found == run(Symbols([*r.states, *r.inputs], dict(static)))


@pytest.mark.parametrize(
    "step", [looks_at_a_size, computes_with_a_size, walks_along_a_dim, averages]
)
def test_numbers_are_not_taken_for_a_step_that_looks_at_sizes(step):
    r = ROWS["linear_attention"].recurrence
    run = partial(run_on, r.name, step, r.states, r.inputs, ())
    assert by_numbers(run, [*r.states, *r.inputs], {}) is None


def test_nothing_of_dynamo_is_imported_for_a_plain_step():
    """The first trace of a process costs milliseconds, not Dynamo's import."""
    code = """
import sys, torch
from lmoe_compiler import State, Token, recurrence
from lmoe_compiler.dims import K, V

@recurrence
def delta_rule(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], beta: Token):
    k = torch.nn.functional.normalize(torch.nn.functional.elu(k), dim=0)
    S = S + torch.outer(k, torch.sigmoid(beta) * (v - S.T @ k))
    return S, S.T @ q

assert delta_rule.transition.kind == "rank_one"
assert "torch._dynamo" not in sys.modules
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_line_inside_an_inner_loss():
    t = traced(ROWS["ttt_layer_norm"].recurrence)
    lines = {n.loc.text for n in topological(t.next_states) if n.loc is not None}
    assert "y = F.layer_norm(k @ W, (v.shape[0],))" in lines


def test_numbers_computed_from_sizes_stay_expressions():
    def step(S, q, k, v):
        S = S + torch.outer(k, v) / (2 * v.shape[0] + 1)
        return S, S.T @ (q * q.shape[0] ** -0.5)

    program = define(step).ir
    for lengths in (SIZES, {"K": 5, "V": 2}):
        q, k, v = (torch.randn(1, 2, 1, lengths[d], dtype=torch.float64) for d in "KKV")
        r = lmoe.parse(str(program))
        torch.testing.assert_close(r.reference(q, k, v), define(step).reference(q, k, v))
    assert "size[K]" in str(program)
    assert "size[V]" in str(program)


def test_dims_of_a_function_and_annotations_as_text():
    class Slots(lmoe.Dim):
        """memory slots"""

    @recurrence
    def local(S: State[K, Slots], q: Token[K], s: Token[Slots], u: Head[Slots], g: Token):
        S = g.exp() * S + torch.outer(q, s * u)
        return S, S.T @ q

    assert local.states[0].axes == ("K", "Slots")
    assert [(v.name, v.kind, v.axes) for v in local.inputs] == [
        ("q", "token", ("K",)), ("s", "token", ("Slots",)), ("u", "head", ("Slots",)), ("g", "token", ()),
    ]  # fmt: skip
    assert local.transition.kind == "scalar"


def test_two_axes_of_one_dim():
    r = ROWS["recurrent_gate"].recurrence
    assert r.inputs[-1].axes == ("K", "K'")
    found, expected = values_of(r, traced(r))
    torch.testing.assert_close(found[0], expected[0])


def test_static_dim_makes_a_program_per_length():
    r = ROWS["delta_product"].recurrence
    assert r.static_dims == ("N",)
    assert N.static
    assert not M.static
    for length in (1, 2, 4):
        program = r.program(N=length)
        assert program.static == (("N", length),)
        steps = [item for item in program.body if hasattr(item, "feedbacks")]
        assert len(steps) == length
    with pytest.raises(lmoe.errors.BadSignature, match=r"r\.program\(N=2\)"):
        r.program()


def test_definition_is_the_function_itself():
    r = define(gated_delta_rule, g=Token, b=Token)
    assert r.definition is gated_delta_rule
    assert r.name == "gated_delta_rule"
    assert lmoe.parse(str(r.ir)).definition is None


def test_reference_groups_heads():
    r = define(gated_delta_rule, g=Token, b=Token)
    x = {n: torch.randn(2, 3, h, d) for n, h, d in (("q", 4, 3), ("k", 2, 3), ("v", 4, 5))}
    g, b = -torch.rand(2, 3, 4), torch.rand(2, 3, 1)
    found = r.reference(x["q"], x["k"], x["v"], g, b)
    wide = r.reference(x["q"], x["k"].repeat_interleave(2, 2), x["v"], g, b.repeat_interleave(4, 2))
    torch.testing.assert_close(found, wide)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reference_takes_any_dtype(dtype):
    def step(S, q, k, v, b):
        S = (torch.eye(k.shape[0]) - b * torch.outer(k, k)) @ S + b * torch.outer(k, v)
        return S, S.T @ q

    r = define(step, b=Token)
    q, k, v = (torch.randn(1, 4, 2, d, dtype=dtype) for d in (3, 3, 5))
    o, S = r.reference(q, k, v, torch.rand(1, 4, 2, dtype=dtype), return_state=True)
    assert o.dtype == dtype
    assert S.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.get_default_dtype() == torch.float32


def test_reference_is_differentiable():
    r = ROWS["gated_delta"].recurrence
    shapes = [(1, 3, 2, 2)] * 2 + [(1, 3, 2, 3)] + [(1, 3, 2)] * 2
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(r.reference, inputs)


def test_empty_sequence_keeps_the_state():
    r = ROWS["gated_delta"].recurrence
    shapes = [(2, 0, 2, 3)] * 2 + [(2, 0, 2, 4)] + [(2, 0, 2)] * 2
    S0 = torch.randn(2, 2, 3, 4)
    o, S = r.reference(*map(torch.zeros, shapes), initial_state=S0, return_state=True)
    assert o.shape == (2, 0, 2, 4)
    torch.testing.assert_close(S, S0)


def test_constants_of_a_step():
    def step(S, q, k, v, g):
        S = torch.tensor(0.5) * math.exp(-1) * S + F.softplus(g, beta=2) * torch.outer(k, v)
        return S, S.T @ q

    found, expected = values_of(r := define(step, g=Token), traced(r))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


OPERATIONS = {
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "logsumexp": lambda x: x - torch.logsumexp(x, 0),
    "norm": lambda x: x / x.norm() + x / x.norm(p=1) + F.normalize(x, dim=0),
    "rms_norm": lambda x: F.rms_norm(x, (x.shape[0],), eps=1e-6),
    "statistics": lambda x: x * x.var() + x.mean() - x.std(correction=0) + x.amin(),
    "gelu": lambda x: F.gelu(x) + F.silu(x) + F.elu(x) + F.relu(x) ** 2,
    "compare": lambda x: torch.where((x > 0) & (x < 1), x, -x) + (x != 0) * (x >= 0.2) * ~(x <= 0),
    "logaddexp": lambda x: torch.logaddexp(x, 2 * x) + torch.expm1(x) + torch.log1p(x * x),
    "power": lambda x: x**3 + (x * x + 1) ** -1.5 + 2.0**x + (x * x + 1) ** x,
    "lerp": lambda x: torch.lerp(x, 2 * x, 0.3) + torch.addcmul(x, x, x, value=0.1),
    "trigonometry": lambda x: torch.sin(x) * torch.cos(x) + torch.erf(x) + x.sign() + x.abs(),
    "minimum": lambda x: torch.minimum(x, x * x) + torch.maximum(x, -x) + x.square(),
    "largest": lambda x: x.max() * x - x.min(0).values + x.max(-1, keepdim=True)[0],
    "either": lambda x: ((x > 1) | (x < 0)) * x + ((x > 0) ^ (x > 1)) * x + (x > 2).bool() * x,
    "powers_of_two": lambda x: torch.exp2(x) + torch.log2(x * x + 1) + torch.hypot(x, 2 * x),
    "erfc": lambda x: torch.erfc(x) + torch.logit(x.sigmoid()) + x.logit(0.1),
    "casts": lambda x: (x > 0).float() * x + (x > 0).to(x.dtype) + (x > 0).long() * x.type_as(x),
    "masked": lambda x: x.masked_fill(x < 0, 0.25) + torch.full_like(x, 2.0),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_a_step(name):
    def step(S, q, k, v):
        S = S + torch.outer(OPERATIONS[name](k), v)
        return S, S.T @ q + OPERATIONS[name](S.T @ k)

    r = define(step)
    found, expected = values_of(r, traced(r))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert r.ir.transition.kind == "identity"


def test_a_definition_is_checked_where_it_is_written(monkeypatch):
    """A mistake in the algebra does not wait for a call: the decorator compares the program with the step."""
    another = delta_rule()[0].ir
    monkeypatch.setattr(definition, "analyse", lambda traced, bounds: another)

    def step(S, q, k, v, b):
        S = S + torch.outer(k, b * v)
        return S, S.T @ q

    with pytest.raises(AssertionError, match="differs from its step in the state S"):
        define(step, b=Token)
