"""Places of what kernels of one call pass on: values that no kernel needs at once may share a place.

Some lie in results that nothing has been written to yet, the others in a workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

WORKSPACE = -1


def places(
    sizes: Sequence[int], needed: Sequence[tuple[int, int]], rooms: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """The room of each value (or WORKSPACE) and where it begins there, in bytes.

    `needed` are the first and the last kernel that a value is there for, `rooms` the size of each and the kernel from
    which on it is taken. The largest first, each as low as it goes in the first room that has place for it.
    """
    choices = [*((n, size, until) for n, (size, until) in enumerate(rooms)), (WORKSPACE, inf, inf)]
    found = [(WORKSPACE, 0)] * len(sizes)
    placed: list[int] = []
    for value in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        first, last = needed[value]
        beside = [i for i in placed if needed[i][0] <= last and first <= needed[i][1]]
        for room, size, until in choices:
            taken = sorted((found[i][1], sizes[i]) for i in beside if found[i][0] == room)
            at = _lowest(sizes[value], taken)
            if last < until and at + sizes[value] <= size:
                found[value] = room, at
                break
        placed.append(value)
    return found


def _lowest(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """The first gap between `taken`, places with their sizes in order."""
    at = 0
    for other, extent in taken:
        if other < at + size:
            at = max(at, other + extent)
    return at
