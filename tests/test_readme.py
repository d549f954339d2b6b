"""README's code runs, its links lead somewhere, its tables are what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("block", blocks("sh"))
def test_shell_blocks_name_real_commands(block):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", block, re.MULTILINE)) <= targets
    for path in re.findall(r"\bpython (\S+\.py)", block):
        assert (ROOT / path).exists(), path
