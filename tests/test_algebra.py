"""The normal form and its way back: a polynomial has its expression's value, and so has what is emitted from it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from random_expressions import INPUTS, expressions, value_of

from lmoe_compiler.analysis.emit import Emitter
from lmoe_compiler.analysis.evaluate import Evaluator
from lmoe_compiler.ir.nodes import Node


class NoReads:
    def __call__(self, state, version, vector, axis):
        raise AssertionError("there are no states here")

    def is_last(self, state, version):
        return True


def emitted(node: Node) -> Node:
    evaluator = Evaluator((), {})
    p = evaluator.polynomial(node)
    return Emitter(INPUTS, (), evaluator.opaque_nodes, NoReads()).node(p)


@settings(max_examples=300, deadline=None)
@given(expressions())
def test_emitted_expression_has_the_same_value(node):
    again = emitted(node)
    assert set(again.axes) <= set(node.axes)
    axes = tuple(sorted(node.axes))
    expected, found = value_of(node, axes), value_of(again, axes)
    known = expected.isfinite()
    torch.testing.assert_close(found[known], expected[known], rtol=1e-8, atol=1e-8)


@settings(max_examples=100, deadline=None)
@given(expressions(depth=3))
def test_emission_is_canonical(node):
    once = emitted(node)
    evaluator = Evaluator((), {})
    assert evaluator.polynomial(once).key == evaluator.polynomial(node).key
    assert emitted(once) == once
