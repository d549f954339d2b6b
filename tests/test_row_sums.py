"""Gradients of numbers taken apart into what scans leave (row_sums.py), and where parts of spans lie in memory."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.extent import shape_of
from lmoe_compiler.codegen.inner_products import InnerProduct, inner_product
from lmoe_compiler.codegen.launcher import Launcher
from lmoe_compiler.codegen.plan import Carry
from lmoe_compiler.codegen.row_sums import RowSums
from lmoe_compiler.codegen.tile import Builder
from lmoe_compiler.codegen.triton import KernelPrinter, function_name
from lmoe_compiler.ir.nodes import Node, input_
from lmoe_compiler.models import RECURRENCES

S, D, X = input_("S", ("K", "V")), input_("d.S", ("K", "V")), input_("x", ("t",))
CARRIED = {n: frozenset({n.name}) for n in (S, D)}


def sums(build: Builder, *products: InnerProduct) -> RowSums:
    return RowSums(build, [], {}, dict(CARRIED), products)


def number(build: Builder, state: Node) -> Node:
    """A number that a state is summed up to, for each row."""
    total = build.make("sum", build.make("sum", state, axis="K"), axis="V")
    return build.make("mul", total, X)


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_a_choice_is_linear_where_it_is_against_zero(other):
    build = Builder()
    moving, condition = number(build, S), build.make("ge", X, build.const(0.0))
    chosen = build.make("where", condition, moving, build.const(other))
    ((sign, steps, term),) = sums(build).terms(chosen, 1, ())
    assert sign == 1
    assert (term == chosen) == (other != 0.0)
    assert [op for op, _, _ in steps] == ([] if other else ["mul", "where"])


def test_an_inner_product_is_known_with_its_factor_only():
    build = Builder()
    inner, f = build.make("mul", S, D), input_("f")
    past = input_("past")
    product = InnerProduct(inner, input_("P"), input_("E"), past, f, (X, X))
    total = build.make("sum", build.make("sum", inner, axis="K"), axis="V")
    wanted = {f: past, X: None, build.make("mul", f, f): build.product([f, past])}
    for factor, expected in wanted.items():
        term = build.make("mul", total, factor)
        ((_, steps, found),) = sums(build, product).terms(term, 1, ())
        for _, operands, _ in steps:
            found = build.product([found, *(x for x in operands if x is not None)])
        assert found == (term if expected is None else expected)


def scans(build: Builder, **changes: Node) -> tuple[Carry, Carry]:
    """S' = f S + k^T y and d.S = f d.S' + q^T do, with other nodes in the place of those named."""
    k, q, y, do = (
        input_(n, ("t", a)) for n, a in (("k", "K"), ("q", "K"), ("y", "V"), ("do", "V"))
    )
    f = input_("f")
    nodes = {
        "scaled": build.make("mul", f, S),
        "written": build.make("dot", k, y, axis="t"),
        "scaled_back": build.make("mul", f, D),
        "read": build.make("dot", q, do, axis="t"),
    } | changes
    following = build.make("add", nodes["scaled"], nodes["written"])
    back = build.make("add", nodes["scaled_back"], nodes["read"])
    return Carry(S, following, S.axes, None, None), Carry(D, back, D.axes, None, None)


def test_an_inner_product_is_carried_by_numbers():
    build = Builder()
    found = inner_product(build, *scans(build))
    assert found is not None
    assert (found.node, found.factor) == (build.make("mul", S, D), input_("f"))
    assert [rows.axes for rows in found.of_rows] == [("t",), ("t",)]


def test_what_is_no_number_carries_no_inner_product():
    """Decays that are vectors, negative or other ones backward; what is written or read otherwise than over rows."""
    build = Builder()
    vector, other = (build.make("mul", input_("g", axes), S) for axes in (("K",), ()))
    vector_back = build.make("mul", input_("g", ("K",)), D)
    scaled_rows = build.make("mul", input_("f"), input_("k", ("t", "K")))
    changes = {
        "vector": {"scaled": vector, "scaled_back": vector_back},
        "scaled rows": {"written": build.make("dot", scaled_rows, input_("y", ("t", "V")), axis="t")},
        "another": {"scaled": other},
        "negative": {"scaled": build.make("neg", build.make("mul", input_("f"), S))},
        "not scaled": {"scaled": S},
        "not a product": {"written": input_("u", ("K", "V"))},
        "over values": {"read": build.make("dot", input_("w", ("K", "M")), input_("z", ("M", "V")), axis="M")},
        "of keys": {"read": build.make("mul", input_("w", ("K",)), input_("z", ("K", "V")))},
    }  # fmt: skip
    for name, change in changes.items():
        assert inner_product(build, *scans(build, **change)) is None, name


@pytest.mark.parametrize("shape", [(2, 1300, 3, 128), (1, 9000, 2, 128)])
def test_parts_of_spans_lie_in_their_tensor(shape):
    """The last address of the last part; a call of 9000 tokens goes in sections."""
    request = request_of(RECURRENCES["gated_delta_rule"].program(), "backward", shape)
    plan = request.plan(request.choice())
    kernel = next(k for k in plan.kernels if k.name == "adjoint_keys")
    (end,) = kernel.ends
    assert end.value.parts == 2
    printer = KernelPrinter(plan, kernel)
    text = "\n".join(printer.print(function_name(plan, kernel)))
    (address,) = re.findall(r"tl.store\(S_product \+ (.*), \(b_", text)
    batch, length, heads, _ = shape
    tokens = min(length, plan.choice.section or length)
    extent = SimpleNamespace(**vars(request.extent) | {"length": tokens})
    extent.slots = lambda size: batch * -(-tokens // size)
    numbers = {
        "TOKENS": batch * tokens, "T": tokens, "H": heads, "i_K": 1, "i_h": heads - 1,
        "i_n": batch - 1, "i_s": -(-tokens // 512) - 1,
        "tl": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
    }  # fmt: skip
    last = eval(address.replace(".to(tl.int64)", ""), numbers)
    parts, slots, own = shape_of(end.value, plan, extent, kernel)
    assert last == parts * slots * own - 1


def test_no_more_registers_than_a_plan_says():
    request = request_of(RECURRENCES["delta_rule"].program(), "backward", (2, 16384, 16, 128))
    plan = request.plan(request.choice())
    for kernel in plan.kernels:
        module = SimpleNamespace(**{function_name(plan, kernel): None})
        options = Launcher(plan, kernel, module, KernelPrinter(plan, kernel)).options
        assert options.get("maxnreg") == (168 if kernel.name == "products" else None)


def test_values_between_kernels_are_of_one_section():
    """Only what a caller gives or gets is of the whole call."""
    for name in ("gated_delta_rule", "simple_gla"):
        request = request_of(RECURRENCES[name].program(), "backward", (2, 16384, 16, 128))
        plan = request.plan(request.choice())
        assert plan.passed
        for kernel in plan.kernels:
            assert all(v.name in request.results for v in kernel.written if v.whole)
