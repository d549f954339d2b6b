"""Which kernels a call gets, and what is said where none fit: planned as for a GPU, launched by nobody."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import programs
import pytest
import torch
from calls import arguments, gated
from cases import CASES, Sizes, make_inputs

from lmoe_compiler import implementation
from lmoe_compiler.bench import host
from lmoe_compiler.bench.plans import plan_of, request_of
from lmoe_compiler.codegen import (
    compiled,
    cost,
    first_use,
    fit,
    launcher,
    miscompiled,
    run,
    stepping,
    tuned,
)
from lmoe_compiler.codegen.fit import DoesNotFit
from lmoe_compiler.codegen.plan import Choice, Tuning
from lmoe_compiler.config import Options
from lmoe_compiler.errors import ImplementationUnavailable
from lmoe_compiler.layout import Spec
from lmoe_compiler.lower.chunk import build
from lmoe_compiler.models import RECURRENCES

pytest.importorskip("triton")
kernels = gated.with_options(implementation="triton")


def test_what_triton_compiles_wrongly_is_not_chosen(monkeypatch):
    """Before 3.7, states of a solve in a loop of stages."""
    requests = {
        name: request_of(RECURRENCES[name].program(), "backward", (1, 16384, 16, 128))
        for name in ("kda", "gla")
    }
    for before in (True, False):
        monkeypatch.setattr(miscompiled, "_before", lambda *_, old=before: old)
        stages = {n: r.choice().tuning("states").num_stages for n, r in requests.items()}
        assert stages == {"kda": 1 if before else 3, "gla": 3}
        assert [bool(miscompiled.notes(r.wanted, r.program)) for r in requests.values()] == [
            before,
            False,
        ]
    assert requests["kda"].choice() == requests["kda"].rule()


@pytest.mark.parametrize(("name", "chunk"), [("gla", 32), ("kda", 32), ("simple_gla", 64)])
def test_chunks_that_are_asked_for_are_not_longer_than_what_compiles(name, chunk):
    """Gradients of vector decays; a forward has the chunks that were asked for."""
    program = RECURRENCES[name].program()
    for direction, rows in (("forward", 64), ("backward", chunk)):
        request = request_of(program, direction, (1, 200, 2, 64))
        request = replace(request, options=Options(chunk_size=64))
        assert request.choice().chunk == rows
    said = miscompiled.notes(request.wanted, request.program)
    assert [text.split(":")[0] for text in said] == ["chunks of 32 rows"] * (chunk < 64)


@pytest.mark.parametrize(
    ("name", "shape", "section"),
    [
        ("gla", (2, 16384, 16, 128), 4096),  # as few tokens as keep all SMs busy
        ("gla", (4, 2048, 16, 128), 1024),  # short, and its scans need not be cut to fill them
        ("gla", (1, 8192, 16, 128), 0),  # eight spans side by side would be lost
        ("simple_gla", (4, 2048, 16, 128), 0),  # nothing of chunks is stored
        ("simple_gla", (2, 16384, 16, 128), 4096),  # the adjoint leaves room for gradients
        ("simple_gla", (1, 65536, 8, 128), 0),  # it is cut in spans
        ("gated_delta_rule", (8, 1024, 8, 64), 0),
        ("simple_gla", (1, 1024, 2, 64), 0),  # a few MiB
        ("gla", (8, 1024, 8, 64), 0),  # its states take no more than its inputs
        ("kda", (8, 1024, 8, 64), 512),
        ("delta_rule", (4, 2048, 16, 128), 0),  # nothing of chunks is stored
        ("delta_rule", (1, 8192, 96, 128), 0),
        ("delta_rule", (2, 16384, 16, 128), 4096),  # the adjoint leaves room for gradients
        ("delta_rule", (8, 2048, 32, 256), 0),
        ("kda", (8, 2048, 32, 256), 1024),
    ],
)
def test_a_backward_goes_in_sections_where_that_costs_little(name, shape, section):
    assert request_of(RECURRENCES[name].program(), "backward", shape).rule().section == section


B16, NARROW, WIDE = (2, 16384, 16, 128), (8, 1024, 8, 64), (8, 2048, 32, 256)


@pytest.mark.parametrize(
    ("name", "direction", "shape", "kernel", "tuning"),
    [
        ("linear_attention", "forward", B16, "scan", Tuning(64, 0, 4, 2)),
        ("linear_attention", "forward", NARROW, "scan", Tuning(32, 0, 4, 3)),
        ("linear_attention", "forward", WIDE, "scan", Tuning(128, 0, 8, 3)),
        ("delta_rule", "forward", NARROW, "scan", Tuning(16, 0, 4, 3, offsets=True)),
        ("delta_rule", "forward", WIDE, "scan", Tuning(128, 0, 8, 3, offsets=True)),
        ("delta_rule", "forward", (1, 4096, 4, 256), "scan", Tuning(32, 0, 4, 3, offsets=True)),
        ("gated_delta_rule", "forward", WIDE, "scan", Tuning(32, 0, 4, 3, offsets=True)),
        ("rwkv7", "forward", WIDE, "scan", Tuning(32, 0, 4, 3, offsets=True)),
        ("delta_rule", "forward", (1, 65536, 8, 128), "scan", Tuning(64, 0, 4, 3, offsets=True)),
        ("delta_rule", "forward", (1, 2048, 8, 128), "scan", Tuning(16, 0, 4, 3, offsets=True)),
        ("linear_attention", "forward", (4, 2048, 16, 128), "scan", Tuning(64, 0, 4, 3)),
        ("linear_attention", "backward", WIDE, "states_keys", Tuning(128, 0, 8, 3)),
        ("gla", "forward", B16, "scan", Tuning(64, 0, 4, 4, offsets=True, ahead=True)),
        ("gla", "backward", B16, "states", Tuning(64, 0, 4, 3, offsets=True)),
        ("kda", "backward", B16, "states", Tuning(64, 0, 4, 3, offsets=True, ahead=True)),
        ("kda", "backward", B16, "adjoint", Tuning(32, 0, 4, 4)),
        ("rwkv7", "backward", B16, "adjoint", Tuning(32, 0, 4, 4, ahead=True)),
        ("delta_rule", "backward", B16, "products", Tuning(0, 0, 2, 2, inner=64, registers=168)),
        ("gated_delta_rule", "backward", B16, "products", Tuning(0, 0, 2, 2, inner=64)),
        (
            "gated_delta_rule",
            "backward",
            WIDE,
            "states_keys",
            Tuning(32, 0, 4, 2, offsets=True, ahead=True),
        ),
        ("gated_delta_rule", "backward", WIDE, "adjoint_keys", Tuning(32, 0, 4, 2, offsets=True)),
        ("simple_gla", "forward", WIDE, "scan", Tuning(128, 0, 8, 3, offsets=True, ahead=True)),
        ("simple_gla", "backward", WIDE, "adjoint", Tuning(128, 0, 8, 3, offsets=True, ahead=True)),
        ("gla", "backward", WIDE, "adjoint", Tuning(128, 0, 8, 2, ahead=True)),
        ("rwkv7", "backward", B16, "gradients", Tuning(0, 0, 2, 2, inner=16)),
        ("delta_rule", "backward", NARROW, "adjoint_keys", Tuning(32, 0, 2, 3, offsets=True)),
        ("mamba2", "backward", B16, "adjoint_keys", Tuning(64, 0, 4, 3, offsets=True, ahead=True)),
        ("delta_rule", "forward", (1, 2048, 32, 128), "scan", Tuning(64, 0, 4, 3, offsets=True)),
        ("linear_attention", "backward", (4, 2048, 16, 128), "adjoint", Tuning(64, 0, 4, 3)),
        ("linear_attention", "backward", B16, "adjoint", Tuning(64, 0, 4, 2)),
        ("rwkv7", "backward", B16, "products", Tuning(0, 0, 4, 1, inner=64)),
        ("kda", "backward", B16, "products", Tuning(0, 0, 4, 1)),
        ("mamba2", "backward", NARROW, "gradients", Tuning(0, 0, 4, 3, inner=32)),
        ("mamba2", "backward", WIDE, "gradients", Tuning(0, 0, 4, 2, inner=64)),
    ],
)
def test_tiles_are_those_that_were_measured(name, direction, shape, kernel, tuning):
    """rules.RULES says what they were measured against."""
    rule = request_of(RECURRENCES[name].program(), direction, shape).rule()
    assert rule.tuning(kernel) == tuning


@pytest.mark.parametrize("name", [n for n in RECURRENCES if build(RECURRENCES[n].ir) is not None])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_rules_give_a_plan_for_every_shape(name, dtype):
    """Spans are powers of two of at least 512 tokens (1024 in fp32, where shorter ones were not timed)."""
    program = RECURRENCES[name].program()
    least = 1024 if dtype == "fp32" else 512
    for shape in itertools.product((1, 8), (0, 1, 700, 2048, 65536), (1, 8, 96), (16, 64, 96, 256)):
        for direction in ("forward", "backward"):
            rule = request_of(program, direction, shape, dtype).rule()
            assert rule.section % 512 == 0
            assert rule.span == 0 or (rule.span >= least and rule.span.bit_count() == 1)
            assert rule.span < (rule.section or max(shape[1], 1))
            assert all(t.num_warps in (1, 2, 4, 8) for _, t in rule.kernels)


@pytest.mark.parametrize(("length", "spans"), [(1024, 0), (2048, 512), (4096, 1024), (8192, 2048)])
def test_few_heads_are_scanned_in_spans(length, spans):
    """Spans of 512 tokens only where there are four."""
    rule = request_of(RECURRENCES["gla"].program(), "forward", (1, length, 32, 128)).rule()
    assert rule.span == spans


@pytest.mark.parametrize(
    ("shape", "span"),
    [
        ((1, 65536, 8, 128), 8192),  # eight, which fill the SMs
        ((2, 16384, 16, 128), 4096),  # four at least: their maps take one more pass
        ((1, 5000, 8, 128), 0),  # powers of two: three of 2048
        ((1, 2048, 32, 128), 0),
        ((1, 8192, 96, 128), 0),
        ((8, 2048, 32, 256), 0),
    ],
)
def test_few_heads_are_scanned_in_spans_whose_maps_are_matrices(shape, span):
    program = RECURRENCES["delta_rule"].program()
    assert request_of(program, "forward", shape).rule().span == span
    assert request_of(program, "forward", shape, "fp32").rule().span == 0
    kda = RECURRENCES["kda"].program()
    assert request_of(kda, "backward", shape).rule().span == 0
    others = request_of(RECURRENCES["rwkv7"].program(), "forward", shape).rule().span
    assert others == (span if shape[1] == 65536 else 0)


@pytest.mark.parametrize(
    ("shape", "span"),
    [
        ((1, 65536, 8, 128), 4096),  # two blocks on each SM
        ((1, 8192, 8, 128), 1024),
        ((2, 16384, 16, 128), 0),  # eight spans at least
        ((4, 2048, 16, 128), 0),
    ],
)
def test_an_adjoint_that_leaves_nothing_of_chunks_is_cut_too(shape, span):
    rule = request_of(RECURRENCES["delta_rule"].program(), "backward", shape).rule()
    assert (rule.recompute, rule.span) == (True, span)
    if span:
        assert rule.tuning("adjoint") == Tuning(64, 0, 4, 3)
        assert rule.tuning("adjoint_spans_matrix") == Tuning(64, 0, 4, 4)


@pytest.mark.parametrize(
    ("name", "size", "recompute"),
    [
        ("linear_attention", 32, True),
        ("delta_rule", 32, False),  # states take no more than rows
        ("delta_rule", 64, True),
        ("delta_rule", 256, True),
        ("ttt_linear", 64, True),
        ("gated_delta_rule", 64, True),
        ("kda", 128, False),  # gradients of vectors need two states at once
        ("simple_gla", 128, True),
        ("simple_gla", 64, False),
        ("simple_gla", 256, False),
        ("mamba2", 128, True),
    ],
)
def test_gradients_by_scans_of_their_own(name, size, recompute):
    rule = request_of(RECURRENCES[name].program(), "backward", (2, 2048, 4, size)).rule()
    assert rule.recompute == recompute


def test_a_state_that_is_a_vector_needs_states_of_chunks():
    """Sections and tiles are those of a plan that stores them."""
    program = programs.program("delta_and_sum")
    rule = request_of(program, "backward", (8, 2048, 32, 128)).rule()
    assert (rule.recompute, rule.section) == (False, 1024)
    assert rule.tuning("adjoint_keys") == rule.default


def test_without_a_gpu():
    """An explicit request says where the inputs are; nothing runs instead."""
    with pytest.raises(ImplementationUnavailable, match="on cpu, and kernels run on CUDA"):
        kernels(*arguments(dtype=torch.float32))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is of a machine without a GPU")
def test_without_any_gpu():
    with pytest.raises(ImplementationUnavailable, match="sees no CUDA device"):
        kernels.step(*[x[:, 0] if x.dim() > 2 else x for x in arguments(dtype=torch.float32)])


def test_without_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    implementation.forget()
    with pytest.raises(ImplementationUnavailable, match="triton is not installed"):
        kernels(*arguments(dtype=torch.float32))
    implementation.forget()


@pytest.mark.parametrize(
    ("name", "axis", "dtype", "said"),
    [
        ("gla", 300, torch.bfloat16, r"K = 300(.|\n)*1 to 256"),
        ("slstm", 64, torch.float64, r"z is torch.float64(.|\n)*bfloat16, torch.float16 or"),
    ],
)
def test_unsupported_calls_are_named_with_what_is_supported(name, axis, dtype, said):
    recurrence = RECURRENCES[name]
    lead = {"token": (2, 5, 4), "head": (4,)}
    specs = [
        Spec((*lead[var.kind], *(axis for _ in var.axes)), dtype, torch.device("cuda"))
        for var in recurrence.inputs
    ]
    with pytest.raises(ImplementationUnavailable, match=said):
        implementation.choose("scan", recurrence.ir, specs, Options(implementation="triton"))


FUNCTIONS = ("scan", "scan_backward", "step", "step_", "span_map", "span_map_backward")


def specs_of(recurrence) -> list[Spec]:
    lead = {"token": (2, 5, 4), "head": (4,)}
    return [
        Spec((*lead[v.kind], *(64 for _ in v.axes)), torch.bfloat16, torch.device("cuda"))
        for v in recurrence.inputs
    ]


@pytest.mark.parametrize("name", RECURRENCES)
def test_auto_runs_every_recurrence_by_kernels_without_a_warning(name):
    recurrence = RECURRENCES[name]
    maps = build(recurrence.ir) is not None
    for function in (f for f in FUNCTIONS if maps or not f.startswith("span_map")):
        chosen = implementation.choose(function, recurrence.ir, specs_of(recurrence), Options())
        assert chosen.__module__ == implementation.TRITON


@pytest.fixture
def nothing_runs() -> Iterator[None]:
    with host.no_launches():
        yield


def limited(fits: Sequence[str] | None, limit: int):
    """Launcher.compile of a device that holds no kernel with more than `limit` stages or rows of a chunk."""
    right = launcher.Launcher.compile

    def compile_(self, grid, args, device, keep):
        needed = self.kernel.tuning.num_stages + self.constants["C"]
        if needed > limit and (fits is None or self.kernel.name not in fits):
            raise DoesNotFit(self.kernel.name, "shared memory", 1000 * needed, 1000 * limit)
        right(self, grid, args, device, keep)

    return compile_


@pytest.mark.usefixtures("nothing_runs")
def test_a_plan_that_does_not_fit_gives_way_and_explain_says_so(monkeypatch):
    monkeypatch.setattr(launcher.Launcher, "compile", limited(None, 17))
    inputs = arguments(dtype=torch.bfloat16, T=40)
    kernels(*inputs)
    (entry,) = compiled._calls.values()
    assert entry.executable.plan.chunk == 16
    assert all(k.tuning.num_stages == 1 for k in entry.executable.plan.kernels)
    page = run.report(gated.ir, inputs, kernels.options)
    assert "of shared memory, this device has 17000" in page
    assert "a larger plan was left" in kernels.explain(*inputs)


@pytest.mark.usefixtures("nothing_runs")
def test_an_error_where_nothing_fits(monkeypatch):
    monkeypatch.setattr(launcher.Launcher, "compile", limited(None, 3))
    with pytest.raises(ImplementationUnavailable, match=r"fits this device(.|\n)*has 3000"):
        kernels(*arguments(dtype=torch.float32))


@pytest.mark.usefixtures("nothing_runs")
def test_a_kernel_that_spills_gets_more_warps_and_explain_says_so(monkeypatch):
    """Up to 8; others keep theirs, and so do kernels whose plan was measured, and steps in place, which run once."""
    right = launcher.Launcher.compile

    def spilling(self, *args, **options):
        right(self, *args, **options)
        heavy = self.kernel.name in ("scan", "step")
        self.spilled = 4000 // self.kernel.tuning.num_warps if heavy else 500

    def warps(direction: str) -> dict[str, int]:
        plan = next(e.plan for e in compiled._executables.values() if e.plan.direction == direction)
        return {k.name: k.tuning.num_warps for k in plan.kernels}

    monkeypatch.setattr(launcher.Launcher, "compile", spilling)
    monkeypatch.setattr(fit, "SPILLED", 600)
    inputs = arguments(dtype=torch.bfloat16, T=40)
    kernels(*inputs)
    assert warps("forward") == {"prepare": 1, "scan": 8}
    assert "scan has 8 warps: with half of them a thread spilled 1000 B" in kernels.explain(*inputs)
    compiled.forget()
    with tuned.forced("forward", Choice(chunk=32, prepare=True)):
        kernels(*inputs)
    assert warps("forward") == {"prepare": 4, "scan": 4}
    token = [
        x[:, 0].contiguous() if var.kind == "token" else x
        for var, x in zip(gated.inputs, inputs, strict=True)
    ]
    _, state = kernels.step(*token)
    assert warps("step")["step"] == 8
    compiled.forget()
    kernels.step(*token, state=state, inplace=True)
    assert warps("step")["step"] == 1


@pytest.mark.usefixtures("nothing_runs")
def test_kernels_that_always_spill_end_with_most_warps(monkeypatch):
    """Token by token too, where a kernel's numbers say how many warps it starts with."""
    right = launcher.Launcher.compile

    def spilling(self, *args, **options):
        right(self, *args, **options)
        self.spilled = 4000

    monkeypatch.setattr(launcher.Launcher, "compile", spilling)
    recurrence = RECURRENCES["slstm"]
    inputs = make_inputs(next(c for c in CASES if c.name == "slstm"), Sizes(B=1, T=9))[0]
    leaves = [x.float().requires_grad_() for x in inputs.values()]
    o = recurrence.with_options(implementation="triton")(*leaves)
    torch.autograd.grad(o, leaves, torch.ones_like(o))
    plans = [e.plan for e in compiled._executables.values()]
    assert {plan.direction for plan in plans} == {"forward", "backward"}
    warps = {k.name: k.tuning.num_warps for plan in plans for k in plan.kernels}
    assert warps["walk"] == warps["entries"] == fit.MOST_WARPS


def test_smaller_plans_end():
    """Stages, then chunks, then tiles; each step is smaller, and there is a last one."""
    choice: Choice | None = Choice(chunk=64, default=Tuning(block=64, inner=32, num_stages=3))
    seen = []
    while choice is not None:
        seen.append(choice)
        choice = fit.smaller(choice, "scan")
    sizes = [(c.tuning("scan").num_stages, c.chunk, c.tuning("scan").block) for c in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == (1, 16, 16)


def test_steps_use_wide_tiles_for_large_batches_only():
    program = RECURRENCES["gated_delta_rule"].ir
    call = compiled.Request(
        "step",
        program,
        [Spec((1, 32, *(128 for _ in v.axes)), torch.bfloat16, torch.device("cuda")) for v in program.inputs],
        True,
        None,
        (),
        Options(),
    ).call  # fmt: skip
    blocks = [
        stepping.choose(program, call, batch, in_place=False).default.block
        for batch in (1, 64, 256)
    ]
    assert blocks == sorted(blocks)
    assert blocks[0] == stepping.NARROWEST
    assert blocks[-1] == stepping.WIDEST


def test_a_step_in_place_is_not_tiled_where_states_lack_the_axis():
    """Another program would read the vector that the first one has overwritten."""
    program = RECURRENCES["normalised_linear_attention"].ir
    inputs = [Spec((1, 32, 128), torch.bfloat16, torch.device("cuda")) for _ in program.inputs]
    plans = [
        compiled.Request(d, program, inputs, True, None, (), Options()) for d in ("step", "step_")
    ]
    tiled, whole = (request.plan(request.choice()).kernels[0].tiles for request in plans)
    assert tiled
    assert not whole


@pytest.mark.usefixtures("nothing_runs")
def test_an_unmeasured_gpu_gets_a_note(monkeypatch):
    other = replace(cost.H100, name="NVIDIA L4", sms=58)
    monkeypatch.setattr(cost, "device", lambda: other)
    monkeypatch.setattr("lmoe_compiler.codegen.first_use.interpreting", lambda: False)
    page = run.report(gated.ir, arguments(dtype=torch.float32), kernels.options)
    assert "NVIDIA L4 has not been measured" in page
    assert "lmoe bench tune" in page


def test_first_use_compares_what_one_kept_state_is_for():
    """States kept of an empty first document are written by nobody: the comparison starts from the call's own."""
    named = RECURRENCES["gated_delta_rule"].program()
    request = request_of(named, "backward", (1, 2048, 2, 32))
    tensors = {
        v.name: torch.zeros(x.shape) for v, x in zip(named.inputs, request.inputs, strict=True)
    }
    tensors |= {"S_kept": torch.full((4, 2, 32, 32), torch.nan), "do": tensors["v"]}
    for packed in (False, True):
        given = tensors | ({"cu_seqlens": torch.tensor([0, 0, 2048])} if packed else {})
        short = first_use.shortened(replace(request, documents=2 if packed else None), given, 512)
        assert short["q"].shape[1] == 511
        assert torch.equal(short["S_kept"], torch.zeros(1 + packed, 2, 32, 32))


@pytest.mark.usefixtures("nothing_runs")
def test_a_repeated_call_only_looks_up():
    """Nothing is planned, prepared or compiled again; another length is prepared, not planned."""
    inputs = arguments(dtype=torch.float32, T=40)
    kernels(*inputs)
    (first,) = compiled._calls.values()
    kernels(*inputs)
    assert list(compiled._calls.values()) == [first]
    kernels(*arguments(dtype=torch.float32, T=41))
    _, second = compiled._calls.values()
    assert second.executable is first.executable


@pytest.mark.usefixtures("nothing_runs")
def test_host_work_of_a_call_is_bounded():
    """Python functions entered by a call, which unlike its time is the same on every machine; the driver's too."""
    inputs = [x.requires_grad_() for x in arguments(dtype=torch.float32, T=40)]
    token = [x[:, 0].detach() if x.dim() > 2 else x.detach() for x in inputs]
    state = torch.zeros(2, 4, 3, 2)

    def train() -> None:
        output = kernels(*inputs)
        torch.autograd.grad(output, inputs, output)

    for run_, most in ((train, 165), (lambda: kernels.step(*token, state=state), 62)):
        for _ in range(2):  # the second call makes the graph
            run_()
        assert host.functions_entered(run_) <= most


@pytest.mark.parametrize(("name", "far"), [("gla", 1), ("kda", 1), ("rwkv7", 2)])
def test_far_kernels_store_what_their_near_kernel_does(name, far):
    """Many rows of sums over levels are shared between two, which have registers for half of them."""
    kernels = {k.name: k for k in plan_of(name, "backward", (2, 16384, 16, 128)).kernels}
    near = kernels["gradients"]
    others = [k for k in kernels.values() if k.tuned_as == "gradients" and k is not near]
    assert [k.name for k in others] == ["gradients_far", "gradients_far_2"][:far]
    stored = [s.value for k in others for s in k.stores]
    assert sorted(stored, key=str) == sorted([s.value for s in near.stores], key=str)
