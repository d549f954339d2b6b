"""What every test starts from: one random state, nothing compiled, a cache folder of its own, no LMOE_* settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Kernels and plans that tests generate are kept beside pytest's cache, not in the user's."""
    for name in [name for name in os.environ if name.startswith("LMOE_")]:
        del os.environ[name]
    os.environ["LMOE_CACHE_DIR"] = str(config.rootpath / ".pytest_cache" / "lmoe")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """The same random state, and nothing compiled: Dynamo compiles one function at most 8 times a process."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of this session."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
