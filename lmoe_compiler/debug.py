"""`LMOE_DEBUG=ir,fx`: print stages of a real run as they happen, the same text that `lmoe.explain` gives."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lmoe_compiler.config import STAGES, environment


def show(stage: str, title: str, text: Callable[[], str]) -> None:
    """Print `text()` to stderr if this stage is asked for."""
    assert stage in STAGES, stage
    if stage in environment().debug:
        print(heading(f"{stage}: {title}"), text(), sep="\n", file=sys.stderr, flush=True)


def heading(title: str) -> str:
    return f"-- {title} ".ljust(100, "-")
