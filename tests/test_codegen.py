"""Generated kernels run in Triton's interpreter, in a process of their own (interpreted_*.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scopes import out_of_scope

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
