"""What a plan costs: bytes, operations and dependent steps read off its kernels, and a device's rates.

Costs are sympy expressions in the lengths B (sequences), T (tokens) and H (heads).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import sympy

from lmoe_compiler.codegen.plan import Kernel, Plan, Value
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node

B, T, H = sympy.symbols("B T H", positive=True, integer=True)

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Device:
    """Rates that bound a kernel: bytes and half-precision operations a second, SMs, one product in a chain.

    `shared` is the shared memory of one SM, in bytes.
    """

    name: str
    sms: int
    bytes_per_second: float
    flops: float
    product_latency: float = 0.25e-6
    shared: int = 228 * 1024


H200 = Device("NVIDIA H200", 132, 4.2e12, 690e12)
H100 = Device("NVIDIA H100", 132, 3.0e12, 650e12)
DEVICES = (H200, H100)


@cache
def device() -> Device:
    """The current device; an unknown one gets an H100's rates and its own number of SMs."""
    import torch

    if not torch.cuda.is_available():
        return H200
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    for known in DEVICES:
        if properties.name.startswith(known.name):
            return known
    own = properties.multi_processor_count, properties.shared_memory_per_multiprocessor
    return replace(H100, name=properties.name, sms=own[0], shared=own[1])


@dataclass(frozen=True)
class Cost:
    """One kernel: bytes through memory, operations, programs, and products in a row that no program can overlap."""

    kernel: str
    bytes: sympy.Expr
    flops: sympy.Expr
    programs: sympy.Expr
    chain: sympy.Expr

    def seconds(self, sizes: dict[sympy.Symbol, int], on: Device = H200) -> dict[str, float]:
        """The three bounds on its time: the largest is the floor of this plan's kernel."""
        at = {s: float(e.subs(sizes)) for s, e in vars(self).items() if isinstance(e, sympy.Expr)}
        waves = max(1.0, at["programs"] / (2 * on.sms))
        return {
            "bytes": at["bytes"] / on.bytes_per_second,
            "arithmetic": at["flops"] / on.flops,
            "latency": waves * at["chain"] * on.product_latency,
        }


def estimate(plan: Plan) -> list[Cost]:
    """One for each kernel; those for chunks of far decays are counted as if there are none."""
    return [_cost(plan, kernel) for kernel in plan.kernels]


def _cost(plan: Plan, kernel: Kernel) -> Cost:
    cut = {load.node: load.value for load in kernel.loads}
    stores = (s.node for s in (*kernel.stores, *kernel.ends))
    nodes = closure([*stores, *(c.following for c in kernel.carries)], cut)
    sizes = plan.size_of | {ROW: plan.chunk, SOURCE: plan.chunk}
    chunks = sympy.ceiling(T / plan.chunk)
    tiles = prod(-(-plan.size_of[axis] // block) for axis, block in kernel.tiles)
    moved = sympy.Integer(0)
    for value in _moved(plan, kernel, nodes, cut):
        rows = {"row": B * T * H, "chunk": B * H * chunks, "head": H}.get(value.per, B * H)
        moved += rows * prod(sizes[a.rstrip("'")] for a in value.axes) * _width(plan, value)
    products = [n for n in nodes if n.op == "dot" and n not in cut]
    flops = sum((2 * B * H * chunks * _volume(n, sizes) for n in products), sympy.Integer(0))
    parallel = kernel.order == "parallel"
    spans = sympy.ceiling(T / kernel.span) if kernel.span else sympy.Integer(1)
    steps = 1 if parallel else chunks / spans
    programs = B * H * tiles * (chunks if parallel else spans)
    chain = sympy.sympify(steps) * (_depth(kernel, nodes, cut) + 1)
    if kernel.levels == "far":
        moved = flops = chain = sympy.Integer(0)
    return Cost(kernel.name, moved, flops, programs, chain)


def _moved(
    plan: Plan, kernel: Kernel, nodes: Sequence[Node], cut: dict[Node, Value]
) -> Iterator[Value]:
    kinds = {var.name: var.kind for var in plan.program.inputs}
    yield from cut.values()
    yield from (s.value for s in (*kernel.stores, *kernel.ends))
    for node in nodes:
        if node.op == "input" and node not in cut:
            axes = tuple(a for a in node.axes if a not in (ROW, SOURCE))
            if ROW in node.axes or kinds.get(node.name) == "token":
                yield Value(node.name, axes, "row", "dot")


def _width(plan: Plan, value: Value) -> int:
    return 4 if value.dtype == "fp32" else DTYPE_BYTES[plan.dtype]


def _volume(node: Node, sizes: dict[str, int]) -> int:
    axes = {a.rstrip("'") if a not in sizes else a for arg in node.args for a in arg.axes}
    return prod(sizes[a] for a in axes)


def _depth(kernel: Kernel, nodes: Sequence[Node], cut: dict[Node, Value]) -> int:
    """Products one after another from a carried value to its next value (of all, where nothing is carried)."""
    leaves = {c.leaf for c in kernel.carries}
    depth: dict[Node, int] = {}
    for node in nodes:
        below = [depth[a] for a in node.args if a in depth] if node not in cut else []
        if node in leaves:
            depth[node] = 0
        elif below or not leaves:
            depth[node] = max(below, default=0) + (node.op == "dot")
    ends = [c.following for c in kernel.carries] or [s.node for s in kernel.stores]
    return max((depth.get(node, 0) for node in ends), default=0)
