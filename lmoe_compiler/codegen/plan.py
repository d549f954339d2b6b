"""Plans: which kernels run, what each carries, loads and stores, and how it is tiled. Frozen data, no decisions.

A `Choice` is what the rules pick (rules.py); `partition.py` turns a tile graph and a choice into a `Plan`;
`triton.py` prints each `Kernel`; `run.py` allocates the values and launches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lmoe_compiler.ir.nodes import Node, Program, Var

Order = Literal["forward", "reverse", "parallel", "step", "tokens", "tokens_reverse"]
SCANS = ("forward", "reverse")
WALKS = ("tokens", "tokens_reverse")


@dataclass(frozen=True)
class Tuning:
    """How one kernel is tiled and launched.

    block, block_second   tile of the first and second axis that may be tiled (0: whole), values first
    inner                 tile of an axis that a kernel parallel over chunks loops over itself (0: whole)
    full                  products with a computed block take it in fp32 (tf32), not rounded to half precision
    offsets               a row's address is a base and offsets that are added up first, not pointers step by step
    ahead                 in a scan every load is copied to shared memory while chunks before are worked on, not only
                          those that products take as they are
    registers             the most that a thread may have (0: 255): fewer let more programs share an SM
    """

    block: int = 64
    block_second: int = 0
    num_warps: int = 4
    num_stages: int = 2
    inner: int = 0
    full: bool = False
    offsets: bool = False
    ahead: bool = False
    registers: int = 0


@dataclass(frozen=True)
class Choice:
    """What the rules decide for one call.

    chunk      rows of one chunk
    span       tokens of the parts that each sequence is cut into, scanned side by side (0: not cut); a power of two
    section    backward only: tokens of each sequence whose states are in memory at a time, from the end (0: all); a
               multiple of KEPT_SPAN
    overlap    with sections: whether two are in memory, and their kernels run side by side
    prepare    whether [C, C] factors that depend on no state are computed once, in a kernel of their own
    prepare_rows   also the rows scaled by vector decays, and the chunk's total decay
    products   backward only: contractions over the values' axis in a kernel of their own; with `recompute` those of
               pairs, after the adjoint
    recompute  backward only: where each of their terms needs one carried value at most, gradients are written by scans
               that carry it again, and nothing is stored of chunks (recomputing.py)
    kernels    tuning by kernel name; `default` for the others
    """

    chunk: int = 64
    span: int = 0
    section: int = 0
    overlap: bool = False
    prepare: bool = False
    prepare_rows: bool = False
    products: bool = False
    recompute: bool = False
    default: Tuning = Tuning()
    kernels: tuple[tuple[str, Tuning], ...] = ()

    def tuning(self, kernel: str) -> Tuning:
        return dict(self.kernels).get(kernel, self.default)


@dataclass(frozen=True)
class Value:
    """A tensor between kernels, or to or from the caller.

    per row       [B, T, H, *axes]; the axis `s` has the length of a chunk
    per vector    [H, B * T], one number per token, contiguous along the tokens of a head
    per chunk     [slots, H, *axes], a slot per chunk of each sequence
    per sequence  [N, H, *axes]
    per span      [slots, H, *axes], a slot per `span` tokens of each sequence
    per head      [H, *axes], read only
    per scratch   [programs, C, *blocks], a value per token of a chunk, of one program only
    per program   [programs], one number

    With `parts` it is a sum over a leading axis of that length, one part per tile of the kernel that stores it: kernels
    that read it add them up.
    A value of the `whole` call comes from the caller or goes to it; others are of one section where there are any.
    `of_next` is that of the span after this one, zeros after a sequence's last.
    """

    name: str
    axes: tuple[str, ...]
    per: Literal["row", "vector", "chunk", "sequence", "span", "head", "scratch", "program"]
    dtype: Literal["dot", "fp32", "given"] = "dot"
    parts: int = 0
    span: int = 0
    whole: bool = False
    of_next: bool = False


@dataclass(frozen=True)
class Passed:
    """A carried value between sections: `out` of one is `into` the next. The first starts as `given`, or zero."""

    into: Value
    out: Value
    given: Value | None
    result: Value


@dataclass(frozen=True)
class Carry:
    """A value carried from chunk to chunk: `leaf` inside the body, `following` after it.

    It starts as `start`, or the identity, or `fill` everywhere. Where spans are scanned side by side, a span's start
    is then carried through those scanned before it: x <- m_j x + sum_j, the values in `through` (m has axes of the
    state, or is a matrix whose second axis stands for the state's first).
    """

    leaf: Node
    following: Node
    axes: tuple[str, ...]
    start: Value | None
    end: Value | None
    fill: float = 0.0
    identity: bool = False
    through: tuple[Value, Value] | None = None


@dataclass(frozen=True)
class Load:
    node: Node
    value: Value


@dataclass(frozen=True)
class Store:
    node: Node
    value: Value


@dataclass(frozen=True)
class Kernel:
    """One launch. `order` says how its programs walk the chunks; `parallel` is one program per chunk, `step` one token.

    `tokens` walks a sequence token by token, `tokens_reverse` from its end: their graphs are of one token.

    span        tokens of the part of a sequence that one program scans (0: all of it)
    skip_last   the result of the part that is scanned last is not needed
    tiles       axis tiled over programs -> tile size
    inner       axis that each program walks in tiles -> tile size; every other axis is whole in a program
    replay      `tokens_reverse`: states recomputed through each chunk, from its entry (start) to a scratch (end)
    sums        values added up over the tokens of a sequence, stored at its end
    ends        of a scan: values of what it carries after the last chunk of a sequence or span, stored then
    kept        per-head inputs that stay in registers for the whole walk
    levels      which chunks' sums over levels are right: `all`, those of the `near` level only, or the `far` others
    reach       how far from 0 log decays sum up in a program's chunk: written by the near kernel, read by the far one
    """

    name: str
    order: Order
    carries: tuple[Carry, ...]
    loads: tuple[Load, ...]
    stores: tuple[Store, ...]
    tiles: tuple[tuple[str, int], ...]
    tuning: Tuning
    span: int = 0
    inner: tuple[tuple[str, int], ...] = ()
    skip_last: bool = False
    replay: tuple[Carry, ...] = ()
    sums: tuple[Store, ...] = ()
    ends: tuple[Store, ...] = ()
    kept: tuple[str, ...] = ()
    levels: Literal["all", "near", "far"] = "all"
    reach: Value | None = None

    @property
    def tuned_as(self) -> str:
        """Its name in a Choice: a far kernel has the tiles of its near kernel."""
        return self.name.partition("_far")[0]

    @property
    def roots(self) -> tuple[Node, ...]:
        """What the kernel computes: stored values, next values of what it carries."""
        stores = [s.node for s in (*self.stores, *self.sums, *self.ends)]
        return (*stores, *(c.following for c in (*self.carries, *self.replay)))

    @property
    def written(self) -> tuple[Value, ...]:
        """Tensors that it writes."""
        ends = [c.end for c in (*self.carries, *self.replay) if c.end is not None]
        reach = [self.reach] if self.reach is not None and self.levels == "near" else []
        stores = (*self.stores, *self.sums, *self.ends)
        return (*(s.value for s in stores), *ends, *reach)

    @property
    def read(self) -> tuple[Value, ...]:
        """Tensors of the plan that it reads, beside the caller's inputs."""
        starts = [c.start for c in (*self.carries, *self.replay) if c.start is not None]
        maps = [v for c in self.carries for v in c.through or ()]
        reach = [self.reach] if self.reach is not None and self.levels == "far" else []
        return (*(load.value for load in self.loads), *starts, *maps, *reach)

    @property
    def walks(self) -> bool:
        return self.order in WALKS

    @property
    def tile_sizes(self) -> dict[str, int]:
        return dict(self.tiles)

    @property
    def block_sizes(self) -> dict[str, int]:
        """Every axis that is not whole in a block."""
        return dict(self.tiles + self.inner)


@dataclass(frozen=True)
class Plan:
    """All kernels of one call. `inputs` are [name, axes, heads] of the tensors given by the caller."""

    program: Program
    direction: Literal["forward", "backward", "step"]
    kernels: tuple[Kernel, ...]
    choice: Choice
    sizes: tuple[tuple[str, int], ...]
    heads: int
    input_heads: tuple[tuple[str, int], ...]
    dtype: str
    varlen: bool
    passed: tuple[Passed, ...] = ()

    @property
    def chunk(self) -> int:
        return self.choice.chunk

    @property
    def walks(self) -> bool:
        """Whether it goes token by token: products are then of fp32 states, and stay that exact."""
        return any(kernel.walks for kernel in self.kernels)

    @property
    def size_of(self) -> dict[str, int]:
        return dict(self.sizes)


LENGTHS = ("N", "TOKENS", "PROGRAMS", "T_0", "T_ALL", "T")
"""Parameters of kernels that are numbers, not addresses: they differ from call to call."""

FAR = 8
"""Programs of a near kernel that one program of its far kernel looks after: most have nothing to do but end."""

OUTPUT = "o"


@dataclass(frozen=True)
class Call:
    """What a plan is made for: everything of a call that changes the kernels' text."""

    sizes: tuple[tuple[str, int], ...]
    heads: int
    input_heads: tuple[tuple[str, int], ...]
    dtype: str
    varlen: bool = False
    has_initial: bool = False
    has_final_gradient: tuple[bool, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether sums over rows must keep every digit of fp32."""
        return self.dtype == "fp32"


KEPT_SPAN = 512
"""Tokens between the states that a forward keeps, so that its backward starts from all of them at once."""


def kept_states(program: Program) -> tuple[Value, ...]:
    """What the forward stores of each state for the backward: its value at the start of every span."""
    return tuple(
        replace(state_value(f"{var.name}_kept", var, "span"), span=KEPT_SPAN, whole=True)
        for var in program.states
    )


def state_value(name: str, var: Var, per: Literal["chunk", "span"]) -> Value:
    """A state in memory: matrices in the products' type; vectors are small, and quotients by them cancel."""
    return Value(name, var.axes, per, "dot" if len(var.axes) > 1 else "fp32")


def padded(size: int) -> int:
    """Length of a whole axis in a program: a power of two, at least 16 (the least side of a tensor-core product)."""
    return max(16, 1 << (size - 1).bit_length())
