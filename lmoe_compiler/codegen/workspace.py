"""Places in the buffer that kernels of one call pass values in: what no kernel needs at once may share a place."""

from __future__ import annotations

from collections.abc import Sequence


def places(sizes: Sequence[int], needed: Sequence[tuple[int, int]]) -> list[int]:
    """Where each value begins, in bytes; `needed` are the first and the last kernel that it is there for.

    The largest first, each as low as it goes.
    """
    found = [0] * len(sizes)
    placed: list[int] = []
    for value in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        first, last = needed[value]
        beside = [i for i in placed if needed[i][0] <= last and first <= needed[i][1]]
        at = 0
        for other in sorted(beside, key=lambda i: found[i]):
            if found[other] < at + sizes[value]:
                at = max(at, found[other] + sizes[other])
        found[value] = at
        placed.append(value)
    return found
