"""Generated Triton kernels in Triton's interpreter against the reference; run by test_codegen.py.

Not collected with the other tests: TRITON_INTERPRET must be set before triton is imported, and then holds for the
process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import programs
import pytest
import torch
from cases import CASES, Case, Sizes, make_inputs
from differentiated import Result, as_argument, as_list, differentiated, scan
from scopes import out_of_scope

from lmoe_compiler import interpreted
from lmoe_compiler.codegen import compiled, launch, run, tuned
from lmoe_compiler.codegen import plan as plans
from lmoe_compiler.codegen.extent import Extent
from lmoe_compiler.codegen.plan import Choice, Tuning
from lmoe_compiler.codegen.prepared import Prepared
from lmoe_compiler.config import Options

# Rows past the end divide zero by zero before they are masked; numpy says so, a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = 2e-5  # fp32 arithmetic against float64
BY_NAME = {case.name: case for case in CASES}
CHUNKED = (
    "linear_attention",
    "normalised_linear_attention",
    "retention",
    "simple_gla",
    "mamba2",
    "gla",
)
CHUNKED += ("hgrn2", "delta_rule", "gated_delta_rule", "kda", "rwkv7", "ttt_linear")
ONE_OF_EACH = ("simple_gla", "gla", "gated_delta_rule", "kda")

SCAN = Tuning(block=16, num_stages=2, offsets=True)
WHOLE = Choice(chunk=16, default=SCAN)
PREPARED = replace(WHOLE, prepare=True, prepare_rows=True)
PLANS = {
    "whole": WHOLE,
    "prepared": PREPARED,
    "spans": replace(PREPARED, span=32),
    "sections": replace(PREPARED, section=32),
    "spans and sections": replace(PREPARED, span=32, section=64),
    "sections side by side": replace(PREPARED, section=32, overlap=True),
    "tiles": replace(PREPARED, kernels=(("gradients", Tuning(block=16)),)),
    "inner": replace(
        PREPARED, kernels=(("prepare", Tuning(0, inner=16)), ("gradients", Tuning(0, inner=16)))
    ),
    "products": replace(PREPARED, products=True, kernels=(("products", Tuning(block=16)),)),
    "products in sections": replace(
        PREPARED,
        products=True,
        section=32,
        overlap=True,
        kernels=(("products", Tuning(block=16)),),
    ),
}
RECOMPUTED = replace(PREPARED, recompute=True)
RECOMPUTED_WITH_PRODUCTS = replace(RECOMPUTED, products=True)
RECOMPUTED_IN_SPANS = replace(WHOLE, recompute=True, span=32)
RECOMPUTED_IN_MATRICES = replace(RECOMPUTED, span=32)


@pytest.fixture(autouse=True)
def names_are_in_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every generated module: the interpreter would not see it."""
    right = launch.print_module

    def checked(*args: Any) -> Any:
        text, printers = right(*args)
        assert not out_of_scope(text), text
        return text, printers

    monkeypatch.setattr(launch, "print_module", checked)


@pytest.fixture
def by_plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Choice], None]]:
    """Calls run by the choice that it is given, with states kept every 32 tokens."""

    def use(choice: Choice) -> None:
        monkeypatch.setattr(tuned, "lookup", lambda *_: choice)
        monkeypatch.setattr(plans, "KEPT_SPAN", 32)
        run.forget()

    yield use
    run.forget()


def single(sizes: Sizes, case: Case, **changes: torch.Tensor):
    """The same inputs twice: float64 for the reference, float32 for the kernels."""
    inputs, states = make_inputs(case, sizes)
    inputs = {name: changes.get(name, x).float().double() for name, x in inputs.items()}
    states = [x.float().double() for x in states]
    return (inputs, states), (
        {n: x.float() for n, x in inputs.items()},
        [x.float() for x in states],
    )


def assert_close(actual: Result, expected: Result) -> None:
    """Relative RMS of every output and gradient; a NaN is never close."""
    wanted = expected.tensors()
    for name, x in actual.tensors().items():
        error = (x.double() - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-20)
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"


def check(case: Case, sizes: Sizes, **options: object) -> None:
    exact, rounded = single(sizes, case)
    kernels = case.recurrence.with_options(implementation="triton", chunk_size=16)
    assert_close(
        differentiated(kernels, *rounded, **options),
        differentiated(case.recurrence.reference, *exact, **options),
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_every_variant(name):
    check(BY_NAME[name], Sizes(B=1, T=37, H=2, K=8, V=6))


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("delta_rule", {"span": 32}),
        ("gated_delta_rule", {"span": 32, "section": 64, "products": True}),
        ("kda", {"span": 32, "section": 64, "products": True}),
        ("rwkv7", {"span": 32}),
        ("ttt_linear", {"span": 32}),
    ],
)
def test_spans_of_states_whose_keys_mix(name, choice, by_plan):
    """Their maps are matrices, carried as the states are."""
    by_plan(replace(PREPARED, **choice))
    check(BY_NAME[name], Sizes(B=1, T=110, H=1, K=20, V=40))
    made = [e.plan for e in compiled._executables.values()]
    names = {k.name for plan in made for k in plan.kernels}
    assert {"spans_matrix", "adjoint_spans_matrix"} <= names


@pytest.mark.parametrize("name", ["gla", "rwkv7"])
def test_span_maps_of_ranks_are_cut_into_spans(name, by_plan):
    """What sequence parallelism exchanges, M and E, and their gradients: M is a state whose columns are keys."""
    by_plan(replace(PREPARED, span=32))
    case, span = BY_NAME[name], torch.ops.lmoe.span_map.default
    exact, rounded = (list(x.values()) for x, _ in single(Sizes(B=1, T=100, H=1, K=6, V=20), case))
    expected, actual = (
        span(case.recurrence.text(), [x.requires_grad_() for x in inputs], None, options)
        for inputs, options in (
            (exact, "implementation=torch"),
            (rounded, "implementation=triton"),
        )
    )
    weights = [torch.randn_like(x) for x in expected]
    wanted = torch.autograd.grad(expected, exact, weights, allow_unused=True)
    found = torch.autograd.grad(actual, rounded, [w.float() for w in weights], allow_unused=True)
    for x, y in zip((*actual, *found), (*expected, *wanted), strict=True):
        if y is None:
            assert x is None
        else:
            assert (x.double() - y).norm() <= TOLERANCE * y.norm()


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        (
            "written_by_reads",
            replace(PREPARED, span=32),
        ),  # one state's map knows nothing of the other
        ("delta_of_other_keys", RECOMPUTED_IN_MATRICES),
        ("delta_and_sum", RECOMPUTED_IN_MATRICES),
        (
            "delta_of_heads",
            RECOMPUTED_WITH_PRODUCTS,
        ),  # its parameter's gradient is a sum of numbers
        ("gated_delta", RECOMPUTED),
        ("scalar", RECOMPUTED_WITH_PRODUCTS),  # nothing is solved, but <S, d.S> is carried
        ("between", RECOMPUTED),
        ("two_feedbacks", RECOMPUTED_WITH_PRODUCTS),
        ("read_twice", RECOMPUTED_WITH_PRODUCTS),
        (
            "scaled_by_heads",
            RECOMPUTED_WITH_PRODUCTS,
        ),  # its vector's gradient needs states of chunks
    ],
)
def test_programs_by_other_plans(name, choice, by_plan):
    by_plan(choice)
    p, sizes = programs.program(name), {"K": 20, "V": 18, "M": 4}
    exact = programs.make_inputs(p, 1, 70, 1, sizes=sizes), programs.make_states(p, 1, 1, sizes)
    results = []
    for implementation, dtype in ((interpreted, torch.float64), (run, torch.float32)):
        inputs, states = ([x.float().to(dtype) for x in each] for each in exact)
        output, finals, saved = implementation.scan(p, inputs, states, None, Options())
        d_output, *d_finals = (
            programs.noise(f"d{x.shape}", x.shape, dtype) for x in (output, *finals)
        )
        grads = implementation.scan_backward(
            p, inputs, states, None, saved, d_output, d_finals, Options()
        )
        results.append([output, *finals, *grads[0], *grads[1]])
    for x, y in zip(*results, strict=True):
        assert (x - y).norm() <= TOLERANCE * x.norm()


def test_gradients_of_heads_in_parts_and_sections(by_plan):
    """Every section leaves the parts of its own chunks."""
    choice = replace(PREPARED, section=32, kernels=(("gradients", Tuning(block=16)),))
    by_plan(choice)
    check(BY_NAME["mamba2"], Sizes(B=2, T=70, H=1, K=40, V=20))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_delta_rule"])
def test_every_plan(name, plan, by_plan):
    """What is stored, recomputed, tiled or cut into spans changes nothing."""
    by_plan(PLANS[plan])
    check(BY_NAME[name], Sizes(B=1, T=70, H=1, K=40, V=20))


def latest_first(prepared: Prepared) -> Prepared:
    """The launches in another order that their graph allows: of those that may run always the last."""
    order: list[int] = []
    left = list(range(len(prepared.launches)))
    while left:
        free = [i for i in left if not set(prepared.launches[i].after) & set(left)]
        order.append(free[-1])
        left.remove(free[-1])
    return replace(prepared, launches=tuple(prepared.launches[i] for i in order))


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("simple_gla", "spans"),
        ("gla", "spans and sections"),
        ("gla", "sections side by side"),
        ("gated_delta_rule", "products in sections"),
        ("kda", "products in sections"),
    ],
)
def test_kernels_side_by_side_in_any_order(name, plan, by_plan, monkeypatch):
    """What a graph of kernels may run early or late changes nothing."""
    right, moved = launch.Executable.prepare, []

    def other(self: launch.Executable, extent: Extent) -> Prepared:
        prepared = right(self, extent)
        changed = latest_first(prepared)
        moved.append(changed.launches != prepared.launches)
        return changed

    by_plan(PLANS[plan])
    monkeypatch.setattr(launch.Executable, "prepare", other)
    check(BY_NAME[name], Sizes(B=1, T=150, H=1, K=16, V=20))
    assert any(moved)


@pytest.mark.parametrize("plan", ["sections side by side", "spans and sections"])
@pytest.mark.parametrize("name", ["retention", "gated_delta_rule"])
def test_the_last_section_starts_from_nothing(name, plan, by_plan, monkeypatch):
    """Without a gradient of the final state nothing is read of where the others' lies."""
    right = launch.allocate

    def poisoned(*args: Any) -> torch.Tensor:
        x = right(*args)
        return x.fill_(255 if x.dtype == torch.uint8 else float("nan"))

    by_plan(PLANS[plan])
    monkeypatch.setattr(launch, "allocate", poisoned)
    case = BY_NAME[name]
    (exact, _), (rounded, _) = single(Sizes(B=2, T=100, H=1, K=16, V=20), case)
    found = []
    for call, given in (
        (case.recurrence.reference, exact),
        (case.recurrence.with_options(implementation="triton"), rounded),
    ):
        leaves = [x.requires_grad_() for x in given.values()]
        o = call(*leaves)
        found.append([o, *torch.autograd.grad(o, leaves, o.detach())])
    for x, y in zip(*found, strict=True):
        assert (x - y).norm() < TOLERANCE * x.norm()


@pytest.mark.parametrize("name", ["kda", "rwkv7"])
def test_loops_over_keys(name, by_plan):
    """Pairs of decayed keys, and the norms of keys, are there before gradients of keys are computed tile by tile."""
    inner = replace(PLANS["inner"], products=True)
    by_plan(inner)
    check(BY_NAME[name], Sizes(B=1, T=40, H=1, K=40, V=20))
    (backward,) = (e.plan for e in compiled._executables.values() if e.plan.direction == "backward")
    assert next(k for k in backward.kernels if k.name == "gradients").inner == (("K", 16),)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("linear_attention", RECOMPUTED),
        ("linear_attention", RECOMPUTED_IN_SPANS),
        ("delta_rule", RECOMPUTED),
        ("delta_rule", replace(RECOMPUTED_WITH_PRODUCTS, span=32)),
        ("gated_delta_rule", RECOMPUTED),
        ("gated_delta_rule", replace(RECOMPUTED_WITH_PRODUCTS, span=32)),
        ("gated_delta_rule", replace(RECOMPUTED_WITH_PRODUCTS, section=32, overlap=True)),
        ("mamba2", replace(RECOMPUTED_WITH_PRODUCTS, span=32)),
        ("retention", RECOMPUTED),
        ("gla", RECOMPUTED),
    ],
)
def test_gradients_by_scans_of_their_own(name, choice, by_plan):
    """Nothing of chunks is stored; where a gradient of vectors needs two states at once, what it needs is."""
    by_plan(choice)
    check(BY_NAME[name], Sizes(B=2, T=70, H=1, K=40, V=20))
    made = compiled._executables.values()
    (backward,) = (e.plan for e in made if e.plan.direction == "backward")
    names = {k.name for k in backward.kernels}
    stored = [v for k in backward.kernels for v in k.written if v.per == "chunk" and v.axes]
    if name == "gla":
        assert stored
        assert not {"states_keys", "adjoint_keys"} & names
        return
    assert not stored
    assert {"states_keys", "adjoint_keys"} <= names
    solves, gates = "delta" in name, name in ("gated_delta_rule", "mamba2", "retention")
    assert ("adjoint_spans_matrix" in names) == (choice.span > 0 and solves)
    assert ("products" in names) == choice.products
    written = {k.name: {v.name for v in k.written} for k in backward.kernels}
    assert any("dS_kept" in values for values in written.values()) == (solves or gates)
    start = "dS_out" if choice.section else "dS_start"
    assert sum(start in values for values in written.values()) == 1
    assert "dq" in written["states_keys"]
    assert "dk" in written["adjoint_keys"]
    assert ("dk" in written["states_keys"]) == solves
    assert ("S_entry_sum" in written["adjoint_keys"]) == gates
    assert ("S_exit_sum" in written["adjoint_keys"]) == gates
    # The last state matters where a gradient of it is given.
    leave = [k for k, values in written.items() if "S_exit" in values]
    assert leave == (["states" if solves else "states_keys"] if gates else [])


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("simple_gla", "spans"),
        ("gla", "spans"),
        ("gated_delta_rule", "spans"),
        ("linear_attention", RECOMPUTED_IN_SPANS),
        ("delta_rule", RECOMPUTED_IN_MATRICES),
        ("gated_delta_rule", RECOMPUTED_WITH_PRODUCTS),
        ("retention", "products"),
        ("gated_delta_rule", "products"),
    ],
)
def test_packed_documents_by_other_plans(name, plan, by_plan):
    """Every document has spans of its own, scanned side by side in both directions, and slots for its chunks."""
    choice = PLANS[plan] if isinstance(plan, str) else plan
    by_plan(choice)
    case, ends = BY_NAME[name], torch.tensor([0, 40, 40, 41, 120], dtype=torch.int32)
    exact, rounded = single(Sizes(B=1, T=120, H=1, K=20, V=20), case)
    starts = [x.repeat(4, *(1,) * (x.dim() - 1)) for x in exact[1]]
    kernels = case.recurrence.with_options(implementation="triton")
    assert_close(
        differentiated(kernels, rounded[0], [x.float() for x in starts], cu_seqlens=ends),
        differentiated(case.recurrence.reference, exact[0], starts, cu_seqlens=ends),
    )


@pytest.mark.parametrize("T", [1, 16, 33])
def test_any_length(T):
    check(BY_NAME["gated_delta_rule"], Sizes(B=2, T=T, H=1, K=5, V=3))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_packed_documents(name):
    """Lengths 1, 20, 0 and 16: a document of one token, a ragged one, an empty one, a whole chunk."""
    case, ends = BY_NAME[name], torch.tensor([0, 1, 21, 21, 37], dtype=torch.int32)
    sizes = Sizes(B=1, T=37, H=1, K=8, V=6)
    exact, rounded = single(sizes, case)
    starts = [x.repeat(4, *(1,) * (x.dim() - 1)) for x in exact[1]]
    kernels = case.recurrence.with_options(implementation="triton", chunk_size=16)
    assert_close(
        differentiated(kernels, rounded[0], [x.float() for x in starts], cu_seqlens=ends),
        differentiated(case.recurrence.reference, exact[0], starts, cu_seqlens=ends),
    )


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_delta_rule"])
def test_resets_and_strong_decays(name):
    """Log decays of -inf, -1000 and -1e-4 side by side: exact, in every gradient."""
    case, sizes = BY_NAME[name], Sizes(B=1, T=40, H=1, K=8, V=6)
    g = make_inputs(case, sizes)[0]["g"]
    pattern = torch.tensor([-1e-4, -1000.0, -0.5, -float("inf"), -3.0], dtype=g.dtype)
    gates = pattern[torch.arange(g.numel()) % 5].reshape(g.shape)
    exact, rounded = single(sizes, case, g=gates)
    kernels = case.recurrence.with_options(implementation="triton", chunk_size=16)
    actual = differentiated(kernels, *rounded)
    expected = differentiated(case.recurrence.with_options(implementation="torch"), *exact)
    assert_close(actual, expected)


def gate_gradients(
    case: Case,
    sizes: Sizes,
    weight: torch.Tensor,
    ends: torch.Tensor | None = None,
    **changes: torch.Tensor,
) -> list[torch.Tensor]:
    """By the reference, and by kernels, of outputs with a weight for each token; documents have `ends`."""
    (exact, _), (rounded, _) = single(sizes, case, **changes)
    found = []
    for call, given in (
        (case.recurrence.reference, exact),
        (case.recurrence.with_options(implementation="triton"), rounded),
    ):
        o = call(*(x.requires_grad_() for x in given.values()), cu_seqlens=ends)
        weights = torch.linspace(1, 2, o.shape[-1], dtype=o.dtype) * weight[None, :, None, None]
        (dg,) = torch.autograd.grad(o, [given["g"]], weights.expand_as(o))
        found.append(dg.double())
    return found


def test_inner_products_are_carried_through_resets(by_plan, monkeypatch):
    """Behind a reset in the middle of a chunk nothing is left of sums a million times as large, nor of their errors."""
    by_plan(RECOMPUTED_WITH_PRODUCTS)
    monkeypatch.setattr(plans, "KEPT_SPAN", 256)
    case, sizes = BY_NAME["gated_delta_rule"], Sizes(B=1, T=256, H=1, K=8, V=6)
    v, after = make_inputs(case, sizes)[0]["v"], torch.arange(256) + 8
    large, reset = after // 64 % 2 == 0, after % 64 == 0
    v = v * torch.where(large, 1e6, 1.0)[None, :, None, None]
    gates = torch.where(reset, -40.0, -0.1).to(v.dtype)[None, :, None]
    found = gate_gradients(case, sizes, torch.ones(256), g=gates, v=v)
    expected, actual = (dg[:, ~large & ~reset] for dg in found)
    assert (actual - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule"])
@pytest.mark.parametrize(
    ("changes", "ends"),
    [({}, None), ({"section": 64}, None), ({}, [0, 5, 5, 64, 110]), ({}, [0, 70, 110])],
)
def test_inner_products_are_known_where_spans_start_and_end(name, changes, ends, by_plan):
    """Four spans of 32 tokens; no gradient of a final state, so that nothing is left of states at their ends."""
    by_plan(replace(RECOMPUTED_WITH_PRODUCTS, **changes))
    case, sizes = BY_NAME[name], Sizes(B=1 if ends else 2, T=110, H=1, K=8, V=6)
    gates = torch.full_like(make_inputs(case, sizes)[0]["g"], -0.02)
    documents = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    expected, actual = gate_gradients(case, sizes, torch.ones(110), documents, g=gates)
    assert (actual - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule"])
@pytest.mark.parametrize("decay", [-0.1, -0.5])
def test_nothing_is_left_of_large_inner_products(name, decay, by_plan, monkeypatch):
    """Behind the last token with a gradient a gate has none; large values that decayed leave it exact as well."""
    by_plan(RECOMPUTED_WITH_PRODUCTS)
    monkeypatch.setattr(plans, "KEPT_SPAN", 128)
    case, sizes = BY_NAME[name], Sizes(B=1, T=128, H=1, K=8, V=6)
    inputs, token = make_inputs(case, sizes)[0], torch.arange(128)
    gates = torch.full_like(inputs["g"], decay)
    v = inputs["v"] * torch.where(token < 32, 1e5, 1.0)[None, :, None, None]
    whole, actual = gate_gradients(case, sizes, torch.ones(128), g=gates, v=v)
    _, ended = gate_gradients(case, sizes, (token < 40).float(), g=gates, v=v)
    assert ended[:, :40].abs().max() > 0
    assert (ended[:, 48:] == 0).all()
    if decay == -0.5:
        assert (actual - whole)[:, 64:].norm() < 1e-3 * whole[:, 64:].norm()


def test_grouped_heads():
    """Head h reads group h // factor; gradients of a group are sums over its heads."""
    case = BY_NAME["gated_delta_rule"]
    exact, rounded = single(Sizes(B=1, T=20, H=4, K=8, V=6), case)
    for inputs, _ in (exact, rounded):
        inputs["q"], inputs["k"] = inputs["q"][:, :, :2], inputs["k"][:, :, ::2]
    kernels = case.recurrence.with_options(implementation="triton", chunk_size=16)
    assert_close(
        differentiated(kernels, *rounded), differentiated(case.recurrence.reference, *exact)
    )


@pytest.mark.parametrize("name", CHUNKED)
def test_step(name):
    """One kernel advances the states as a scan over one token does."""
    case = BY_NAME[name]
    (exact, starts), (rounded, states) = single(Sizes(B=2, T=1, H=2, K=24, V=20), case)
    token = {v.name: v.kind == "token" for v in case.recurrence.program().inputs}
    now = [x[:, 0] if token[n] else x for n, x in rounded.items()]
    stepped = case.recurrence.with_options(implementation="triton").step
    output, after = stepped(*now, state=as_argument(states))
    wanted, finals = scan(case.recurrence.reference, exact, starts)
    for x, y in zip([output, *as_list(after)], [wanted[:, 0], *finals], strict=True):
        assert (x.double() - y).norm() / y.norm() < TOLERANCE


def test_half_precision_is_computed_by_kernels():
    """The interpreter has no bf16 arithmetic: results carry its rounding of outputs only."""
    case = BY_NAME["simple_gla"]
    inputs, states = make_inputs(case, Sizes(B=1, T=20, H=1))
    half = {name: x.bfloat16() for name, x in inputs.items()}
    kernels = case.recurrence.with_options(implementation="triton")
    output = kernels(*half.values(), initial_state=states[0].float())
    expected = case.recurrence.reference(
        *(x.double() for x in half.values()), initial_state=states[0]
    )
    assert output.dtype == torch.bfloat16
    assert ((output.double() - expected).norm() / expected.norm()) < 5e-3


def test_source_is_what_runs():
    """`source` is an importable module: header, the user's line, one kernel after the other."""
    case = BY_NAME["gated_delta_rule"]
    inputs, _ = make_inputs(case, Sizes(B=1, T=20, H=1))
    program = case.recurrence.program()
    tensors = [x.float() for x in inputs.values()]
    options = case.recurrence.with_options(implementation="triton").options
    text = run.source(program, tensors, None, None, options)
    compile(text, "source", "exec")
    for part in (
        "recurrence gated_delta_rule",
        "Plan for",
        "delta_rule.py:",
        "@triton.jit",
        "# [C, C]",
    ):
        assert part in text
