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
    assert {row["kernel"] for row in rows} == {"prepare", "scan"}
    scan = next(row for row in rows if row["kernel"] == "scan")
    assert scan["wgmma"] > 0
    assert scan["mma"] == 0
    assert scan["cp_async"] > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(x, marks=pytest.mark.xfail(strict=True, reason=f"the scan spills {n} B"))
        if n
        else x
        for x, n in (("linear_attention", 72), ("simple_gla", 96), ("delta_rule", 0))
    ],
)
def test_forward_kernels_are_within_budget(name):
    """Scans that cut a sequence are over it: they store the states kept for the backward once in 1024 tokens."""
    within_budget(compiled(name, "--directions", "forward"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("linear_attention", {"states", "adjoint_spans", "adjoint", "gradients"}),
        pytest.param(
            *("simple_gla", {"states", "adjoint_spans", "adjoint"}),
            marks=pytest.mark.xfail(strict=True, reason="the adjoint spills 76 B, before its loop"),
        ),
        ("gla", {"prepare", "states", "adjoint_spans", "adjoint", "gradients"}),
        ("delta_rule", {"prepare", "states", "adjoint", "products", "gradients"}),
        ("gated_delta_rule", {"prepare", "states", "adjoint", "products"}),
        ("kda", {"prepare", "states", "adjoint", "products", "gradients"}),
    ],
)
def test_kernels_of_the_backward_are_within_budget(name, kernels):
    rows = compiled(name, "--directions", "backward")
    within_budget([row for row in rows if row["kernel"] in kernels])


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
