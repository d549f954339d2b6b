"""FLOP formulas of our ops, handed to torch's counter when somebody imports it.

`torch.utils.flop_counter` imports triton where it is installed, and importing us must not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
Formula = Callable[..., int]
_waiting: list[tuple[Any, Formula, bool]] = []


def flop_formula(op: Any, *, get_raw: bool = False) -> Callable[[Formula], Formula]:
    """Registers the decorated function as `op`'s formula, now or once the counter is there.

    It is given shapes, with `get_raw` the tensors themselves, and returns the number of operations.
    """

    def keep(formula: Formula) -> Formula:
        _waiting.append((op, formula, get_raw))
        if COUNTER in sys.modules:
            _hand_over(sys.modules[COUNTER])
        return formula

    return keep


def _hand_over(counter: ModuleType) -> None:
    while _waiting:
        op, formula, get_raw = _waiting.pop()
        counter.register_flop_formula(op, get_raw=get_raw)(formula)


class _Counter(MetaPathFinder):
    """Sees the import of the counter once, and hands over after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _hand_over(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if COUNTER not in sys.modules:
    sys.meta_path.insert(0, _Counter())
