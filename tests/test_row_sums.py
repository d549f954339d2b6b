"""Gradients of numbers taken apart into what scans leave (row_sums.py), and where parts of spans lie in memory."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.extent import shape_of
from lmoe_compiler.codegen.gradient_scans import Scans
from lmoe_compiler.codegen.inner_products import InnerProduct, followed, inner_product, mean
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
    return RowSums(build, Scans([], {}, dict(CARRIED)), products)


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
    product = InnerProduct(S, D, inner, past, f, (X, X))
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


def value(node: Node, known: dict[Node, np.ndarray | np.float32]) -> np.float32:
    """What operations in fp32 make of numbers and rows."""
    if node in known:
        return known[node]
    if node.op == "const":
        return np.float32(node["value"])
    operations = {"sub": np.subtract, "div": np.divide, "neg": np.negative, "where": np.where}
    operations |= {"add": np.add, "mul": np.multiply, "ge": np.greater_equal}
    operations |= {"minimum": np.minimum, "sum": np.sum}
    return operations[node.op](*(value(a, known) for a in node.args))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((3.0, 4.0), (1.0, 1.0), 1.4),
        ((3.0, 1.0), (1.0, 4.0), 2.6),
        ((3.0, 0.0), (1.0, 0.0), 1.0),
        ((3.0, 0.0), (1.0, 4.0), 3.0),
        ((1e15, 1e20), (1.0, 0.0), 1.0),
        ((1.0, 0.0), (1e8, 1e20), 1.0),
        ((1.0, 1e-8), (5.0, math.inf), 1.0),
        ((5.0, math.inf), (1.0, 1e-8), 1.0),
        ((0.6, 1.0), (0.7, 1.0), 0.0),
        ((0.8, 1.0), (0.7, 1.0), 0.75),
        ((-0.8, 1.0), (-0.7, 1.0), -0.75),
    ],
)
def test_the_mean_of_two_estimates(one, other, expected):
    """By the squares of their errors, of which one of 1 in two leaves 1 / 2; nothing where that is more."""
    leaves = [[input_(name) for name in pair] for pair in (("x", "x_error"), ("y", "y_error"))]
    node = mean(Builder(), *(tuple(pair) for pair in leaves))
    numbers = [np.float32(x) for x in (*one, *other)]
    known = dict(zip([x for pair in leaves for x in pair], numbers, strict=True))
    assert value(node, known) == pytest.approx(expected)


@pytest.mark.parametrize(("read", "written"), [(0.0, 3.0), (3.0, 0.0), (3.0, 4.0)])
@pytest.mark.parametrize("factor", [0.5, 1e-8])
def test_an_inner_product_through_a_chunk(read, written, factor):
    """From either end: less what comes first, more what comes then, with errors of both; behind a reset only then."""
    build = Builder()
    product = inner_product(build, *scans(build))
    assert product is not None
    rows = [input_(n, ("t",)) for n in ("read", "written")]
    found = followed(build, product, *rows, "bf16", 512)
    for way, first, then in (
        (found.from_entry, read, written),
        (found.from_exit, written, read),
    ):
        known = {
            row: np.full(4, x, np.float32) for row, x in zip(rows, (read, written), strict=True)
        }
        known |= {product.factor: np.float32(factor)}
        known |= {way.number.leaf: np.float32(20.0), way.error.leaf: np.float32(1.0)}
        past, error = (20 - 4 * first, 1 + 4 * (first * 2**-8) ** 2) if factor > 1e-7 else (0, 0)
        after, after_error = past + 4 * then, error + 4 * (then * 2**-8) ** 2
        nodes = [*way.past, way.number.following, way.error.following]
        assert [value(n, known) for n in nodes] == pytest.approx([past, error, after, after_error])


def test_what_is_known_and_what_nobody_has_are_two_values():
    """Both enter alike, but one of them can be left to a later kernel, and would take the other with it."""
    build = Builder()
    read = build.make("dot", S, input_("v", ("t", "V")), axis="V")
    read = build.make("sum", build.make("mul", input_("k", ("t", "K")), read), axis="K")
    root = build.make("add", X, read)
    assert len(sums(build).alike([root])) == 2


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
    # In sections the product where a span ends too: the next span may be of another section.
    names = ["S_entry_sum", "S_exit_sum"] if plan.passed else ["S_entry_sum"]
    assert [(end.value.name, end.value.parts) for end in kernel.ends] == [(n, 2) for n in names]
    printer = KernelPrinter(plan, kernel)
    text = "\n".join(printer.print(function_name(plan, kernel)))
    batch, length, heads, _ = shape
    tokens = min(length, plan.choice.section or length)
    extent = SimpleNamespace(**vars(request.extent) | {"length": tokens})
    extent.slots = lambda size: batch * -(-tokens // size)
    numbers = {
        "TOKENS": batch * tokens, "T": tokens, "H": heads, "i_K": 1, "i_h": heads - 1,
        "i_n": batch - 1, "i_s": -(-tokens // 512) - 1,
        "tl": SimpleNamespace(cdiv=lambda a, b: -(-a // b)),
    }  # fmt: skip
    for end in kernel.ends:
        (address,) = re.findall(rf"tl.store\({end.value.name} \+ (.*), \(b_", text)
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
