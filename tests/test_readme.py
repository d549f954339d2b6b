"""README's code runs, its links lead somewhere, its tables are what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Case, make_inputs

from lmoe_compiler.cli import main
from lmoe_compiler.codegen import run as kernels
from lmoe_compiler.config import Environment, Options
from lmoe_compiler.errors import InvalidOption, NoSpanMap
from lmoe_compiler.layout import map_axes
from lmoe_compiler.lower.chunk import NoChunkForm, chunk_program

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_code_blocks_run_in_order(tmp_path):
    """In one process and namespace, as a reader pastes them; from files, so lines can be quoted."""
    for n, block in enumerate(blocks("python")):
        (tmp_path / f"block{n}.py").write_text(block)
    run = "import sys\nfor p in sys.argv[1:]: exec(compile(open(p).read(), p, 'exec'), globals())"
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", run, *sorted(map(str, tmp_path.glob("*.py")))],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr


def test_links_lead_to_files():
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert targets
    assert not missing


def commands() -> list[str]:
    """The lines of the shell blocks, without their comments."""
    return [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"train", "test"} <= named <= targets


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(".venv/bin/lmoe ")])
def test_command_lines_are_understood(command, capsys):
    words, *_ = command.removeprefix(".venv/bin/lmoe ").split(" --")
    flags = re.findall(r"--[a-z-]+", command)
    with pytest.raises(SystemExit):
        main([*words.split(), "--help"])
    helped = capsys.readouterr().out
    assert all(f" {flag} " in helped or f"[{flag} " in helped for flag in flags)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ")])
def test_examples_run(command):
    ran = subprocess.run(
        [sys.executable, *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stdout) > 80


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its two header lines."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def forms(case: Case) -> list[str]:
    """How the compiler runs a case on a CPU and a GPU, and whether its spans of tokens compose."""
    program = case.recurrence.ir
    inputs, _ = make_inputs(case, dtype=torch.bfloat16)
    reason = kernels.unsupported(program, list(inputs.values()), Options())
    try:
        chunk_program(program)
        map_axes(program)
    except NoChunkForm:
        return ["token by token", "token by token" if reason else "Triton, token by token", "no"]
    except NoSpanMap:
        return ["chunked", "token by token" if reason else "Triton", "no"]
    return ["chunked", "token by token" if reason else "Triton", "yes"]


def test_table_of_recurrences_is_what_the_compiler_does():
    """The kind is asked of the analysis, the forms of the lowerings, the oracles of the cases."""
    table = [[row[0].split("]")[0].strip("["), *row[2:]] for row in rows("Recurrences")]
    assert table == [
        [case.name, case.recurrence.transition.kind, *forms(case), ", ".join(case.oracles)]
        for case in CASES
    ]


def test_table_of_variables_is_complete():
    """Each variable of the table is known, and no other is."""
    documented = [row[0].strip("`") for row in rows("Environment variables")]
    with pytest.raises(InvalidOption) as unknown:
        Environment.read({"LMOE_NO_SUCH_VARIABLE": "1"})
    assert sorted(documented) == re.findall(r"LMOE_\w+", unknown.value.why)
