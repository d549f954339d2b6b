"""Recurrences that nobody would write: the program that is proved does what the expressions do."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_expressions import INPUTS, STATES, environment, expressions, value_of

from lmoe_compiler.analysis import analyse, evaluate
from lmoe_compiler.ir.interpret import run_token
from lmoe_compiler.ir.nodes import Node, Program, Var, make
from lmoe_compiler.ir.parse import parse
from lmoe_compiler.ir.spec import base, verify
from lmoe_compiler.trace import Traced

EVERYTHING = (*INPUTS, *STATES)


def fitted(node: Node, axes: tuple[str, ...]) -> Node:
    """`node` without axes outside `axes`."""
    for axis in node.axes:
        if axis not in axes:
            node = make("sum", node, axis=axis)
    return node


@st.composite
def linear_in(draw, state: Var):
    """decay * S + key (read' S) + write, with coefficients of any shape that fits, spelled in two ways."""
    coefficient = expressions(depth=2)
    S, K = state.node, state.axes[0]
    decay, key, read, write = (fitted(draw(coefficient), state.axes) for _ in range(4))
    key, read = fitted(key, (K,)), fitted(read, (K,))
    if K not in read.axes:
        read = make("mul", read, INPUTS[1].node)
    decayed = make("mul", decay, S)
    seen = draw(st.sampled_from((S, decayed)))
    feedback = make("mul", key, make("dot", read, seen, axis=K))
    parts = draw(st.permutations([decayed, feedback, write]))[: draw(st.integers(1, 3))]
    node = parts[0]
    for part in parts[1:]:
        node = make("add", node, part)
    return node


@st.composite
def steps(draw):
    values = []
    for state in STATES:
        if draw(st.booleans()):
            node = draw(linear_in(state))
        else:
            node = draw(expressions(depth=3, variables=EVERYTHING))
        values.append(fitted(node, state.axes))
    output = draw(expressions(depth=2, variables=EVERYTHING))
    later = draw(st.sampled_from((*values, STATES[0].node)))
    output = fitted(make("add", output, make("mul", INPUTS[1].node, later)), ("K", "V"))
    axes = tuple(a for a in ("K", "V") if a in output.axes)
    return Traced("r", STATES, INPUTS, (), tuple(values), output, axes, lambda *_: None)


@settings(max_examples=150, deadline=None)
@given(steps())
def test_program_has_the_steps_values(traced):
    agrees(traced, analyse(traced, ()))


def agrees(traced: Traced, program: Program) -> None:
    assert verify(program) is program
    assert parse(str(program)) == program
    env = environment(EVERYTHING)
    inputs = {v.name: env[v.node] for v in INPUTS}
    states = {v.name: env[v.node] for v in STATES}
    output, new = run_token(program, inputs, states)
    nodes = [*traced.next_states, traced.output]
    found = [new[v.name] for v in STATES] + [output]
    for node, value in zip(nodes, found, strict=True):
        axes = tuple(sorted(set(node.axes) | set(value.axes)))
        expected = value_of(node, axes)
        known = expected.isfinite()
        x = value.to(axes).expand(expected.shape)
        torch.testing.assert_close(x[known], expected[known], rtol=1e-8, atol=1e-8)
    assert all(base(a) in ("K", "V") for a in program.output.axes)


@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
@pytest.mark.parametrize("other", [make("size", axis="K"), INPUTS[0].node, INPUTS[3].node])
def test_what_a_function_turns_into_is_summed_as_it_was(function, other):
    """1 - sigmoid(-x) is sigmoid(x), and the 1 is summed over the values as sigmoid is."""
    S, q = STATES[0].node, INPUTS[0].node
    total = make("sum", make("sigmoid", make(function, make("sub", S, other))), axis="V")
    traced = Traced("r", STATES, INPUTS, (), (q, total), q, ("K",), lambda *_: None)
    agrees(traced, analyse(traced, ()))


def test_a_maximum_of_readouts_reads_the_whole_state():
    """Its axis is none of the step's: no vector has it."""
    q, W = INPUTS[0].node, INPUTS[4].node
    readout = make("dot", STATES[1].node, W, axis="K")
    largest = make("max", make("mul", readout, q), axis="V")
    traced = Traced("r", STATES, INPUTS, (), (largest, q), q, ("K",), lambda *_: None)
    agrees(traced, analyse(traced, ()))


def test_what_is_the_same_along_an_axis_has_it_no_more():
    """A sum of many terms is used as it is written, but not with an axis that its value is free of."""
    d = make("delta", a="K", b="K'")
    terms = make("add", make("exp", make("tanh", d)), make("const", value=0.5))
    diagonal = make("dot", d, make("pow", terms, make("const", value=2.0)), axis="K")
    q = INPUTS[0].node
    total = make("sum", make("exp", diagonal), axis="K'")
    traced = Traced("r", STATES, INPUTS, (), (q, total), q, ("K",), lambda *_: None)
    agrees(traced, analyse(traced, ()))


def test_a_value_too_large_keeps_the_order_of_its_axes():
    """It is expressed by reads, with its axes in another order than it was written with."""
    S, q, v, A = STATES[0].node, INPUTS[0].node, INPUTS[2].node, INPUTS[5].node
    number = make("sin", make("sum", v, axis="V"))
    renamed = make("rename", S, old="V", new="V'")
    large = make("add", number, make("add", renamed, make("sum", A, axis="K")))
    total = make("sum", make("sum", large, axis="V'"), axis="K'")
    traced = Traced("r", STATES, INPUTS, (), (q, total), q, ("K",), lambda *_: None)
    with mock.patch.object(evaluate, "MOST_MONOMIALS", 2):
        agrees(traced, analyse(traced, ()))


def test_a_value_too_large_that_mentions_a_state_for_nothing():
    """0 * S in it: it does not depend on the state, and is not expressed by what stands for it."""
    S, q, v, g = STATES[0].node, INPUTS[0].node, INPUTS[2].node, INPUTS[3].node
    nothing = make("mul", make("const", value=0.0), S)
    large = make("add", make("add", make("sin", v), g), make("add", q, nothing))
    traced = Traced("r", STATES, INPUTS, (), (q, q), large, ("K", "V"), lambda *_: None)
    with mock.patch.object(evaluate, "MOST_MONOMIALS", 2):
        agrees(traced, analyse(traced, ()))


@settings(max_examples=60, deadline=None)
@given(steps())
def test_values_too_large_to_expand_are_used_as_written(traced):
    with mock.patch.object(evaluate, "MOST_MONOMIALS", 2):
        agrees(traced, analyse(traced, ()))
