"""The repository's shape: what is at the top, what is installed, who imports whom."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lmoe_compiler

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = ("models", "passes", "runtime")

# From the bottom up: a module imports only from rows above its own, and from its own package.
LAYERS = (
    ("errors",),
    ("config", "cuts", "dims", "flops"),
    ("debug",),
    ("ir",),
    ("layout",),
    ("operations", "side_effects", "experts"),
    ("sizes",),
    ("symbols",),
    ("recorder", "gradient_stops"),
    ("trace",),
    ("analysis",),
    ("interpreted", "implementation"),
    ("lower",),
    ("codegen",),
    ("capacity",),
    ("runtime",),
    ("checks", "transforms", "stages"),
    ("kernels",),
    ("library",),
    ("call",),
    ("definition",),
    ("passes",),
    ("parallel", "few_tokens"),
    ("backend",),
    ("blocks",),
    ("explain",),
    ("models",),
    ("train", "bench", "dry_run"),
    ("report",),
    ("cli",),
)
# May be imported inside a function: optional, or slow to import and not needed at definition.
LAZY = {"triton", "torch", "matplotlib", "tensorboard", "tokenizers", "rich"}


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for path in listed.stdout.splitlines() if (ROOT / path).exists()]


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the installed package: its dotted name and its file."""
    for folder in ("lmoe_compiler", *MAPPED):
        prefix = "lmoe_compiler" if folder == "lmoe_compiler" else f"lmoe_compiler.{folder}"
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([prefix, *(part for part in inner if part != "__init__")]), path


def imports(tree: ast.AST, *, late: bool = False) -> Iterator[str]:
    """Absolute names of what is imported at run time; with `late`, only inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    for scope in functions if late else [tree]:
        for node in ast.walk(scope):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (
                    f"{node.module}.{alias.name}"
                    if node.module == "lmoe_compiler"
                    else str(node.module)
                    for alias in node.names
                )


def test_top_level_holds_only_the_agreed_names():
    agreed = {
        "lmoe_compiler", "models", "passes", "runtime", "tests", "examples",
        "pyproject.toml", "README.md", "Makefile",
    }  # fmt: skip
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} == agreed


def test_every_package_is_listed_in_pyproject():
    folders = {
        name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in sources()
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_wheel_holds_every_module_and_imports_without_the_repository(tmp_path):
    copy = tmp_path / "source"
    for path in tracked():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    build = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = archive.namelist()
    modules = {name.replace(".", "/") for name, path in sources() if path.name != "__init__.py"}
    assert modules <= {name.removesuffix(".py") for name in names}
    assert "lmoe_compiler/py.typed" in names
    found = subprocess.run(
        [sys.executable, "-c", "import lmoe_compiler.models as m; print(m.__file__)"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith(str(tmp_path / "site"))


COLD_IMPORT = """
import sys
sys.modules["triton"] = None
import lmoe_compiler, torch
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
print(*sorted(name.partition(".")[0] for name in set(sys.modules) - {"triton"}))
"""


def test_import_needs_torch_alone():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", COLD_IMPORT],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert not {"transformers", "matplotlib", "rich", "tokenizers"} & set(ran.stdout.split())


COUNTED = """
import sys, torch, lmoe_compiler.models
assert "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.ones(1, 8, 2, 4)
with FlopCounterMode(display=False) as counter:
    lmoe_compiler.models.RECURRENCES["linear_attention"](q, q, q)
assert counter.get_total_flops() > 0
"""


def test_import_leaves_triton_alone_and_flops_are_counted_all_the_same():
    subprocess.run([sys.executable, "-c", COUNTED], check=True)


def layer(name: str) -> int:
    """The row of LAYERS of a dotted module; the package itself re-exports and is on top."""
    part = [*name.split("."), ""][1]
    rows = [row for row, names in enumerate(LAYERS) if part in names]
    assert rows or not part, f"{name} has no place in LAYERS: give it one"
    return rows[0] if rows else len(LAYERS)


def public_names() -> set[str]:
    return {f"lmoe_compiler.{name}" for name in lmoe_compiler.__all__}


def test_imports_go_one_way():
    wrong = []
    for name, path in sources():
        if name == "lmoe_compiler":
            continue
        for imported in imports(ast.parse(path.read_text())):
            if not imported.startswith("lmoe_compiler."):
                continue
            if (
                name.split(".")[1] in ("models", "train", "generate", "cli")
                and imported in public_names()
            ):
                continue
            same = imported.split(".")[1] == name.split(".")[1]
            if not same and layer(imported) >= layer(name):
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_late_imports_are_the_optional_libraries():
    wrong = [
        f"{name} imports {imported} inside a function"
        for name, path in sources()
        for imported in imports(ast.parse(path.read_text()), late=True)
        if imported.partition(".")[0] not in LAZY
        # Within one package, a late import may close a circle (a node's text is in ir/text.py).
        and imported.split(".")[:2] != name.split(".")[:2]
    ]
    assert not wrong


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folders_cannot_be_imported_by_their_folder_name(folder):
    """`import models` in the repository root makes a second copy of the module; ruff refuses it."""
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    ran = subprocess.run(
        [*ruff, "--stdin-filename", "planted.py", "-"],
        input=f"import {folder}\n\nprint({folder})\n", cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "TID251" in ran.stdout


@pytest.mark.slow
def test_type_checker_sees_every_mapped_folder(tmp_path):
    """Errors planted in every folder are found by the way `make typecheck` looks at the tree."""
    farm = tmp_path / "lmoe_compiler"
    for path in tracked():
        if path.startswith(("lmoe_compiler/", *(f"{name}/" for name in MAPPED))):
            link = farm / path.removeprefix("lmoe_compiler/")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(ROOT / path)
    planted = [f"{folder}/planted.py" for folder in ("ir", *MAPPED)]
    for path in planted:
        (farm / path).write_text("x: int = 'not a number'\n")
    mypy = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml"]
    ran = subprocess.run(
        [*mypy, "--cache-dir", ROOT / ".mypy_cache", "-p", "lmoe_compiler"],
        cwd=tmp_path, env=os.environ | {"MYPYPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    for path in planted:
        assert f"{path}:1: error: Incompatible types in assignment" in ran.stdout, ran.stdout


def test_environment_variables_are_read_in_one_place():
    readers = {
        name
        for name, path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and re.fullmatch(r"LMOE_[A-Z_]+", str(node.value))
    }
    assert readers == {"lmoe_compiler.config"}
