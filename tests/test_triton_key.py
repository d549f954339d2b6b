"""Triton's hash of itself is computed once for many processes, and again when Triton changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmoe_compiler.codegen.triton_key import _hashed, kept
from lmoe_compiler.config import environment


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LMOE_CACHE_DIR", str(tmp_path / "cache"))
    environment.cache_clear()
    yield
    monkeypatch.undo()
    environment.cache_clear()


def test_key_is_computed_once_until_a_file_changes(tmp_path):
    compiler, computed = tmp_path / "compiler.py", []
    compiler.write_text("one")

    def compute():
        computed.append(compiler.read_text())
        return f"key of {computed[-1]}"

    for _ in range(2):
        assert kept(compute, [compiler])() == "key of one"
    assert computed == ["one"]
    compiler.write_text("another")
    assert kept(compute, [compiler])() == "key of another"
    assert computed == ["one", "another"]


def test_the_kept_key_is_tritons_own():
    keys = pytest.importorskip("triton.runtime.cache")
    files = _hashed(Path(keys.__file__).parents[1])
    assert {"libtriton.so", "compiler.py", "core.py"} <= {path.name for path in files}
    own = getattr(keys.triton_key, "__wrapped__", keys.triton_key)
    computed = []
    key = kept(lambda: computed.append(own()) or computed[0], files)
    assert key() == kept(own, files)() == computed[0]
    assert computed[0].startswith("3.")
