"""Answers of the independent implementations, computed once per test session for all variants.

fla and transformers live in .oracles (`make .oracles/ready`) and run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from fcntl import LOCK_EX, flock
from pathlib import Path

import oracle_numpy
import torch
from cases import CASES, Case, Sizes, make_inputs, weights_like
from torch import Tensor

ROOT = Path(__file__).parent.parent
SIZES = Sizes(B=1, T=19, H=2, K=4, V=3)

Answer = tuple[Tensor, list[Tensor], dict[str, Tensor], list[Tensor]]


def request(case: Case) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Inputs by name and initial states."""
    return make_inputs(case, SIZES)


def cotangents(case: Case) -> tuple[Tensor, list[Tensor]]:
    """The weights of tests/differentiated.py, for the output and the final states."""
    inputs, states = request(case)
    like_output = inputs["v"] if "v" in inputs else next(iter(inputs.values()))
    d_output, *d_states = weights_like(like_output, *states)
    return d_output, d_states


def from_library(library: str, folder: Path) -> dict[str, Answer]:
    """What `library` answers for each variant that names it: one subprocess for all workers."""
    installed = ROOT / ".oracles" / library
    assert installed.is_dir(), f"{installed} is missing: run `make .oracles/ready`"
    requests, answers = folder / f"{library}.requests", folder / f"{library}.answers"
    with open(folder / f"{library}.lock", "w") as lock:
        flock(lock, LOCK_EX)
        if not answers.exists():
            asked = {
                case.name: (*request(case), *cotangents(case))
                for case in CASES
                if library in case.oracles
            }
            torch.save(asked, requests)
            subprocess.run(
                [sys.executable, ROOT / "tests" / "run_oracles.py", library, requests, answers],
                env=os.environ | {"PYTHONPATH": str(installed)},
                check=True,
            )
    return torch.load(answers)


def from_numpy(case: Case) -> Answer:
    inputs, states = request(case)
    d_output, d_states = cotangents(case)
    arrays = {name: x.numpy() for name, x in inputs.items()}
    starts, d_o, d_s = [x.numpy() for x in states], d_output.numpy(), [x.numpy() for x in d_states]
    function = getattr(oracle_numpy, case.name)
    output, finals = function(**arrays, states=starts)
    of_inputs, of_states = oracle_numpy.gradients(function, arrays, starts, d_o, d_s)
    return (
        torch.from_numpy(output),
        [torch.from_numpy(x) for x in finals],
        {name: torch.from_numpy(x) for name, x in of_inputs.items()},
        [torch.from_numpy(x) for x in of_states],
    )
