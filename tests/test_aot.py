"""Generated kernels compile for sm_90 on a machine without a GPU, within the budget of registers and shared memory.

In a process of its own: TRITON_INTERPRET, which other tests set, replaces Triton's compiler.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def compiled(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "lmoe_compiler.cli", "bench", "resources", "--json"]
    ran = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    for row in rows:
        print({name: row[name] for name in row if name != "fits"})
    return rows


def within_budget(rows: list[dict]) -> None:
    over = [
        f"{r['op']} {r['kernel']}: {r['spill_stores']} B, {r['shared']} B"
        for r in rows
        if not r["fits"]
    ]
    assert not over


def test_a_scan_runs_on_tensor_cores_without_spilling():
    rows = compiled("gated_delta_rule", "--directions", "forward")
    within_budget(rows)
    kernels = {row["kernel"]: row for row in rows}
    assert set(kernels) == {"prepare", "spans_matrix", "spans", "scan"}
    for name in ("spans_matrix", "spans", "scan"):
        assert kernels[name]["wgmma"] > 0
        assert kernels[name]["mma"] == 0
        assert kernels[name]["cp_async"] > 0


TOGETHER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.launcher import compile_together
from lmoe_compiler.models import RECURRENCES

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Driver())
request = request_of(RECURRENCES["gla"].program(), "backward", (1, 100, 2, 16))
executable = request.make(request.choice())
prepared = executable.prepare(request.extent)
dtypes = [torch.bfloat16 for _ in request.names]
dtypes += [made.dtype for made in (*prepared.own, *prepared.shared)]
calls = [
    (one.launcher, [*(torch.empty(16, dtype=dtypes[slot]) for slot in one.slots), *one.lengths])
    for one in prepared.launches
]
compile_together(calls)
for launcher, _ in calls:
    (kernel,) = launcher.function.device_caches[0][0].values()
    print(launcher.kernel.name, type(kernel).__name__, "cubin" in kernel.asm)
"""


def test_a_first_call_compiles_its_kernels_together(tmp_path):
    """In threads, and what a launch then looks up is there: with a driver that only names the device."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", TOGETHER], capture_output=True, text=True, check=False,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    kernels = [line.split() for line in ran.stdout.splitlines()]
    assert len(kernels) >= 5
    assert all(rest == ["CompiledKernel", "True"] for _, *rest in kernels)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["linear_attention", "simple_gla", "mamba2", "delta_rule"])
def test_forward_kernels_are_within_budget(name):
    within_budget(compiled(name, "--directions", "forward"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    "linear_attention simple_gla retention mamba2 gla delta_rule gated_delta_rule kda rwkv7".split(),
)
def test_kernels_of_the_backward_are_within_budget(name):
    within_budget(compiled(name, "--directions", "backward"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("kda", "8,2048,32,256", "bf16"),
        ("gla", "2,16384,16,128", "fp32"),
        ("gated_delta_rule", "2,16384,16,128", "fp32"),
    ],
)
def test_large_programs_stay_in_registers(name, shape, dtype):
    """Not within the budget, but no kernel lives in memory: on a device those over 1 KiB get more warps."""
    rows = compiled(name, "--directions", "backward", "--shape", shape, "--dtype", dtype)
    assert max(row["spill_stores"] for row in rows) <= 2048


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_products_start_from_what_they_are_added_to():
    """RWKV-7's scan, whose feedback subtracts: with differences of products it spilled, and took 2.3 times as long."""
    rows = compiled("rwkv7", "--directions", "forward")
    assert next(row for row in rows if row["kernel"] == "scan")["spill_stores"] == 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_of_span_maps_compile():
    """At lengths that get loops over tiles, in which Python's names outlive the loop and Triton's do not."""
    ops = ("simple_gla", "gla", "gated_delta_rule")
    rows = compiled(*ops, "--directions", "--span-maps", "--shape", "1,16384,16,128")
    assert {row["op"] for row in rows} == set(ops)
    assert {"ends E", "pullback E", "ends M of S", "pullback M of S"} == {
        row["direction"] for row in rows
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sequential_kernels_are_within_budget():
    """A recurrence that is nonlinear in its state: registers hold it, and nothing is spilled."""
    rows = compiled("slstm", "--shape", "2,2048,16,64")
    within_budget(rows)
    assert {row["kernel"] for row in rows} == {"walk", "entries", *(f"sum_R{x}" for x in "zifo")}


def test_a_step_is_within_budget():
    rows = compiled("gated_delta_rule", "gla", "--directions", "step", "step_")
    within_budget(rows)
    assert all(row["kernel"] == "step" and row["registers"] <= 128 for row in rows)
