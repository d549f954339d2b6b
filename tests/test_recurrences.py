"""The definitions in models/: short, documented, and special cases of one another."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, make_inputs
from differentiated import differentiated
from torch import Tensor

from lmoe_compiler.ir.text import print_program
from lmoe_compiler.models import RECURRENCES

BY_NAME = {case.name: case for case in CASES}


def test_every_recurrence_is_in_the_table_of_cases():
    assert set(BY_NAME) == set(RECURRENCES)
    assert all(recurrence.name == name for name, recurrence in RECURRENCES.items())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition_is_short_and_says_where_it_is_from(case):
    source = textwrap.dedent(inspect.getsource(case.recurrence.definition))
    (function,) = ast.parse(source).body
    doc, *body = function.body
    lines = {line for s in body for line in range(s.lineno, s.end_lineno + 1)}
    lines -= {n for n, text in enumerate(source.splitlines(), 1) if not text.strip()}
    assert len(lines) <= 12
    said = ast.get_docstring(function)
    assert re.search(r"arXiv \d{4}\.\d{5}, (eq\.|section|\d)", said)
    assert "<-" in said
    assert "[B, T, H" in said or "State" in said or "[H]" in said
    assert isinstance(doc, ast.Expr)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition_is_the_step(case):
    """Called as it stands on one token of one head, the body is what the sequence op does there."""
    inputs, states = make_inputs(case)
    one = [
        x[0, 0, 1] if var.kind == "token" else x[1]
        for var, x in zip(case.recurrence.ir.inputs, inputs.values(), strict=True)
    ]
    *_, expected = case.recurrence.definition(*(x[0, 1] for x in states), *one)
    start = states[0] if len(states) == 1 else tuple(states)
    actual = case.recurrence(*inputs.values(), initial_state=start)[0, 0, 1]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def gla_of_hgrn2(q, f, v):
    return q, 1 - torch.sigmoid(f), v, F.logsigmoid(f)


def simple_gla_of_mamba2(q, k, v, dt, A_log, dt_bias, D):
    dt = F.softplus(dt + dt_bias)
    return q, k, dt[..., None] * v, -A_log.exp() * dt


def every_key(g: Tensor, q: Tensor) -> Tensor:
    return g[..., None].expand(q.shape)


# (special, general, the general's inputs from the special's)
SPECIAL_CASES = {
    "retention is simple_gla": (
        "retention",
        "simple_gla",
        lambda q, k, v, gamma: (q, k, v, gamma.log().expand(q.shape[:3])),
    ),
    "linear_attention is retention": (
        "linear_attention",
        "retention",
        lambda q, k, v: (q, k, v, q.new_ones(q.shape[2])),
    ),
    "simple_gla is gla": (
        "simple_gla",
        "gla",
        lambda q, k, v, g: (q, k, v, every_key(g, q)),
    ),
    "hgrn2 is gla": ("hgrn2", "gla", gla_of_hgrn2),
    "delta_rule is gated_delta_rule": (
        "delta_rule",
        "gated_delta_rule",
        lambda q, k, v, beta: (q, k, v, 0 * beta, beta),
    ),
    "gated_delta_rule is kda": (
        "gated_delta_rule",
        "kda",
        lambda q, k, v, g, beta: (q, k, v, every_key(g, q), beta),
    ),
    "ttt_linear is delta_rule": ("ttt_linear", "delta_rule", lambda *inputs: inputs),
}


@pytest.mark.parametrize(
    ("special", "general", "translate"), SPECIAL_CASES.values(), ids=SPECIAL_CASES
)
def test_one_is_a_special_case_of_the_other(special, general, translate):
    """Different kinds of transition, hence different chunk programs, of one function."""

    def through_general(*inputs, **options):
        return RECURRENCES[general](*translate(*inputs), **options)

    inputs, states = make_inputs(BY_NAME[special])
    expected = differentiated(through_general, inputs, states)
    actual = differentiated(RECURRENCES[special], inputs, states)
    for name, x in actual.tensors().items():
        torch.testing.assert_close(x, expected.tensors()[name], rtol=1e-9, atol=1e-10, msg=name)


def test_mamba2_is_simple_gla_with_a_skip():
    inputs, states = make_inputs(BY_NAME["mamba2"])
    (start,) = states
    expected = (
        RECURRENCES["simple_gla"](*simple_gla_of_mamba2(**inputs), initial_state=start)
        + inputs["D"][:, None] * inputs["v"]
    )
    actual = RECURRENCES["mamba2"](*inputs.values(), initial_state=start)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_gradient_step_is_proved_to_be_the_delta_rule():
    """Not only equal numbers: the analysis writes the same body, so it gets the same kernels."""
    ttt, delta = (
        print_program(RECURRENCES[name].ir, lines=False) for name in ("ttt_linear", "delta_rule")
    )
    assert ttt == delta.replace("delta_rule", "ttt_linear").replace("beta", "eta")


def test_delta_rule_recalls_what_it_was_told():
    """With beta = 1 and keys of length one, reading with the key just written gives its value."""
    inputs, states = make_inputs(BY_NAME["delta_rule"])
    k, v = inputs["k"], inputs["v"]
    beta = torch.ones_like(inputs["beta"])
    o = RECURRENCES["delta_rule"](k, k, v, beta, initial_state=states[0])
    torch.testing.assert_close(o, v, rtol=1e-10, atol=1e-11)


def test_normalised_attention_is_an_average():
    """Constant values come back as they are, whatever the keys and queries."""
    inputs, _ = make_inputs(BY_NAME["normalised_linear_attention"])
    v = torch.full_like(inputs["v"], 3.0)
    o = RECURRENCES["normalised_linear_attention"](inputs["q"], inputs["k"], v)
    torch.testing.assert_close(o, v, rtol=1e-8, atol=0)


def test_slstm_stays_in_range_for_huge_gates():
    """Exponential input gates of exp(80) overflow float32 without the stabiliser."""
    inputs, _ = make_inputs(BY_NAME["slstm"], dtype=torch.float32)
    inputs["i"] = 80 * inputs["i"].sign()
    o = RECURRENCES["slstm"](*inputs.values())
    assert o.isfinite().all()
    assert o.abs().max() <= 1
