"""Cuts a tile graph into kernels by what each node depends on: the carried state, the carried adjoint, both or neither.

A kernel is the closure of what it stores and carries, cut at what an earlier kernel stored. An axis that no node of
the kernel contracts may be tiled over programs. `prepare`, a kernel parallel over chunks, stores factors that depend on
no state: inverses of triangular systems, decayed products, scaled rows. Which kernels there are say forward.py,
backward.py and recomputing.py.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from lmoe_compiler.codegen.concurrent import longest_first
from lmoe_compiler.codegen.names import identifier
from lmoe_compiler.codegen.near_form import near_form
from lmoe_compiler.codegen.plan import (
    Call,
    Carry,
    Choice,
    Kernel,
    Load,
    Order,
    Passed,
    Plan,
    Store,
    Value,
    padded,
)
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import bare, merge_levels, merge_sums
from lmoe_compiler.codegen.spans import span_carries
from lmoe_compiler.codegen.tile import Builder, inside_levels
from lmoe_compiler.codegen.tiling import split
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program

FAR_RESULTS = 4
"""Rows made of sums over levels that one far kernel stores at most: five spill."""


def near_and_far(kernel: Kernel, cut: Mapping[Node, Value], exact: bool) -> list[Kernel]:
    """A kernel for chunks whose decays are all near, and those that redo the others.

    In one kernel the registers of the loop over levels would be taken from every chunk; alone, it has them of twice
    the warps.
    """
    reach = Value(f"{kernel.name}_reach", (), "program", "fp32")
    stores = near_form(kernel.stores, cut, exact, kernel.tuning.full)
    found = [replace(kernel, levels="near", reach=reach, stores=stores)]
    tuning = replace(kernel.tuning, num_warps=min(8, 4 * kernel.tuning.num_warps))
    for own in _shared_out(_levels_merged(kernel.stores, cut), cut):
        nodes = set(closure([s.node for s in own], cut))
        loads = tuple([load for load in kernel.loads if load.node in nodes])
        name = f"{kernel.name}_far{f'_{len(found)}' if len(found) > 1 else ''}"
        far = replace(kernel, name=name, levels="far", reach=reach, tuning=tuning)
        found.append(replace(far, loads=loads, stores=tuple(own)))
    return found


def _shared_out(stores: Sequence[Store], cut: Mapping[Node, Value]) -> list[Sequence[Store]]:
    """What each far kernel stores: all, or of too many rows of sums one half, and all else."""
    rows = [s for s in stores if s.value.per == "row" and SOURCE not in s.value.axes]
    sums = [s for s in rows if any(n.op == "level_sum" for n in closure([s.node], cut))]
    if len(sums) <= FAR_RESULTS:
        return [stores]
    half = sums[: len(sums) // 2]
    return [half, [s for s in stores if s not in half]]


def _levels_merged(stores: Sequence[Store], cut: Mapping[Node, Value]) -> tuple[Store, ...]:
    """The same values with each sum of sums over levels as one."""
    roots, loaded = [s.node for s in stores], {n: n for n in cut}
    found = merge_sums(Builder(), roots, closure(roots, cut), loaded, merge_levels)
    return tuple([replace(s, node=root) for s, root in zip(stores, found, strict=True)])


def dependences(
    nodes: Sequence[Node], names: frozenset[str], known: Container[Node] = ()
) -> dict[Node, frozenset[str]]:
    """Which of the leaves `names` each node depends on, other than through what is `known`."""
    found: dict[Node, frozenset[str]] = {}
    for node in nodes:
        if node in known:
            found[node] = frozenset()
        elif node.op == "input":
            found[node] = names & {node.name}
        else:
            found[node] = frozenset().union(*(found[a] for a in node.args))
    return found


@dataclass
class Partition:
    """Kernels made so far, and what they left in memory."""

    program: Program
    choice: Choice
    call: Call
    kernels: list[Kernel] = field(default_factory=list)
    stored: dict[Node, Value] = field(default_factory=dict)
    passed: tuple[Passed, ...] = ()

    def add(
        self,
        name: str,
        order: Order,
        carries: Sequence[Carry],
        stores: Sequence[Store],
        span: int = 0,
        skip_last: bool = False,
        ends: Sequence[Store] = (),
        known: Mapping[Node, Value] | None = None,
    ) -> Kernel:
        """A kernel that computes `stores`, `ends` and the carries' next values; its loads follow from what is stored,
        and from what else is `known`.
        """
        leaves = {c.leaf for c in carries}
        cut = {n: v for n, v in (self.stored | dict(known or {})).items() if n not in leaves}
        roots = [*(s.node for s in (*stores, *ends)), *(c.following for c in carries)]
        nodes = closure(roots, cut)
        loads = tuple(Load(n, cut[n]) for n in nodes if n in cut)
        tuning = self.choice.tuning(name)
        blocks = (tuning.block, tuning.block_second)
        axes = [c.axes for c in carries] or [var.axes for var in self.program.states]
        following = [c.following for c in carries]
        tiles, parts = self.tiles(order, nodes, cut, [*stores, *ends], following, axes, blocks)
        stores, ends = (
            [
                replace(s, value=replace(s.value, parts=parts[s.node], dtype="fp32"))
                if s.node in parts
                else s
                for s in each
            ]
            for each in (stores, ends)
        )
        inner = (
            self.inner(nodes, cut, [axis for axis, _ in tiles], tuning.inner)
            if order == "parallel"
            else ()
        )
        kernel = Kernel(
            name,
            order,
            tuple(carries),
            loads,
            tuple(stores),
            tiles,
            tuning,
            span,
            inner,
            skip_last,
            ends=tuple(ends),
        )
        sums = [n for n in nodes if n.op == "level_sum" and n not in cut]
        alone = order != "parallel" or not sums
        self.kernels += [kernel] if alone else near_and_far(kernel, cut, self.call.exact)
        # States of spans are what other scans start from.
        left = (s for s in stores if s.node.op != "const" and s.value.per != "span")
        self.stored.update({s.node: s.value for s in left})
        return kernel

    def tiles(
        self,
        order: Order,
        nodes: Sequence[Node],
        cut: Mapping[Node, Value],
        stores: Sequence[Store],
        following: Sequence[Node],
        carried: Sequence[Sequence[str]],
        blocks: tuple[int, int],
    ) -> tuple[tuple[tuple[str, int], ...], dict[Node, int]]:
        """Tiled axes with their tiles, and the stores that are sums of parts with their number of parts.

        Of the axes that are carried, values come first. A scan cannot wait for a sum: what it carries is free of
        contractions. Row sums (one number per token) may be left in parts.
        """
        sizes = dict(self.call.sizes)
        axes = dict.fromkeys(a for each in carried for a in reversed(each))
        tiles: list[tuple[str, int]] = []
        parts: dict[Node, int] = {}
        for axis in axes:
            block = blocks[len(tiles)] if len(tiles) < len(blocks) else 0
            found = split(nodes, axis, cut)
            if not block or padded(sizes[axis]) <= block or found is None or parts:
                continue
            sums = [s for s in stores if found[s.node] == "part"]
            if any(s.value.axes for s in sums) or any(found[n] == "part" for n in following):
                continue
            if "tile" in (found[s.node] for s in stores) or order != "parallel":
                tiles.append((axis, block))
                parts |= {s.node: -(-sizes[axis] // block) for s in sums}
        return tuple(tiles), parts

    def inner(
        self, nodes: Sequence[Node], cut: Mapping[Node, Value], tiled: Sequence[str], block: int
    ) -> tuple[tuple[str, int], ...]:
        """The axis that programs walk in tiles: keys first, for what has them is what fills registers."""
        sizes = dict(self.call.sizes)
        axes = dict.fromkeys(a for var in self.program.states for a in var.axes)
        for axis in (a for a in axes if a not in tiled):
            found = split(nodes, axis, cut, looped=True) or {}
            walked = {"part", "tile"} & set(found.values())
            if block and padded(sizes[axis]) > block and walked:
                return ((axis, block),)
        return ()

    def spans(self, name: str, order: Order, carries: list[Carry]) -> list[Carry]:
        """Carries of a scan whose spans run side by side, after kernels for their maps; as given where not cut."""
        span = self.choice.span
        sizes = dict(self.call.sizes)
        found = span_carries(carries, span, sizes) if span else None
        if found is None:
            return carries
        sizes |= {axis: sizes[original] for axis, original in found.columns.items()}
        self.call = replace(self.call, sizes=tuple(sizes.items()))
        if found.matrices:
            self.add(f"{name}_matrix", order, found.matrices, (), span, skip_last=True)
        self.add(name, order, found.sums, (), span, skip_last=True)
        return found.scan

    def passing(self, carries: Sequence[Carry]) -> list[Carry]:
        """Carries of the scan of a section, which starts with what the section before it ends with."""
        found = []
        for carry in carries:
            name = identifier(carry.leaf.name)
            into, out = (
                Value(f"{name}_{n}", carry.axes, "sequence", "fp32") for n in ("into", "out")
            )
            assert carry.end is not None
            self.passed += (Passed(into, out, carry.start, carry.end),)
            found.append(replace(carry, start=into, end=out))
        return found

    def span(self, carries: Sequence[Carry]) -> int:
        """The span of a scan with these carries."""
        return self.choice.span if any(c.through for c in carries) else 0

    def prepare(self, nodes: Sequence[Node], carried: frozenset[str]) -> None:
        """The kernel that stores the factors of products which depend on nothing carried."""
        if stores := self.factors(nodes, carried):
            self.add("prepare", "parallel", (), stores)

    def factors(
        self, nodes: Sequence[Node], carried: frozenset[str], only_pairs: bool = False
    ) -> list[Store]:
        """Of products that depend on nothing carried but what is stored: [C, C] blocks and, if chosen, scaled rows.

        An inverse times computed values stays fp32, and multiplies in tf32: where keys repeat those sums cancel.
        """
        depends = dependences(nodes, carried, self.stored)
        levels, values = inside_levels(nodes), set(value_axes(self.program))
        if self.choice.recompute:  # gradients of keys are scanned too
            values |= {a for var in self.program.states for a in var.axes}
        found: dict[Node, Value] = {}
        direct = _meets_loads(nodes)
        for node in nodes:
            if not (depends[node] or values & set(node.axes)) or node in levels:
                continue
            for operand in node.args:
                factor = operand.args[0] if operand.op == "rename" else operand
                if factor in found or factor in self.stored or depends[factor]:
                    continue
                if only_pairs and SOURCE not in factor.axes:
                    continue
                value = self.factor(node, factor, f"{len(self.stored) + len(found)}")
                if value is not None:
                    solves = factor.op == "inverse" and factor not in direct
                    found[factor] = replace(value, dtype="fp32") if solves else value
        return [Store(factor, value) for factor, value in found.items()]

    def factor(self, user: Node, factor: Node, number: str) -> Value | None:
        """The value that keeps `factor`, an operand of `user`, or None where scans compute it themselves."""
        axes = tuple(a for a in factor.axes if a != ROW)
        multiplies = user.op == "dot" and user["axis"] in (ROW, SOURCE)
        if set(factor.axes) == {ROW, SOURCE} and (multiplies or factor.op == "level_sum"):
            return Value(f"{_label(factor)}_{number}", (SOURCE,), "row")
        if factor.op == "input" or not _has_token(factor):
            return None
        if factor.axes in ((ROW,), ()) and user.op != "dot":
            per: Literal["vector", "chunk"] = "vector" if factor.axes else "chunk"
            return Value(f"{per}_{number}", (), per, "fp32")
        if not self.choice.prepare_rows:
            return None
        if user.op == "dot" and ROW in factor.axes and len(axes) == 1 and axes[0] != SOURCE:
            return Value(f"rows_{number}", axes, "row")
        if len(axes) == 1 and ROW not in factor.axes and SOURCE not in factor.axes:
            return Value(f"chunk_{number}", axes, "chunk", "fp32")
        return None

    def plan(self, direction: str) -> Plan:
        return Plan(
            self.program,
            direction,  # type: ignore[arg-type]
            tuple(longest_first(self.kernels)),
            self.choice,
            self.call.sizes,
            self.call.heads,
            self.call.input_heads,
            self.call.dtype,
            self.call.varlen,
            self.passed,
        )


def value_axes(program: Program) -> list[str]:
    return [var.axes[-1] for var in program.states if len(var.axes) > 1]


def named(nodes: Iterable[Node]) -> dict[str, Node]:
    return {n.name: n for n in nodes if n.op == "input"}


def _meets_loads(nodes: Iterable[Node]) -> set[Node]:
    """The operands of products with a block that is an input of the recurrence."""
    pairs = [[bare(a) for a in n.args] for n in nodes if n.op == "dot"]
    return {x for a, b in pairs for x, y in ((a, b), (b, a)) if y.op == "input"}


def _has_token(node: Node) -> bool:
    return any(n.op == "input" and ROW in n.axes for n in closure([node]))


def _label(node: Node) -> str:
    return "inverse" if has_inverse(node) else "pairs"


def has_inverse(node: Node) -> bool:
    return node.op == "inverse" or (node.op == "mul" and any(has_inverse(a) for a in node.args))
