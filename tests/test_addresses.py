"""Loops of several stages touch what loops of one do: a compiler that pipelines them wrongly is seen without a GPU.

Triton 3.6 fails this for the states of DeltaNet and KDA, in as many stages as later versions get: it gets one
(codegen/miscompiled.py).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TOUCHED = """
import sys
from dataclasses import replace
from ptx import bases, touched
from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.aot import argument_types, compile_kernel
from lmoe_compiler.codegen.launch import Executable
from lmoe_compiler.models import RECURRENCES

op, direction, name, length = sys.argv[1:]
length = int(length)
request = request_of(RECURRENCES[op].program(), direction, (1, length, 16, 128))
choice = request.choice()
found = []
for stages in (choice.tuning(name).num_stages, 1):
    kernels = {**dict(choice.kernels), name: replace(choice.tuning(name), num_stages=stages)}
    plan = request.plan(replace(choice, kernels=tuple(kernels.items())))
    (one,) = (x for x in Executable(plan, [], (), (), {}).launchers if x.kernel.name == name)
    names = [x for x in one.function.arg_names if x not in one.constants]
    types = argument_types(one.function.arg_names, one.kernel, "bf16")
    text = compile_kernel(one.function, types, one.constants, **one.options).asm["ptx"]
    part = length // 2 if plan.passed else length
    lengths = {"T": part, "T_0": part, "T_ALL": length, "TOKENS": length}
    given = bases(names, {n: x for n, x in lengths.items() if n in names})
    found.append([touched(text, given, p, 32 * one.options["num_warps"]) for p in (0, 5, 41)])
print("stages:", choice.tuning(name).num_stages)
for several, single in zip(*found):
    assert several["stores"] == single["stores"]
    assert not single["loads"] - several["loads"]
    print(len(single["stores"]), len(single["loads"]), len(several["loads"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "direction", "kernel", "length"),
    [
        ("kda", "backward", "states", 2048),
        ("simple_gla", "forward", "spans", 2048),
        ("gla", "backward", "adjoint", 2048),
        ("gla", "forward", "prepare", 2048),
        ("kda", "backward", "gradients", 2048),
        ("delta_rule", "backward", "adjoint", 2048),
        ("delta_rule", "backward", "states", 2048),
        ("delta_rule", "backward", "states_keys", 2048),
        ("delta_rule", "backward", "adjoint_keys", 2048),
        ("delta_rule", "backward", "adjoint_spans_matrix", 16384),
        ("linear_attention", "backward", "adjoint_keys", 2048),
        ("gated_delta_rule", "backward", "states_keys", 2048),
        ("gated_delta_rule", "backward", "adjoint_keys", 2048),
        ("gated_delta_rule", "backward", "gradients", 2048),
        ("mamba2", "backward", "states_keys", 2048),
        ("simple_gla", "forward", "scan", 2048),
        ("gla", "forward", "scan", 2048),
        ("rwkv7", "backward", "adjoint", 2048),
        ("delta_rule", "forward", "spans_matrix", 8192),
        ("delta_rule", "forward", "scan", 8192),
    ],
)
def test_stages_of_a_loop_change_no_address(op, direction, kernel, length):
    """In a process of its own: other tests have Triton interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [os.path.dirname(__file__), environment.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, "-c", TOUCHED, op, direction, kernel, str(length)],
        capture_output=True, text=True, check=False,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    stages, *programs = ran.stdout.splitlines()
    if stages == "stages: 1":
        pytest.skip("this Triton gets one stage: there is nothing to compare")
    assert len(programs) == 3
