"""The Makefile installs the build of torch that fits the machine, and the options that README shows are real ones."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from lmoe_compiler.train.config import TrainConfig, add_flags, from_flags

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAKE, SHELL = shutil.which("make"), shutil.which("sh")
CPU_BUILD = "https://download.pytorch.org/whl/cpu"


def commands_of(target: str, folder: Path, *, gpu: bool) -> list[list[str]]:
    """What `make` would run for a target in a fresh clone, on a machine with nothing but a shell and perhaps a GPU."""
    for name in ("Makefile", "pyproject.toml", ".constraints.txt"):
        shutil.copy(ROOT / name, folder)
    tools = folder / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to(SHELL)
    if gpu:
        (tools / "nvidia-smi").write_text("#!/bin/sh\n")
        (tools / "nvidia-smi").chmod(0o755)
    ran = subprocess.run(
        [MAKE, "--dry-run", target], cwd=folder, env={"PATH": str(tools)}, capture_output=True, text=True
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [shlex.split(line) for line in ran.stdout.splitlines()]


@pytest.mark.skipif(MAKE is None, reason="needs make")
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("target", ["train", "test"])
def test_the_build_of_torch_follows_the_machine(target, gpu, tmp_path):
    """PyPI's wheel is the CUDA build; only a machine without a GPU is pointed at the CPU builds."""
    commands = commands_of(target, tmp_path, gpu=gpu)
    installs = [c for c in commands if c[:4] == [".venv/bin/python", "-m", "pip", *c[3:4]]]
    torch_alone, package, *oracles = installs
    assert torch_alone[-1] == "torch"
    assert any(CPU_BUILD in word for word in torch_alone) is not gpu
    assert package[-2:] == ["--editable", ".[gpu,train,dev]"]
    assert len(oracles) == (2 if target == "test" else 0)
    for command in installs:
        assert command[command.index("--constraint") + 1] == ".constraints.txt"
        assert "install" in command
    assert not any(CPU_BUILD in word for command in installs[1:] for word in command)
    created = next(i for i, c in enumerate(commands) if c[1:4] == ["-m", "venv", ".venv"])
    assert created < commands.index(torch_alone)
    last = commands[-1]
    assert last[:2] == [".venv/bin/lmoe", "train"] if target == "train" else "pytest" in last


def test_options_in_readme_are_understood():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    shown = re.findall(r'make train ARGS="([^"]+)"', README)
    assert shown
    for text in shown:
        from_flags(TrainConfig(), parser.parse_args(shlex.split(text)))
    assert "--pattern NNNN" in README
    config = from_flags(TrainConfig(), parser.parse_args(["--pattern", "NNNN"]))
    assert (config.model.layer_pattern, config.model.num_layers) == ("NNNN", 4)
