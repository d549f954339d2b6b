"""Generated kernels on the device (`pytest -m gpu`): every variant against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate, measured, relative_rms
from cases import CASES, Case, Sizes, make_inputs, with_extremes
from differentiated import Result, as_argument, as_list, differentiated, scan

from lmoe_compiler.codegen import compiled, launch, rules, run
from lmoe_compiler.models import RECURRENCES

pytestmark = [
    pytest.mark.gpu,
    # The first backward of a process runs on a thread without a context, and cuBLAS makes one.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
half = torch.bfloat16
SIZES = Sizes(B=2, T=200, H=2, K=64, V=64)
BY_NAME = {case.name: case for case in CASES}
CHAOTIC = ("slstm",)
"""Inputs changed by 0.2 % change its gradients by 180 % after 300 tokens (K = V = 128)."""


@pytest.fixture(autouse=True)
def _reported(record_property):
    """The worst error of an output or state, and of a gradient, in the report of a run."""
    measured.clear()
    yield
    for kind, gradients in (("outputs", False), ("gradients", True)):
        errors = [error for name, error in measured if name.startswith("d") == gradients]
        if errors:
            record_property(kind, max(errors))


def generated(case: Case, **options):
    return case.recurrence.with_options(implementation="triton", **options)


def prepared(case: Case, sizes: Sizes, dtype: torch.dtype, extreme: bool = False):
    """A case's inputs, rounded to `dtype`, and states, on the device."""
    inputs, states = make_inputs(case, sizes)
    if extreme:
        inputs = with_extremes(case, inputs)
    rounded = {name: x.to(dtype).cuda() for name, x in inputs.items()}
    return rounded, [x.float().cuda() for x in states]


def assert_right(case: Case, inputs, states, dtype, call=None, **options) -> Result:
    double = {name: x.double() for name, x in inputs.items()}
    exact = differentiated(
        case.recurrence.reference, double, [x.double() for x in states], **options
    )
    floor = differentiated(case.recurrence.reference, inputs, states, **options)
    actual = differentiated(call or generated(case), inputs, states, **options)
    assert_accurate(actual.tensors(), floor.tensors(), exact.tensors(), dtype)
    return actual


@every_case
@pytest.mark.parametrize("dtype", [half, torch.float16, torch.float32], ids=str)
def test_outputs_states_and_gradients(case, dtype):
    assert_right(case, *prepared(case, SIZES, dtype), dtype)


@every_case
@pytest.mark.parametrize("dtype", [half, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_any_length(case, dtype, T):
    assert_right(case, *prepared(case, Sizes(1, T, 2, 64, 64), dtype), dtype)


@pytest.mark.parametrize("name", ["simple_gla", "gla", "gated_delta_rule"])
@pytest.mark.parametrize("size", [16, 24, 128, 256])
def test_any_width(name, size):
    case = BY_NAME[name]
    assert_right(
        case, *prepared(case, Sizes(1, 130, 2, size, 2 * size if size < 128 else size), half), half
    )


@pytest.mark.parametrize("case", [c for c in CASES if c.extremes], ids=str)
def test_strong_decays_are_exact(case):
    """Gates of nothing, of a reset and of all between, side by side; log 0 is -inf, and no NaN appears."""
    inputs, states = prepared(case, SIZES, torch.float32, extreme=True)
    assert_right(case, inputs, states, torch.float32)


@every_case
@pytest.mark.parametrize("dtype", [half, torch.float16, torch.float32], ids=str)
def test_unit_queries_and_keys(case, dtype):
    inputs, states = prepared(case, SIZES, dtype)
    for name in {"q", "k"} & inputs.keys():
        inputs[name] = F.normalize(inputs[name].float(), dim=-1).to(dtype)
    assert_right(case, inputs, states, dtype)


@pytest.mark.parametrize("name", ["gla", "hgrn2", "kda", "rwkv7"])
def test_gradients_of_vector_gates_are_as_exact_as_others(name):
    """With decays of some tokens' length: of sums over a chunk most cancels, and what is left must not be roundings."""
    case = BY_NAME[name]
    inputs, states = prepared(case, Sizes(1, 512, 2, 128, 128), half)
    for key in {"q", "k"} & inputs.keys():
        inputs[key] = F.normalize(inputs[key].float(), dim=-1).to(half)
    gate = "f" if name == "hgrn2" else "g"
    x = inputs[gate]
    inputs[gate] = x + 2 if gate == "f" else -F.softplus(x) / 16
    exact = exact_in_chunks(case, inputs, states)
    actual = differentiated(generated(case), inputs, states).tensors()
    errors = {n: relative_rms(x, exact[n]) for n, x in actual.items() if n.startswith("d")}
    error = errors.pop(f"d{gate}")
    assert error <= 1.4 * max(errors.values()), (error, errors)


REPEATED_KEYS = [case for case in CASES if "beta" in case.gates]


@pytest.mark.parametrize("case", REPEATED_KEYS, ids=str)
def test_one_unit_key_over_many_chunks(case):
    """As test_one_key_over_a_chunk, with the one key for the whole sequence."""
    inputs, states = prepared(case, SIZES, half)
    unit = F.normalize(inputs["k"][:, :1].float(), dim=-1).to(half)
    inputs["k"] = unit.expand_as(inputs["k"]).contiguous()
    assert_right(case, inputs, states, half)


@pytest.mark.parametrize("case", REPEATED_KEYS, ids=str)
def test_one_key_over_a_chunk(case):
    """The triangular system is worst where keys repeat: powers of its matrix would lose every digit."""
    inputs, states = prepared(case, SIZES, half)
    first = torch.arange(SIZES.T, device="cuda") // 64 * 64
    inputs["k"] = inputs["k"][:, first].contiguous()
    assert_right(case, inputs, states, half)


@every_case
def test_packed_documents(case):
    ends = [0, 1, 64, 65, 129, 200, 200, 333]
    sizes = Sizes(1, ends[-1], 2, 64, 64)
    inputs, _ = prepared(case, sizes, half)
    _, states = prepared(case, Sizes(len(ends) - 1, ends[-1], 2, 64, 64), half)
    offsets = torch.tensor(ends, dtype=torch.int32, device="cuda")
    assert_right(case, inputs, states, half, cu_seqlens=offsets)


@every_case
def test_two_runs_give_the_same_bits(case):
    inputs, states = prepared(case, SIZES, half)
    first, second = (differentiated(generated(case), inputs, states) for _ in range(2))
    for name, x in first.tensors().items():
        assert torch.equal(x, second.tensors()[name]), name


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in CHAOTIC], ids=str)
def test_calls_that_fill_the_device(case):
    """In full and half precision, and the same bits again: what races on shared memory may in one chunk of many."""
    inputs, states = prepared(case, Sizes(1, 8192, 16, 128, 128), half)
    exact = exact_in_chunks(case, inputs, states)
    for dtype, allowed in ((torch.float32, 1e-5), (half, 0.03)):
        given = {n: x.to(dtype) for n, x in inputs.items()}
        first = differentiated(generated(case), given, states).tensors()
        errors = {n: relative_rms(x, exact[n]) for n, x in first.items()}
        assert {n: error for n, error in errors.items() if not error < allowed} == {}, dtype
    for _ in range(2):
        again = differentiated(generated(case), inputs, states).tensors()
        assert [n for n, x in first.items() if not torch.equal(x, again[n])] == []


@every_case
def test_every_element_is_written(case, monkeypatch):
    """All that kernels allocate is NaN before they run."""
    plain = launch.allocate

    def poisoned(*args):
        x = plain(*args)
        # A workspace is bytes: all ones are NaN in every floating-point type.
        return x.fill_(math.nan if x.is_floating_point() else 255)

    inputs, states = prepared(case, SIZES, half)
    expected = differentiated(generated(case), inputs, states)
    run.forget()
    monkeypatch.setattr(launch, "allocate", poisoned)
    actual = differentiated(generated(case), inputs, states)
    for name, x in actual.tensors().items():
        assert torch.equal(x, expected.tensors()[name]), name


@every_case
@pytest.mark.parametrize("dtype", [half, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1000, 8192])
def test_long_sequences(case, dtype, T):
    """Against the chunk form of ATen operations in float64, which other tests hold to the definition."""
    assert_right_in_chunks(case, Sizes(1, T, 2, 64, 64), dtype)


@pytest.mark.parametrize("name", ["linear_attention", "simple_gla", "gla", "delta_rule", "kda"])
@pytest.mark.parametrize("dtype", [half, torch.float32], ids=str)
def test_very_long_sequences(name, dtype):
    assert_right_in_chunks(BY_NAME[name], Sizes(1, 131072, 1, 64, 64), dtype)


def assert_right_in_chunks(case: Case, sizes: Sizes, dtype: torch.dtype) -> None:
    inputs, states = prepared(case, sizes, dtype)
    exact = exact_in_chunks(case, inputs, states)
    actual = differentiated(generated(case), inputs, states).tensors()
    assert_accurate(actual, exact, exact, dtype)


def exact_in_chunks(case: Case, inputs, states) -> dict[str, torch.Tensor]:
    """By ATen operations in float64."""
    chunked = case.recurrence.with_options(implementation="torch")
    double = {n: x.double() for n, x in inputs.items()}
    return differentiated(chunked, double, [x.double() for x in states]).tensors()


@every_case
@pytest.mark.parametrize("dtype", [half, torch.float32], ids=str)
def test_step_by_step_is_the_scan(case, dtype):
    inputs, states = prepared(case, Sizes(2, 5, 2, 64, 64), dtype)
    double = {name: x.double() for name, x in inputs.items()}
    exact, ends = scan(case.recurrence.reference, double, [x.double() for x in states])
    tokens = {var.name for var in case.recurrence.inputs if var.kind == "token"}
    outputs = []
    for t in range(5):
        now = {name: x[:, t] if name in tokens else x for name, x in inputs.items()}
        o, after = generated(case).step(**now, state=as_argument(states))
        outputs.append(o)
        states = as_list(after)
    found = {"o": torch.stack(outputs, 1)} | {f"S{n}": x for n, x in enumerate(states)}
    expected = {"o": exact} | {f"S{n}": x for n, x in enumerate(ends)}
    assert_accurate(found, expected, expected, dtype)


@pytest.mark.parametrize("name", ["simple_gla", "gated_delta_rule", "slstm"])
def test_many_sequences_and_tensors_beyond_32_bits(name):
    """More than 65535 sequences, and element offsets beyond 2^31: the last sequence equals a small call."""
    case = BY_NAME[name]
    recurrence = RECURRENCES[name].with_options(implementation="triton")
    batch, heads = 70000, 2
    inputs, _ = prepared(case, Sizes(1, 130, heads, 128, 128), half)
    tokens = {v.name for v in recurrence.inputs if v.kind == "token"}
    wide = {
        n: x.expand(batch, *x.shape[1:]).contiguous() if n in tokens else x
        for n, x in inputs.items()
    }
    with torch.no_grad():
        small = recurrence(**inputs)
        for row in (0, batch - 1):
            assert torch.equal(recurrence(**wide)[row], small[0])


@every_case
def test_gradients_need_no_final_state(case):
    """The common call: no initial state, no final state asked for."""
    inputs, _ = prepared(case, SIZES, half)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output = generated(case)(**leaves)
    grads = torch.autograd.grad(output.float().square().sum(), list(leaves.values()))
    assert all(g.isfinite().all() for g in grads)
    zero = [torch.zeros_like(s) for s in prepared(case, SIZES, half)[1]]
    same, _ = scan(generated(case), {n: x.detach() for n, x in leaves.items()}, zero)
    torch.testing.assert_close(output, same, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(
            (n, 64)
            for n in ("linear_attention", "simple_gla", "gla", "gated_delta_rule", "kda", "rwkv7")
        ),
        ("gated_delta_rule", 256),  # its row sums are added up over tiles of keys, in every section
    ],
)
@pytest.mark.parametrize(("dtype", "allowed"), [(half, 0.002), (torch.float32, 4e-6)], ids=str)
def test_sections_change_nothing(name, size, dtype, allowed, monkeypatch):
    """A backward that goes section by section (the last one ragged), with states given and asked for."""
    inputs, states = prepared(BY_NAME[name], Sizes(2, 2500, 2, size, size), dtype)
    whole = differentiated(generated(BY_NAME[name]), inputs, states).tensors()
    monkeypatch.setattr(rules, "_section", lambda *_: 1024)
    compiled.forget()
    sections = differentiated(generated(BY_NAME[name]), inputs, states).tensors()
    compiled.forget()
    for key, x in sections.items():
        error = (x.double() - whole[key].double()).norm() / whole[key].double().norm()
        assert error < allowed, f"{key}: {error:.1e}"
