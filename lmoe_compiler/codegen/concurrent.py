"""What may run side by side on the device: kernels that do not touch what the other writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmoe_compiler.codegen.plan import SCANS, Kernel


class Touch(NamedTuple):
    """Bytes that a launch reads or writes: `place` is a tensor, or the part of it that belongs to a section."""

    place: tuple[int, int]
    first: float
    end: float
    written: bool


def depths(kernels: Sequence[Kernel]) -> list[int]:
    """How many kernels each has to wait for, one after another."""
    found: list[int] = []
    written: dict[str, int] = {}
    for kernel in kernels:
        found.append(max((written.get(v.name, -1) for v in kernel.read), default=-1) + 1)
        written |= dict.fromkeys((v.name for v in kernel.written), found[-1])
    return found


def accompanied(kernels: Sequence[Kernel]) -> set[str]:
    """Names of kernels beside which another may run: neither has to wait for the other."""
    behind: dict[str, set[str]] = {}
    writers: dict[str, set[str]] = {}
    for kernel in kernels:
        needed = set[str]().union(*(writers.get(v.name, ()) for v in kernel.read))
        behind[kernel.name] = needed.union(*(behind[name] for name in needed))
        for value in kernel.written:
            writers.setdefault(value.name, set()).add(kernel.name)
    return {
        one
        for one, before in behind.items()
        if any(one != x and x not in before and one not in behind[x] for x in behind)
    }


def longest_first(kernels: Sequence[Kernel]) -> list[Kernel]:
    """In an order in which they may run, of the same depth those first that scan whole sequences.

    These have few programs, which take long. The device gives each an SM if they come before the many of others.
    """
    deep = dict(zip(kernels, depths(kernels), strict=True))
    return sorted(kernels, key=lambda k: (deep[k], k.order not in SCANS or k.span > 0))


def waits(launches: Sequence[Sequence[Touch]]) -> list[tuple[int, ...]]:
    """The launches that each has to wait for, less those that these wait for, in descending order."""
    before: dict[tuple[int, int], list[tuple[int, Touch]]] = {}
    found: list[tuple[int, ...]] = []
    # By launch, as bits: all that it waits for.
    behind: list[int] = []
    for number, touches in enumerate(launches):
        needed = {
            i
            for touch in touches
            for i, other in before.get(touch.place, ())
            if (touch.written or other.written)
            and touch.first < other.end
            and other.first < touch.end
        }
        edges: list[int] = []
        known = 0
        for i in sorted(needed, reverse=True):
            if not known >> i & 1:
                edges.append(i)
                known |= behind[i] | 1 << i
        found.append(tuple(edges))
        behind.append(known)
        for touch in touches:
            here = before.setdefault(touch.place, [])
            if touch.written:
                # What meets an older touch inside of this one meets this one, which waits for the older.
                here[:] = [
                    (i, other)
                    for i, other in here
                    if i == number or other.first < touch.first or touch.end < other.end
                ]
            here.append((number, touch))
    return found
