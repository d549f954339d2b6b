"""The recurrence IR: text and back, what verify refuses, and the interpreter against the step itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import ROWS
from random_expressions import INPUTS, expressions

import lmoe_compiler as lmoe
from lmoe_compiler.errors import InvalidProgram
from lmoe_compiler.ir import interpret
from lmoe_compiler.ir.nodes import (
    Bound,
    Decay,
    Feedback,
    Loc,
    Next,
    Program,
    Read,
    Step,
    Var,
    Write,
    make,
    substitute,
    topological,
)
from lmoe_compiler.ir.parse import parse
from lmoe_compiler.ir.spec import base, verify
from lmoe_compiler.ir.text import print_program

S = Var("S", "state", ("K", "V"))
READS = (Read("r", "S", INPUTS[0].node, ("V",)), Read("all", "S", None, ("K", "V")))
LINES = st.sampled_from((None, Loc("a file.py", 3), Loc("/x/b.py", 120)))
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def decays(draw):
    log = draw(expressions(depth=2))
    factor = draw(st.sampled_from((make("exp", log), make("sigmoid", log))))
    return Decay(factor, draw(st.sampled_from((log, None))), draw(LINES))


@st.composite
def feedbacks(draw):
    key, scale, read = (draw(expressions(depth=2)) for _ in range(3))
    return Feedback(key, scale, read, draw(st.sampled_from(("before", "after"))), draw(LINES))


@st.composite
def writes(draw):
    return Write(draw(expressions(depth=2)), draw(expressions(depth=2)), draw(LINES))


@st.composite
def items(draw):
    if draw(st.booleans()):
        some = {"max_size": 2}
        lists = (draw(st.lists(strategy(), **some)) for strategy in (decays, feedbacks, writes))
        return Step("S", *map(tuple, lists))
    kind = draw(st.sampled_from(("coupled", "elementwise", "nonlinear")))
    reason = draw(st.sampled_from(("", "b[V] makes it differ: no shared solve")))
    return Next(("S",), (draw(expressions(depth=3)),), kind, reason, draw(LINES))


@st.composite
def programs(draw):
    """Any body at all: what the text must carry is more than what a verified program may hold."""
    body = draw(st.lists(items(), max_size=3))
    bounds = (Bound("g", draw(NUMBERS), draw(NUMBERS)),) if draw(st.booleans()) else ()
    static = (("N", 3),) if draw(st.booleans()) else ()
    output = make("add", draw(expressions(depth=3)), READS[0].node)
    return Program("random", (S,), INPUTS, (*body, *READS), output, bounds, static)


@settings(max_examples=150, deadline=None)
@given(programs(), st.booleans())
def test_text_parses_back(program, lines):
    assert parse(print_program(program, lines)) == program


@settings(max_examples=30, deadline=None)
@given(programs())
def test_text_carries_the_users_lines(program):
    again = parse(print_program(program))
    for item, other in zip(program.body, again.body, strict=True):
        if isinstance(item, Step):
            for part, twin in zip(
                item.decays + item.writes, other.decays + other.writes, strict=True
            ):
                assert (part.loc is None) == (twin.loc is None)
                assert part.loc is None or (part.loc.file, part.loc.line) == (
                    twin.loc.file,
                    twin.loc.line,
                )


@pytest.mark.parametrize("name", ROWS)
def test_proved_programs_parse_back_and_hold(name):
    program = ROWS[name].recurrence.ir
    assert parse(str(program)) == program
    argument = ROWS[name].recurrence.text(**dict(program.static))
    assert "\n" not in argument, "Inductor prints arguments of ops into comments of one line"
    assert parse(argument) == program
    assert verify(program) is program
    assert lmoe.parse(str(program)).transition.kind == ROWS[name].kind


def test_equality_ignores_lines_and_shares_nothing_by_name():
    x, y = (make("exp", INPUTS[3].node, loc=loc) for loc in (None, Loc("a.py", 1)))
    assert x == y
    assert hash(x) == hash(y)
    assert x != make("exp", INPUTS[0].node)


def test_substitute_rebuilds_what_changes_only():
    g, q = INPUTS[3].node, INPUTS[0].node
    kept = make("exp", q)
    changed = substitute(make("mul", make("neg", g), kept), {g: q})
    assert changed == make("mul", make("neg", q), kept)
    assert any(node is kept for node in topological([changed]))


def inputs_for(recurrence, batch=2, length=5, heads=2):
    sizes = {"K": 3, "V": 4, "M": 5, "N": 2}
    random = torch.Generator().manual_seed(0)
    tensors = []
    for var in recurrence.inputs:
        lead = [batch, length, heads] if var.kind == "token" else [heads]
        shape = lead + [sizes[base(a)] for a in var.axes]
        tensors.append(0.5 * torch.randn(shape, dtype=torch.float64, generator=random))
    return tensors


@pytest.mark.parametrize("name", ROWS)
def test_interpreter_is_the_step_token_by_token(name):
    r = ROWS[name].recurrence
    inputs = inputs_for(r)
    expected, states = r.reference(*inputs, return_state=True)
    output, finals = interpret.run(r.ir, inputs)
    torch.testing.assert_close(output, expected)
    states = [states] if len(r.states) == 1 else states
    for found, state in zip(finals, states, strict=True):
        torch.testing.assert_close(found, state)


@pytest.mark.parametrize("name", ["gated_delta", "normalised", "recurrent_gate"])
def test_interpreter_packs_documents_and_carries_states(name):
    r = ROWS[name].recurrence
    inputs = inputs_for(r, batch=1, length=7)
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    packed, finals = interpret.run(r.ir, inputs, cu_seqlens=offsets)
    tokens = [v.kind == "token" for v in r.inputs]
    for i, (start, stop) in enumerate([(0, 3), (3, 3), (3, 7)]):
        part = [x[:, start:stop] if t else x for x, t in zip(inputs, tokens, strict=True)]
        alone, states = interpret.run(r.ir, part)
        torch.testing.assert_close(packed[:, start:stop], alone)
        for final, state in zip(finals, states, strict=True):
            torch.testing.assert_close(final[i : i + 1], state)
    half = [[x[:, s] if t else x for x, t in zip(inputs, tokens, strict=True)]
            for s in (slice(0, 4), slice(4, 7))]  # fmt: skip
    first, states = interpret.run(r.ir, half[0])
    second, last = interpret.run(r.ir, half[1], states)
    whole, finals = interpret.run(r.ir, inputs)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(last, finals)


VALID = """recurrence r
  state S[K, V]
  token q[K] k[K] v[V] g
  step S
    decay log g
    update k (x) -g * (k' S) before
    update k (x) v
  read o[V] = q' S
  output o
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("decay log g", "decay log missing{}"),
        ("(x) -g *", "(x) -v *"),
        ("(k' S)", "(v' S)"),
        ("read o[V]", "read o[K]"),
        ("output o", "output S"),
        ("q[K] k[K]", "q[K] k[K] q2[J, J]"),
    ],
)
def test_verify_refuses(old, new):
    assert verify(parse(VALID))
    with pytest.raises(InvalidProgram):
        verify(parse(VALID.replace(old, new)))
