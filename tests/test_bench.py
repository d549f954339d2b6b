"""The bench without a GPU: choices are searched and replayed, lost workers are reported, tables are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmoe_compiler import cli
from lmoe_compiler.bench import (
    autotuner,
    gates,
    kernels,
    library,
    processes,
    schedules,
    table,
    tune,
)
from lmoe_compiler.bench.measure import covered
from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.bench.processes import Task, one_by_one, side_by_side
from lmoe_compiler.bench.workloads import GATE_SHAPES, STEP_SHAPES, WORKLOADS, make_inputs
from lmoe_compiler.models import RECURRENCES

TIMES = {16: 3.0, 32: 1.0, 64: 2.0}


def kernel_function(x, BLOCK): ...


class FakeKernel:
    """What an Autotuner holds: a kernel that remembers its launches."""

    fn = staticmethod(kernel_function)

    def __init__(self):
        self.launched = []

    def run(self, *args, grid, warmup, BLOCK, **options):
        self.launched.append(BLOCK)


@pytest.fixture
def tuned_kernel(monkeypatch):
    """A function that installs a Tuner and gives a fresh autotuned kernel of three configurations."""
    triton = pytest.importorskip("triton")
    from triton import knobs
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    originals = {name: vars(Autotuner)[name] for name in ("check_disk_cache", "_bench", "do_bench")}
    monkeypatch.setattr(knobs.autotuning, "cache", False)
    monkeypatch.setattr(JITFunction, "run", JITFunction.run)

    def make(tuner):
        for name, original in originals.items():
            monkeypatch.setattr(Autotuner, name, original)
        tuner.install()
        configs = [triton.Config({"BLOCK": block}, num_warps=block // 16) for block in TIMES]
        kernel = FakeKernel()
        return Autotuner(kernel, ["x", "BLOCK"], configs, ["x"], None, None), kernel

    return make


def times_of(kernel, timed):
    def bench(call, quantiles=None):
        call()
        timed.append(kernel.launched[-1])
        return [TIMES[kernel.launched[-1]]] * 3

    return bench


def test_choices_are_searched_written_down_and_replayed(tuned_kernel, monkeypatch):
    searching = autotuner.Tuner("search")
    tuner, kernel = tuned_kernel(searching)
    short, long = [], []
    searching.bench = times_of(kernel, short)
    monkeypatch.setattr(autotuner, "brief", times_of(kernel, short))
    monkeypatch.setattr(autotuner, "careful", times_of(kernel, long))
    tuner.run(7, grid=(1,), warmup=False)
    assert (short, long, kernel.launched[-1]) == ([16, 32, 64], [32, 64, 16], 32)
    written = json.loads(json.dumps(searching.chosen))
    assert list(written) == [f"{__name__}.kernel_function"]

    replaying = autotuner.Tuner("replay", written)
    tuner, kernel = tuned_kernel(replaying)
    replaying.bench = times_of(kernel, [])
    tuner.run(7, grid=(1,), warmup=False)
    assert kernel.launched == [32]
    assert replaying.searched == []
    assert (tuner.best_config.num_warps, tuner.best_config.kwargs) == (2, {"BLOCK": 32})
    tuner.run(8, grid=(1,), warmup=False)
    assert replaying.searched == [f"{__name__}.kernel_function"]


def test_shares_of_the_compilations_cover_all(tuned_kernel):
    covered = []
    for i in range(2):
        compiling = autotuner.Tuner("compile", share=(i, 2))
        tuner, kernel = tuned_kernel(compiling)
        timed = []
        compiling.bench = times_of(kernel, timed)
        tuner.run(7, grid=(1,), warmup=False)
        covered.append(timed)
    assert covered == [[16, 64], [32]]


WORKER = """
import json, os, sys, time
work = json.loads(sys.argv[1])
print("ready", flush=True)
assert sys.stdin.readline() == "go\\n"

def answer(**row):
    print(json.dumps(work | row), flush=True)

what = work["what"]
if what in ("hang", "die"):
    answer(begun=True)
    if what == "hang":
        time.sleep(60)
    sys.exit("illegal memory access")
if what == "search":
    for shape in work["shapes"]:
        print("a warning of the library")
        answer(shape=shape, chosen={"kernel": {str(shape): {"num_warps": 4}}})
elif what == "first":
    os.makedirs(os.environ["TRITON_CACHE_DIR"])
    answer(first_call_s=3.0, chosen=None)
elif what == "measure":
    us = {"ours": 100.0, "fla": 130.0 if work.get("chosen") else 500.0, "softmax": 900.0}[work["side"]]
    warm = 0.5 if os.path.isdir(os.environ["TRITON_CACHE_DIR"]) else 9.0
    floors = {"forward_floor_us": 50.0, "both_floor_us": 150.0}
    answer(forward_us=us, both_us=3 * us, first_call_s=warm, chosen=None, **floors)
else:
    answer(done=True)
"""


@pytest.fixture
def scripted_workers(tmp_path, monkeypatch):
    """Workers that answer by a script, as a GPU would."""
    (tmp_path / "scripted_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(processes, "WORKER", "scripted_worker")
    for command in (kernels, library):
        monkeypatch.setattr(command, "require_device", lambda **_: None)
    monkeypatch.setattr(library, "machine", dict)  # the library is not installed here


@pytest.mark.usefixtures("scripted_workers")
def test_a_lost_worker_costs_its_own_cell_only():
    tasks = [Task({"what": what}) for what in ("die", "hang", "well")]
    for answers in (list(one_by_one(tasks, 4, together=2)), list(side_by_side(tasks, 4, 3))):
        died, hung, well = answers
        assert died.rows == [{"what": "die", "begun": True}]
        assert died.error == "exit 1: illegal memory access"
        assert (hung.rows, hung.error) == ([{"what": "hang", "begun": True}], "more than 4 s")
        assert (well.rows, well.error) == ([{"what": "well", "done": True}], "")


@pytest.mark.usefixtures("scripted_workers")
def test_the_librarys_choices_reach_its_timing(tmp_path, capsys):
    """What `bench library` finds, and what it already had, is what `bench kernels` replays; each cell has its cache."""
    path, known = tmp_path / "library.json", {"chunk_gla 8,1024,8,64": {"kernel": {"k": {}}}}
    library.save(known, path)
    assert library.main(["--ops", "gla", "--workers", "4", "--out", str(path)]) == 0
    found = library.load_choices(path)
    assert len(found) == len(GATE_SHAPES)
    assert found.items() >= known.items()
    assert "choices [1, 1, 1]" in capsys.readouterr().out

    flags = ["--ops", "gla", "--against", "fla", "--softmax", "--workers", "4"]
    assert kernels.main([*flags, "--chosen", str(path), "--out", str(tmp_path / "run")]) == 0
    cells = table.read(tmp_path / "run/results.jsonl")
    assert len(cells) == 3 * len(GATE_SHAPES)
    for shape in GATE_SHAPES:
        assert cells["gla", shape, "fla"]["forward_us"] == 130.0
        assert cells["gla", shape, "ours"]["cold_first_call_s"] == 3.0
        assert cells["gla", shape, "ours"]["first_call_s"] == 0.5
    text = capsys.readouterr().out
    assert "| geometric mean, gla, forward, 4 cells | >= 2.0x | 1.30 | FAIL |" in text
    assert "| 8, 1024, 8, 64 | 900 | 2700 |" in text


def test_shipped_choices_are_for_every_cell_and_their_machine_only(monkeypatch):
    made = json.loads(library.SHIPPED.read_text())["of"]
    monkeypatch.setattr(library, "machine", lambda: made)
    assert library.shipped() == library.SHIPPED
    found = library.load_choices(library.shipped())
    assert not any(library.missing(op, found) for op in library.SECONDS)
    monkeypatch.setattr(library, "machine", lambda: made | {"triton": "3.6.0"})
    assert library.shipped() is None


@pytest.mark.usefixtures("scripted_workers")
def test_choices_of_two_machines_are_not_mixed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "library.json"
    library.save({}, path)
    monkeypatch.setattr(library, "machine", lambda: {"device": "another"})
    with pytest.raises(SystemExit):
        library.main(["--out", str(path)])
    assert "was made on another device" in capsys.readouterr().err
    assert library.load_choices(path) == {}


@pytest.mark.usefixtures("scripted_workers")
def test_a_search_that_cannot_compile_stops_at_once(tmp_path, monkeypatch, capsys):
    shares = [{"what": "die", "op": "kda"}]
    monkeypatch.setattr(library, "shares", lambda op, shapes: shares)
    assert library.main(["--workers", "2", "--out", str(tmp_path / "library.json")]) == 1
    assert "nothing could be compiled: exit 1: illegal memory access" in capsys.readouterr().err


def row(op, shape, side, **columns):
    known = {"what": "measure", "op": op, "shape": list(shape), "side": side, "dtype": "bf16"}
    made_on = {"device": "a GPU", "torch": "2.11.0", "triton": "3.7.1"}
    return known | made_on | columns


def written(tmp_path, rows):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def measured(us, **more):
    floors = {"forward_floor_us": 50.0, "both_floor_us": 150.0}
    counts = {"forward_kernels": 2, "both_kernels": 6, "peak_mib": 100.0, "sample": [1.0, 2.0]}
    return {"forward_us": us, "both_us": 3 * us, **floors, **counts, **more}


def test_the_table_and_its_gates(tmp_path, capsys):
    """Of two rows for a cell the last counts; a first call's row keeps its columns; a cell that failed, or was not
    reached, is named.
    """
    shape, small = GATE_SHAPES[1], GATE_SHAPES[3]
    rows = [
        row("gla", shape, "ours", what="first") | {"what": "first", "first_call_s": 8.0},
        row("gla", shape, "ours", error="more than 9 s"),
        row("gla", shape, "ours", **measured(100.0, first_call_s=1.5)),
        row("gla", shape, "fla", **measured(250.0, peak_mib=150.0)),
        row("gla", small, "ours", **measured(10.0)),
        row("gla", small, "fla", **measured(20.0, sample=[1.0, 2.5])),
        row("kda", shape, "ours", error="exit 1: illegal memory access"),
        row("kda", small, "ours") | {"what": "first", "first_call_s": 2.0},
    ]
    path = written(tmp_path, rows)
    assert table.main([str(path)]) == 1
    text = capsys.readouterr().out
    assert "| gla | 2, 16384, 16, 128 | 100 | 50% | 250 | 2.50 | 300 | 50% | 750 | 2.50 |" in text
    assert "| 8.0, 1.5 |" in text
    assert "ours kda 2, 16384, 16, 128: exit 1: illegal memory access" in text
    assert "ours kda 8, 1024, 8, 64: not measured" in text
    assert "output differs from ours" in text
    assert path.with_suffix(".md").read_text().strip() == text.strip()
    found = {v.gate: v for v in gates.verdicts(table.read(path))}
    mean = found["geometric mean, gla, forward, 2 cells"]
    assert mean.measured == pytest.approx((2.5 * 2) ** 0.5)
    assert mean.passed
    assert not found["gla 8, 1024, 8, 64 forward"].passed  # 2x where 3x is asked for
    assert found["gla 2, 16384, 16, 128 forward"].passed
    assert found["peak memory over FLA's, gla, worst of 2"].measured == 1.0
    assert found["first forward of gla, cold cache, s"].passed
    assert not found["first forward of gla, warm cache, s"].passed


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=8))
def test_time_covered_by_kernels_side_by_side_is_counted_once(drawn):
    spans = [(begin, begin + length) for begin, length in drawn]
    assert covered(spans) == len(set().union(*(range(*span) for span in spans)))


def test_every_library_call_takes_the_inputs_it_is_given():
    """Inputs of a recurrence, prepared for the library, are its tensors by name, in shapes that it documents."""
    for workload in WORKLOADS.values():
        inputs = make_inputs(workload, (2, 3, 2, 4), torch.bfloat16, "cpu")
        prepared = workload.library.prepare(**inputs)
        assert set(workload.library.order) <= set(prepared)
        assert all(prepared[name].shape[:3] == (2, 3, 2) for name in workload.library.order)


def test_other_dtypes_are_timed_alone(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "kernels", "--dtype", "fp32", "--against", "fla"])
    assert "--dtype fp32 times our kernels alone" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("command", [["kernels", "--against", "fla"], ["library"]])
def test_without_a_gpu_the_bench_says_so(command, capsys):
    assert cli.main(["bench", *command]) == 1
    assert "there is no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
@pytest.mark.parametrize("op", ["simple_gla", "gla", "delta_rule", "gated_delta_rule"])
def test_every_candidate_of_the_search_is_a_plan_of_its_own(op, direction):
    shape = STEP_SHAPES[2] if direction in tune.STEPS else GATE_SHAPES[1]
    request = request_of(RECURRENCES[op].program(), direction, shape)
    choices = list(tune.candidates(request))
    assert len(choices) == len(set(choices)) >= (4 if request.is_step else 6)
    assert choices[0] == request.rule()
    assert len({request.plan(choice) for choice in choices}) == len(choices)
    assert {c.recompute for c in choices} == {False, choices[0].recompute}


def test_all_candidates_go_to_one_process(tmp_path, monkeypatch):
    """More than fits into an argument (128 KiB); answers come back by number."""
    worker = tmp_path / "worker"
    lines = [
        f"#!{sys.executable}",
        "from lmoe_compiler.bench import trial",
        "trial.attempt = lambda *_: 0.5",
    ]
    worker.write_text("\n".join([*lines, "trial.main()", ""]))
    worker.chmod(0o700)
    request = request_of(RECURRENCES["gated_delta_rule"].program(), "backward", GATE_SHAPES[1])
    numbered = [(number, request.rule()) for number in range(200)]
    assert len(json.dumps([tune.tuned.encode(choice) for _, choice in numbered])) > 2**17
    monkeypatch.setattr(tune.sys, "executable", str(worker))
    task = {
        "op": "gated_delta_rule",
        "shape": GATE_SHAPES[1],
        "direction": "backward",
        "what": "time",
    }
    assert tune.trials(task, numbered, 60) == dict.fromkeys(range(200), 0.5)


# -- state exchanges on several processes --------------------------------------------------------


def measured_schedules(folder: Path, *more: str) -> dict[str, Any]:
    """What two processes that torchrun started have saved."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ("--ops", "gla", "--steps", "1", "--out", str(folder), *more)
    subprocess.run(
        [*command, "-m", "lmoe_compiler.cli", "bench", "schedules", *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=300,
    )  # fmt: skip
    found: dict[str, Any] = json.loads((folder / "schedules.json").read_text())
    assert [row["side"] for row in found["rows"]] == list(schedules.SIDES)
    assert all(row["milliseconds"] > 0 and row["received"] > 0 for row in found["rows"])
    return found


@pytest.mark.slow
def test_schedules_are_measured_side_by_side(tmp_path):
    found = measured_schedules(tmp_path, "--device", "cpu", "--shape", "1", "32", "2", "8")
    assert found["backend"] == "gloo"
    assert all(row["error"] < 1e-5 for row in found["rows"])
    # Two ranks, so as many bytes of states; the gathered gradients bring the maps again.
    received = {row["side"]: row["received"] for row in found["rows"]}
    assert received["transpose"] <= received["all_gather"] < received["inputs, eager"]
