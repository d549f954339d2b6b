"""Places of what kernels of one call pass on: values that no kernel needs at once may share a place.

Some lie in results that nothing has been written to yet, the others in a workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

WORKSPACE = -1


class Alive(NamedTuple):
    """When a value is needed: from its first to its last kernel, by number; and by depth, at which kernels may run at
    the same time.

    Kernels run one after another in the order of their numbers, or side by side where none needs what the other
    writes. Only values that are apart in both ways share a place: so no kernel waits for the place of a value.
    """

    first: float
    last: float
    shallow: float
    deep: float

    def beside(self, other: Alive) -> bool:
        return (self.first <= other.last and other.first <= self.last) or (
            self.shallow <= other.deep and other.shallow <= self.deep
        )


def places(
    sizes: Sequence[int], needed: Sequence[Alive], rooms: Sequence[tuple[int, Alive]] = ()
) -> list[tuple[int, int]]:
    """The room of each value (or WORKSPACE) and where it begins there, in bytes.

    `rooms` have a size, and a time in which they are taken. The largest first, each as low as it goes in the first
    room that has place for it.
    """
    found = [(WORKSPACE, 0)] * len(sizes)
    placed: list[int] = []
    for value in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        alive = needed[value]
        free = [(n, size) for n, (size, taken) in enumerate(rooms) if not alive.beside(taken)]
        beside = [i for i in placed if needed[i].beside(alive)]
        for room, size in (*free, (WORKSPACE, inf)):
            taken = sorted((found[i][1], sizes[i]) for i in beside if found[i][0] == room)
            at = _lowest(sizes[value], taken)
            if at + sizes[value] <= size:
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
