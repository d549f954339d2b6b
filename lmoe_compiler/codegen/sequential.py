"""Plans of kernels that go token by token, from the graph of one token (token.py) and its adjoint.

Forward:   walk                      states in registers, o written
Backward:  entries  ->  walk  [->  sum_...]
  entries      walks forward, stores the states at the entry of every chunk
  walk         from the end: replays a chunk's states into a scratch, then carries the adjoints back through it
  sum_...      the gradient of a per-head matrix that is a sum of outer products over tokens, as products over chunks

One program per sequence, head and tile of an axis that no carried value contracts; gradients that contract it are
written in parts, added up when all kernels have run. Gradients of per-head inputs are sums over a sequence: no atomics
anywhere.
Next: walk.py prints these kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import reduce
from math import isqrt, prod

from lmoe_compiler.codegen.plan import (
    OUTPUT,
    Call,
    Carry,
    Choice,
    Kernel,
    Load,
    Plan,
    Store,
    Tuning,
    Value,
    padded,
)
from lmoe_compiler.codegen.reach import closure
from lmoe_compiler.codegen.simplify import terms_of
from lmoe_compiler.codegen.tile import to_tiles
from lmoe_compiler.codegen.tiling import Split, split
from lmoe_compiler.codegen.token import token_graph
from lmoe_compiler.ir.nodes import ROW, Node, Program, Var, input_, make, topological
from lmoe_compiler.lower import algebra as al
from lmoe_compiler.lower.adjoint import pull_back
from lmoe_compiler.lower.program import gradient_name

BLOCK = 4096
"""Numbers of one state in a program: at 4 warps 32 registers a thread, beside as many of its adjoint."""

HELD = 32768
"""Numbers that a program may hold in all; per-head matrices beyond that are loaded anew for every token."""

PARAMETERS = Tuning(block=64, num_warps=4, num_stages=1)


def choose(program: Program, length: int) -> Choice:
    """Chunks of about sqrt(T) tokens: entries of all chunks and one chunk's states then take the same memory.

    Vectors are small, and shorter chunks suffice.
    """
    longest = 7 if any(len(var.axes) > 1 for var in program.states) else 6
    chunk = 1 << max(4, min(longest, (isqrt(max(length, 1)) - 1).bit_length()))
    return Choice(chunk=chunk, default=Tuning(block=BLOCK, num_stages=1))


def forward_plan(program: Program, choice: Choice, call: Call) -> Plan:
    output, *states = _tiles(program, call, _token(program))
    ends = [Value(f"{var.name}_end", var.axes, "sequence", "fp32") for var in program.states]
    carries = _carries(program, states, _starts(program, call.has_initial), ends)
    store = Store(output, Value(OUTPUT, program.output.axes, "row", "given"))
    kernel = Kernel("walk", "tokens", carries, (), (store,), (), choice.default)
    return _plan("forward", [_configured(kernel, program, choice, call)], program, choice, call)


def backward_plan(program: Program, choice: Choice, call: Call) -> Plan:
    output, *states = _token(program)
    variables = (*program.inputs, *program.states)
    wanted = pull_back(
        _seeds(program, output, states), [al.interned(var.node) for var in variables]
    )
    roots = _tiles(program, call, [*wanted, *states])
    count, num_states = len(program.inputs), len(program.states)
    grads, before, after = roots[:count], roots[count:-num_states], roots[-num_states:]

    starts = _starts(program, call.has_initial)
    entries = [Value(f"{var.name}_entry", var.axes, "chunk", "fp32") for var in program.states]
    forward = _carries(program, after, starts, [None] * num_states)
    stores = tuple(Store(c.leaf, entry) for c, entry in zip(forward, entries, strict=True))
    first = Kernel("entries", "tokens", forward, (), stores, (), choice.default)

    scratch = [Value(f"{var.name}_replayed", var.axes, "scratch", "fp32") for var in program.states]
    adjoints = [Var(gradient_name(var), "state", var.axes) for var in program.states]
    exits = [
        Value(f"d{var.name}_end", var.axes, "sequence", "fp32") if given else None
        for var, given in zip(program.states, call.has_final_gradient, strict=True)
    ]
    initial = [
        Value(f"d{var.name}_start", var.axes, "sequence", "fp32") if call.has_initial else None
        for var in program.states
    ]
    named = list(zip(program.inputs, grads, strict=True))
    outer = {var.name: terms for var, node in named if (terms := _outer(var, node))}
    rows = {id(n): n for terms in outer.values() for pair in terms for n in pair}
    factors = [
        Store(n, Value(f"factor_{i}", n.axes, "row", "fp32")) for i, n in enumerate(rows.values())
    ]
    walk = Kernel(
        "walk",
        "tokens_reverse",
        _carries(program, before, exits, initial, adjoints),
        (),
        (
            *(
                Store(node, Value(f"d{var.name}", var.axes, "row", "given"))
                for var, node in named
                if var.kind == "token"
            ),
            *factors,
        ),
        (),
        choice.default,
        replay=_carries(program, after, entries, scratch),
        sums=tuple(
            Store(node, Value(f"d{var.name}", var.axes, "sequence", "fp32"))
            for var, node in named
            if var.kind == "head" and var.name not in outer
        ),
    )
    kernels = [_configured(k, program, choice, call) for k in (first, walk)]
    if not outer:
        return _plan("backward", kernels, program, choice, call)
    sums, sizes = _parameters(program, outer, kernels[-1].stores, call)
    return _plan("backward", [*kernels, *sums], program, choice, replace(call, sizes=sizes))


def _token(program: Program) -> list[Node]:
    """Output and next states of one token; equal expressions are one object."""
    states, output = token_graph(program)
    done: dict[Node, Node] = {}
    for node in topological([output, *states]):
        done[node] = al.interned(
            Node(node.op, tuple(done[a] for a in node.args), node.attrs, node.loc)
        )
    return [done[output], *(done[x] for x in states)]


def _seeds(program: Program, output: Node, states: Sequence[Node]) -> dict[Node, Node]:
    seeds = {output: al.interned(input_(gradient_name(OUTPUT), program.output.axes))}
    for var, after in zip(program.states, states, strict=True):
        seed = al.interned(input_(gradient_name(var), var.axes))
        seeds[after] = al.add(seeds[after], seed) if after in seeds else seed
    return seeds


def _tiles(program: Program, call: Call, roots: Iterable[Node]) -> list[Node]:
    values = [var.axes[-1] for var in program.states if len(var.axes) > 1]
    return to_tiles(roots, dict(call.sizes), values, exact=True)


def _starts(program: Program, given: bool) -> list[Value | None]:
    return [
        Value(f"{var.name}_start", var.axes, "sequence", "fp32") if given else None
        for var in program.states
    ]


def _carries(
    program: Program,
    following: Sequence[Node],
    starts: Sequence[Value | None],
    ends: Sequence[Value | None],
    leaves: Sequence[Var] | None = None,
) -> tuple[Carry, ...]:
    """Of the states, or of `leaves` in their place."""
    used = {n.name: n for n in closure(following) if n.op == "input"}
    return tuple(
        Carry(used.get(var.name, var.node), after, var.axes, start, end)
        for var, after, start, end in zip(
            leaves or program.states, following, starts, ends, strict=True
        )
    )


# ---- tiles, warps, what stays in registers


def _configured(kernel: Kernel, program: Program, choice: Choice, call: Call) -> Kernel:
    """The kernel with its tile, its parts, and the warps that hold its numbers."""
    nodes = closure(kernel.roots)
    kernel = _tiled(kernel, nodes, program, call)
    heads = [n for n in nodes if n.op == "input" and _kind(program, n) == "head"]
    held = sum(_numbers(kernel, c.axes, call) for c in (*kernel.carries, *kernel.replay))
    held += sum(_numbers(kernel, s.value.axes, call) for s in kernel.sums)
    held += max((_numbers(kernel, n.axes, call) for n in nodes), default=0)
    kept = []
    for node in sorted(heads, key=lambda n: len(n.axes)):
        numbers = _numbers(kernel, node.axes, call)
        if len(node.axes) < 2 or held + numbers <= HELD:
            kept.append(node.name)
        held += numbers
    warps = 1 << max(0, min(4, (-(-held // 4096) - 1).bit_length()))
    # Products of matrices hold their operands in three parts of tf32 each.
    if any(n.op == "dot" and all(len(a.axes) > 1 for a in n.args) for n in nodes):
        warps = max(warps, 8)
    asked = dict(choice.kernels).get(kernel.name)
    warps = asked.num_warps if asked else warps
    return replace(kernel, kept=tuple(kept), tuning=replace(kernel.tuning, num_warps=warps))


def _tiled(kernel: Kernel, nodes: Sequence[Node], program: Program, call: Call) -> Kernel:
    """The kernel with an axis in tiles of about `tuning.block` numbers, where one is free of contractions."""
    sizes = dict(call.sizes)
    carried = [c.following for c in (*kernel.carries, *kernel.replay)]
    axis, found = _free_axis(nodes, carried, program)
    if not axis:
        return kernel
    rest = max(prod(padded(sizes[a]) for a in var.axes if a != axis) for var in program.states)
    block = max(16, kernel.tuning.block // rest)
    if padded(sizes[axis]) <= block:
        return kernel
    parts = -(-sizes[axis] // block)

    def in_parts(stores: Sequence[Store]) -> tuple[Store, ...]:
        return tuple(
            replace(s, value=replace(s.value, parts=parts, dtype="fp32"))
            if found[s.node] == "part"
            else s
            for s in stores
        )

    return replace(
        kernel,
        tiles=((axis, block),),
        stores=in_parts(kernel.stores),
        sums=in_parts(kernel.sums),
    )


def _free_axis(
    nodes: Sequence[Node], carried: Sequence[Node], program: Program
) -> tuple[str, dict[Node, Split]]:
    """The first axis, values before keys, that no carried value contracts, with how it splits the nodes; or none."""
    for axis in dict.fromkeys(a for var in program.states for a in reversed(var.axes)):
        found = split(nodes, axis, ())
        copied = any(d != axis and d.rstrip("'") == axis for n in nodes for d in n.axes)
        if found is not None and not copied and all(found[n] != "part" for n in carried):
            return axis, found
    return "", {}


def _numbers(kernel: Kernel, axes: Sequence[str], call: Call) -> int:
    sizes, blocks = dict(call.sizes), kernel.block_sizes
    return prod(blocks.get(a.rstrip("'"), padded(sizes[a.rstrip("'")])) for a in axes)


def _kind(program: Program, node: Node) -> str | None:
    return next((var.kind for var in program.inputs if var.name == node.name), None)


# ---- gradients of per-head matrices


def _outer(var: Var, node: Node) -> list[tuple[Node, Node]]:
    """A matrix's gradient of one token as a sum of outer products a b', or nothing where it is none."""
    if var.kind != "head" or len(var.axes) != 2:
        return []
    found = []
    for sign, term in terms_of(node, 1):
        factors = _factors(term)
        if any(len(f.axes) > 1 or not set(f.axes) <= set(var.axes) for f in factors):
            return []
        left = [f for f in factors if f.axes != var.axes[1:]]
        right = [f for f in factors if f.axes == var.axes[1:]]
        if not right or all(not f.axes for f in left):
            return []
        row = reduce(lambda x, y: Node("mul", (x, y)), left)
        found.append(
            (
                row if sign > 0 else Node("neg", (row,)),
                reduce(lambda x, y: Node("mul", (x, y)), right),
            )
        )
    return found


def _factors(node: Node) -> list[Node]:
    return [f for a in node.args for f in _factors(a)] if node.op == "mul" else [node]


def _parameters(
    program: Program,
    outer: dict[str, list[tuple[Node, Node]]],
    stores: Sequence[Store],
    call: Call,
) -> tuple[list[Kernel], tuple[tuple[str, int], ...]]:
    """Kernels that add up a b' over rows, and the plan's sizes with a name for each second axis of its own."""
    sizes = dict(call.sizes)
    values = {id(s.node): s.value for s in stores}
    kernels = []
    for var in program.inputs:
        if var.name not in outer:
            continue
        first, second = var.axes
        other = f"{second.rstrip(chr(39))}_columns"
        sizes[other] = sizes[second.rstrip("'")]
        total = leaf = make("input", name=f"sum_{var.name}", axes=(first, other))
        loads: dict[tuple[int, str], Load] = {}
        for pair in outer[var.name]:
            rows = []
            for node, axis in zip(pair, (first, other), strict=True):
                value = replace(values[id(node)], axes=(axis,))
                load = Load(input_(value.name, (ROW, axis)), value)
                rows.append(loads.setdefault((id(node), axis), load).node)
            total = make("add", total, make("dot", *rows, axis=ROW))
        end = Value(f"d{var.name}", (first, other), "sequence", "fp32")
        carry = Carry(leaf, total, (first, other), None, end)
        block = PARAMETERS.block
        tiles = ((first, block),) if padded(sizes[first]) > block else ()
        kernels.append(
            Kernel(
                f"sum_{var.name}", "forward", (carry,), tuple(loads.values()), (), tiles, PARAMETERS
            )
        )
    return kernels, tuple(sizes.items())


def _plan(
    direction: str, kernels: Sequence[Kernel], program: Program, choice: Choice, call: Call
) -> Plan:
    return Plan(
        program,
        direction,  # type: ignore[arg-type]
        tuple(kernels),
        choice,
        call.sizes,
        call.heads,
        call.input_heads,
        call.dtype,
        call.varlen,
    )
