"""How large the values of a plan are for a call's lengths, and how many programs its kernels have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from lmoe_compiler.codegen.plan import Kernel, Plan, Value, padded


@dataclass(frozen=True)
class Extent:
    """The lengths of one call: `sequences` is B, or the number of packed documents."""

    batch: int
    length: int
    sequences: int
    varlen: bool

    def slots(self, tokens: int) -> int:
        """Parts of so many tokens in all sequences; packed documents leave at most one slot each unused."""
        if self.varlen:
            return self.length // tokens + self.sequences
        return self.batch * -(-self.length // tokens)


def shape_of(value: Value, plan: Plan, extent: Extent, kernel: Kernel) -> tuple[int, ...]:
    if value.parts:
        return (value.parts, *shape_of(replace(value, parts=0), plan, extent, kernel))
    sizes = plan.size_of | {"s": plan.chunk}
    axes = [sizes[a.rstrip("'")] for a in value.axes]
    if value.per == "row":
        return (extent.batch, extent.length, plan.heads, *axes)
    if value.per == "vector":
        return (plan.heads, extent.batch * extent.length)
    if value.per == "chunk":
        return (extent.slots(plan.chunk), plan.heads, *axes)
    if value.per == "span":
        return (extent.slots(value.span), plan.heads, *axes)
    if value.per == "program":
        return (programs(kernel, plan, extent),)
    if value.per == "scratch":
        blocks = (kernel.block_sizes.get(a, padded(sizes[a])) for a in value.axes)
        return (programs(kernel, plan, extent), plan.chunk, *blocks)
    return (extent.sequences, plan.heads, *axes)


def programs(kernel: Kernel, plan: Plan, extent: Extent) -> int:
    """All on the first axis of the grid, the only one that goes beyond 65535."""
    part = plan.chunk if kernel.order == "parallel" else kernel.span
    rows = extent.slots(part) if part else extent.sequences
    tiles = prod(-(-plan.size_of[axis] // block) for axis, block in kernel.tiles)
    return rows * plan.heads * tiles
