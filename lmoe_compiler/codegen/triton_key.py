"""Triton's key of itself, kept between processes.

At its first kernel a process hashes all of Triton's compiler (a library of 460 MB): 0.2 to 0.5 s, most of a first call
that finds its kernels in Triton's cache. The key stays the same while those files do, so it is kept in our cache folder
under their sizes and times.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from lmoe_compiler.config import environment


@cache
def keep_triton_key() -> None:
    """From now on Triton's key comes from the file, where there is one. Called once kernels are loaded."""
    from triton.runtime import cache as keys

    if hasattr(keys, "triton_key"):
        keys.triton_key = kept(keys.triton_key, _hashed(Path(keys.__file__).parents[1]))


def kept(compute: Callable[[], str], files: Iterable[Path]) -> Callable[[], str]:
    """`compute`, whose result depends on these files, with its result kept on disk."""

    @cache
    def key() -> str:
        stats = [(str(path), path.stat()) for path in sorted(files)]
        stamp = repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
        digest = hashlib.sha256(stamp.encode()).hexdigest()[:16]
        place = environment().cache_dir / f"triton-{digest}.key"
        if place.exists():
            return place.read_text()
        found = compute()
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(found)
        os.replace(draft, place)
        return found

    return key


def _hashed(triton: Path) -> list[Path]:
    """The files that Triton hashes, and a few more."""
    sources = [
        path
        for name in ("backends", "compiler", "language", "runtime")
        for path in (triton / name).rglob("*.py")
    ]
    return [*sources, triton / "__init__.py", *(triton / "_C").glob("libtriton.*")]
