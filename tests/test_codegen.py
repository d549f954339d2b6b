"""Generated kernels run in Triton's interpreter, in a process of their own (interpreted_*.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from scopes import out_of_scope

from lmoe_compiler.bench.plans import request_of
from lmoe_compiler.codegen.rules import by_rule
from lmoe_compiler.codegen.triton import print_module
from lmoe_compiler.models import RECURRENCES

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_kernels_in_the_interpreter(file, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "LMOE_KERNEL_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / file)],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_names_of_a_loop_are_seen_after_it():
    """By the check that all generated modules of these tests go through."""
    text = "def f(x):\n    for i in range(x):\n        y = i + x\n    {}\n    return x\n"
    assert out_of_scope(text.format("print(y)")) == ["y"]
    assert not out_of_scope(text.format("y = print(x)"))


def gradients_of(name: str) -> str:
    """The text of a kernel by the rules' plan that stores states of chunks, at K = V = 128."""
    request = request_of(RECURRENCES[name].program(), "backward", (2, 16384, 16, 128))
    program, call, (batch, length) = request.program, request.call, request.lengths
    choice = by_rule(program, "backward", call, batch, length, may_recompute=False)
    text, _ = print_module(request.plan(choice), [])
    kernels = re.split(r"@triton.jit.*\ndef ", text)
    return next(kernel for kernel in kernels if kernel.startswith(f"{name}_backward_gradients("))


@pytest.mark.parametrize("name", ["gla", "hgrn2", "kda", "rwkv7"])
def test_near_chunks_have_no_levels_and_two_running_sums(name):
    """Of the log decays and of their gradients: what each product of decayed keys gives to them is added up first."""
    text = gradients_of(name)
    assert "level" not in text
    assert text.count("running_sum(") == 2
    assert "reach(" in text


def test_blocks_of_pairs_are_loaded_again_after_a_loop():
    before, _, after = gradients_of("gated_delta_rule").partition("    for i_K in")
    after = after[re.search(r"\n    \w", after).start() :]
    loads = r"= tl.load\((product_\d) .*# \[C, C\]"
    again = set(re.findall(loads, before))
    assert again
    assert set(re.findall(loads, after)) == again


def test_an_expression_is_computed_once():
    """Nodes of a chunk near in all levels are often one expression: exp(G) of a row, and of what comes after it."""
    for name in ("kda", "rwkv7"):
        lines = re.findall(r"^\s+b_\d+ = (.*?)  #", gradients_of(name), re.MULTILINE)
        computed = [line for line in lines if not line.startswith("tl.")]
        assert len(computed) == len(set(computed))
