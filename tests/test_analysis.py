"""What the analysis proves: spellings that are one program, kinds of every row of the table, ranges of gates."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from functools import cache
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import ROWS
from spellings import FAMILIES, define, delta_rule, gated_delta_rule, nameless, near_misses

from lmoe_compiler import Head, State, Token, recurrence
from lmoe_compiler.analysis import interval
from lmoe_compiler.analysis.poly import Atom, Poly, canonical, renamed
from lmoe_compiler.dims import K, V
from lmoe_compiler.ir.nodes import Bound, Next, Step


@pytest.mark.parametrize("family", FAMILIES)
def test_spellings_are_one_program(family):
    first, *others = FAMILIES[family]()
    for other in others:
        assert nameless(other.ir) == nameless(first.ir), other.name


def test_near_misses_are_other_programs():
    programs = [
        nameless(r.ir) for r in (define(gated_delta_rule, g=Token, b=Token), *near_misses())
    ]
    for i, program in enumerate(programs):
        assert all(program != other for other in programs[i + 1 :])


DECAYS = (
    lambda S, g: g.exp() * S,
    lambda S, g: S * torch.exp(g),
    lambda S, g: (0.5 * g).exp() * ((0.5 * g).exp() * S),
    lambda S, g: S - (1 - g.exp()) * S,
    lambda S, g: (g.exp() * torch.eye(S.shape[0])) @ S,
    lambda S, g: S / torch.exp(-g),
    lambda S, g: torch.einsum(",kv->kv", g.exp(), S),
)
READS = (
    lambda S, k: S.T @ k,
    lambda S, k: k @ S,
    lambda S, k: (S * k[:, None]).sum(0),
    lambda S, k: torch.einsum("kv,k->v", S, k),
    lambda S, k: torch.mv(S.t(), k),
    lambda S, k: torch.tensordot(k, S, dims=1),
    lambda S, k: torch.func.grad(lambda x: (S.T @ x).sum())(k) @ S * 0 + S.mT @ k,
)
WRITES = (
    lambda S, k, u: S + torch.outer(k, u),
    lambda S, k, u: torch.addr(S, k, u),
    lambda S, k, u: S + k[:, None] * u,
    lambda S, k, u: (S.T + u[:, None] * k).T,
    lambda S, k, u: S - torch.einsum("k,v->kv", -k, u),
    lambda S, k, u: S + (torch.diag(k) @ torch.ones_like(S)) * u[None],
)
CORRECTIONS = (
    lambda write, S, k, v, b, r: write(S, k, b * (v - r(S, k))),
    lambda write, S, k, v, b, r: write(S, b * k, v - r(S, k)),
    lambda write, S, k, v, b, r: write(write(S, k, b * v), -k, b * r(S, k)),
    lambda write, S, k, v, b, r: (1 - b) * S + b * write(S, k, v - r(S, k)),
    lambda write, S, k, v, b, r: write(S, k, (b * v + (1 - b) * r(S, k)) - r(S, k)),
)


@settings(max_examples=25, deadline=None)
@given(*(st.sampled_from(options) for options in (DECAYS, READS, WRITES, CORRECTIONS, READS)))
def test_written_spellings_are_one_program(decay, read, write, correct, read_out):
    def step(S, q, k, v, g, b):
        S = decay(S, g)
        S = correct(write, S, k, v, b, read)
        return S, read_out(S, q)

    expected = define(gated_delta_rule, g=Token, b=Token).ir
    assert nameless(define(step, g=Token, b=Token).ir) == nameless(expected)


@pytest.mark.parametrize("name", ROWS)
def test_kind(name):
    row = ROWS[name]
    transition = row.recurrence.transition
    assert transition.kind == row.kind, str(transition)
    assert all(transition.states[state] == kind for state, kind in row.states.items())


def test_momentum_is_coupled_and_says_where():
    (item,) = [i for i in ROWS["momentum"].recurrence.ir.body if isinstance(i, Next)]
    assert item.kind == "coupled"
    assert item.states == ("S", "M")
    assert item.loc is not None
    assert "M = mu * M" in item.loc.text or "S = al * S" in item.loc.text


def test_report_names_the_line_that_prevents_a_better_form():
    layer_norm = str(ROWS["ttt_layer_norm"].recurrence.transition)
    assert "no better form" in layer_norm
    assert "F.layer_norm(k @ W" in layer_norm
    per_channel = str(ROWS["beta_per_value_channel"].recurrence.transition)
    assert "b[V]" in per_channel
    assert "b * (v - S.T @ k)" in per_channel


def scaled_layer_norm(S, q, k, v, w, b):
    def loss(W):
        return 0.5 * ((F.layer_norm(W.T @ k, v.shape, w, b) - v) ** 2).sum()

    S = S - torch.func.grad(loss)(S)
    return S, S.T @ q


def test_many_sums_over_one_axis_are_told_apart_quickly():
    """An affine layer norm in an inner loss took 98 s: all orders of its means' labels were tried."""
    step = define(scaled_layer_norm, w=Head[V], b=Head[V])
    begin = time.process_time()
    assert step.transition.kind == "nonlinear"
    assert time.process_time() - begin < 20


def total(atoms):
    return Poly({canonical(atoms): Fraction(1)}).key


def test_names_of_bound_labels_do_not_matter():
    """Under every renaming, and with groups in every order, a monomial is the same one."""
    x, s = Atom("input", "x"), Atom("fn", "s", symmetries=((0, 1), (1, 0)))
    labels = ["V~0", "V~1", "V~2", "V~3"]
    a, b, c, d = labels
    monomials = [
        [(x, (a,)), (x, (b,)), (x, (c,)), (x, (d,))],
        [(x, (a, b)), (x, (b, c)), (x, (c, d)), (x, (d, a))],
        [(s, (a, b)), (s, (b, c)), (x, (c, d)), (x, (a,))],
        [(x, (a, b)), (x, (b, a)), (x, (c, d)), (x, (d, c))],
        [(x, (a, a)), (x, (b, c)), (x, (c, b)), (x, (d, d))],
    ]
    keys = [total(m) for m in monomials]
    assert len(set(keys)) == len(keys)
    for monomial, key in zip(monomials, keys, strict=True):
        for order in permutations(labels):
            names = dict(zip(labels, order, strict=True))
            assert total(renamed(monomial[::-1], names)) == key


def test_report_in_words():
    """What is forgotten, never used, or nonlinear is said so; a constant has its own value as its range."""

    def forgets(S, q, k, v, g):
        S = torch.outer(k, v)
        return S, S.T @ q

    text = str(define(forgets, g=Token).transition)
    assert "nothing is kept from one token to the next" in text
    assert "not used: g" in text
    assert "inf" not in text

    def squares(S, q, k, v):
        S = S * S + torch.outer(k, v)
        return S, S.T @ q

    assert "no better form: a product of two values of S" in str(define(squares).transition)


def test_a_decay_by_lerp_is_a_decay():
    def lerps(S, q, k, v, g):
        S = torch.lerp(torch.outer(k, v), S, g.sigmoid())
        return S, S.T @ q

    def adds(S, q, k, v, g):
        S = g.sigmoid() * S + (1 - g.sigmoid()) * torch.outer(k, v)
        return S, S.T @ q

    assert nameless(define(lerps, g=Token).ir) == nameless(define(adds, g=Token).ir)


def test_delta_rule_is_in_merged_form():
    """The chunk builder halves the solve's work where feedback and write share their key."""
    (step,) = [i for i in delta_rule()[4].ir.body if isinstance(i, Step)]
    assert step.feedbacks[0].key is step.writes[0].key
    assert "merged" in str(delta_rule()[4].transition)


def decay_of(gate, bounds=None):
    @recurrence(bounds=bounds)
    def step(S: State[K, V], q: Token[K], k: Token[K], v: Token[V], x: Token, A: Head):
        S = gate(x, A) * S + torch.outer(k, v)
        return S, S.T @ q

    (item,) = [i for i in step.ir.body if isinstance(i, Step)]
    return item.decays[0], step.ir.bounds


INF = math.inf
# The table of reference/analysis.md section 3: gate, range of the factor's log.
GATES = (
    (lambda x, A: torch.sigmoid(x), (-INF, 0)),
    (lambda x, A: 1 - torch.sigmoid(x), (-INF, 0)),
    (lambda x, A: 1 / (1 + torch.exp(x)), (-INF, 0)),
    (lambda x, A: torch.exp(-F.softplus(x)), (-INF, 0)),
    (lambda x, A: torch.exp(x), (-INF, INF)),
    (lambda x, A: torch.sigmoid(x) ** (1 / 16), (-INF, 0)),
    (lambda x, A: (F.logsigmoid(x) / 16).exp(), (-INF, 0)),
    (lambda x, A: torch.exp(-A.exp() * F.softplus(x)), (-INF, 0)),
    (lambda x, A: torch.sigmoid(x) * torch.exp(-A.exp()), (-INF, 0)),
    (lambda x, A: torch.exp(-torch.exp(x)), (-INF, 0)),
    (lambda x, A: torch.exp(-0.606531 * torch.sigmoid(x)), (-0.606531, 0)),
    (lambda x, A: torch.exp(-5 * torch.sigmoid(A.exp() * x)), (-5, 0)),
    (lambda x, A: torch.sigmoid(A) + (1 - torch.sigmoid(A)) * torch.sigmoid(x), (-INF, 0)),
    (lambda x, A: torch.sqrt(torch.sigmoid(x)), (-INF, 0)),
)


@pytest.mark.parametrize(("gate", "expected"), GATES)
def test_range_of_log_decay(gate, expected):
    decay, bounds = decay_of(gate)
    assert decay.log is not None
    assert interval(decay.log, bounds) == pytest.approx(expected)


def test_declared_bounds_narrow_the_range():
    decay, bounds = decay_of(lambda x, A: torch.exp(x), {"x": (-5, 0)})
    assert interval(decay.log, bounds) == (-5, 0)
    decay, bounds = decay_of(lambda x, A: 1 - x, {"x": (0, 1)})
    assert interval(decay.log, bounds) == (-INF, 0)


@pytest.mark.parametrize(
    "gate", [lambda x, A: x, lambda x, A: 1 - 2 * torch.sigmoid(x), lambda x, A: torch.tanh(x)]
)
def test_decay_that_may_be_negative_has_no_log(gate):
    decay, _ = decay_of(gate)
    assert decay.log is None


def test_decay_of_exactly_zero_is_legal():
    masked, _ = decay_of(lambda x, A: (x > 0).to(x.dtype))
    assert masked.log is not None
    assert masked.log.op == "where"
    assert masked.log.args[2]["value"] == -INF


@settings(max_examples=50, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0.1, 3))
def test_ranges_contain_the_values(x, a, width):
    """Interval arithmetic never excludes a value that occurs."""
    bounds = [Bound("x", x - width, x + width), Bound("A", a - width, a + width)]
    axes = [torch.linspace(b.low, b.high, 9, dtype=torch.float64) for b in bounds]
    grid = torch.meshgrid(*axes, indexing="ij")
    for (gate, _), factor in zip(GATES, gate_factors(), strict=True):
        low, high = interval(factor, bounds)
        values = gate(*grid)
        assert low - 1e-9 <= values.min().item()
        assert values.max().item() <= high + 1e-9


@cache
def gate_factors():
    return [decay_of(gate)[0].factor for gate, _ in GATES]
