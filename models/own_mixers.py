"""Recurrences and MixerSpecs of your own, by where they are: `my_variant.py:name` or `my.module:name`.

So a checkpoint, a TOML file and `lmoe train --mixer` can name what is not in the package.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from lmoe_compiler.errors import InvalidModel


def is_own(mixer: object) -> bool:
    """Whether a mixer is named by file or module, not by a row of the package's table."""
    return isinstance(mixer, str) and ":" in mixer


def absolute(mixer: str) -> str:
    """The same mixer, found from any working directory."""
    place, _, name = mixer.rpartition(":")
    return f"{Path(place).resolve()}:{name}" if place.endswith(".py") else mixer


def own(mixer: str) -> Any:
    """The recurrence or MixerSpec of that name; raises InvalidModel if there is none."""
    place, _, name = absolute(mixer).rpartition(":")
    found = getattr(_module(place), name, None)
    if found is None or isinstance(found, type) or not hasattr(found, "inputs"):
        raise InvalidModel(
            f"{place} has no recurrence or MixerSpec {name!r}",
            why="no such name" if found is None else f"it is a {type(found).__name__}",
            try_=f"@lmoe.recurrence\ndef {name}(S: State[K, V], q: Token[K], ...):   # in {place}",
        )
    return found


@cache
def _module(place: str) -> ModuleType:
    """The module, imported once, so that a recurrence is one object however many layers it has."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        if not Path(place).is_file():
            raise FileNotFoundError(place)
    except (FileNotFoundError, ModuleNotFoundError) as error:
        raise InvalidModel(
            f"there is no file or module {place}",
            why="a mixer of your own is FILE.py:NAME or MODULE:NAME",
            try_="--mixer my_variant.py:my_variant",
        ) from error
    spec = spec_from_file_location(f"{Path(place).stem}_of_{abs(hash(place)):x}", place)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
