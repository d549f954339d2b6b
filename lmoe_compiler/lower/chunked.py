"""Chunk programs on whole sequences with ATen: forward and backward of rows of equal length.

The sequence is walked in segments of as many chunks as fit the caches; within one, phases.py batches over chunks.
The forward keeps nothing: the backward recomputes the entry state of every segment, then walks them in reverse.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from lmoe_compiler.ir.interpret import Value
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, Var, input_
from lmoe_compiler.layout import Sizes
from lmoe_compiler.lower.adjoint import OUTPUT, adjoint
from lmoe_compiler.lower.chunk import build
from lmoe_compiler.lower.hoist import (
    dependent,
    hoisted,
    inverted,
    rewritten,
    unpadded,
)
from lmoe_compiler.lower.phases import CHUNKS, Carry, Env, Phases
from lmoe_compiler.lower.program import VALID, ChunkProgram, gradient_name
from lmoe_compiler.lower.rows import from_chunks, narrowed, to_chunks, to_head

# Entries of one token input in a segment: its intermediates should stay in the last-level cache.
SEGMENT_ELEMENTS = 1 << 19


@cache
def chunk_form(program: Program) -> ChunkProgram | None:
    return build(program)


@cache
def _forward(program: Program, full: bool, output: bool) -> Phases:
    chunk = chunk_form(program)
    assert chunk is not None
    roots = rewritten([*chunk.next_states, chunk.output], unpadded if full else _as_it_is)
    roots = rewritten(roots, inverted)
    leaves = [var.node for var in program.states]
    following, (result,) = roots[: len(leaves)], roots[len(leaves) :]
    return _phases(list(zip(leaves, following, strict=True)), [], [result] if output else [])


@cache
def _backward(program: Program, full: bool) -> Phases:
    chunk = chunk_form(program)
    assert chunk is not None
    *exits, output = rewritten([*chunk.next_states, chunk.output], unpadded if full else _as_it_is)
    back = adjoint(ChunkProgram(program, tuple(exits), output))
    count = len(exits)
    roots = rewritten([*exits, *back.state_grads, *back.input_grads], inverted)
    leaves = [var.node for var in program.states]
    gradients = [input_(gradient_name(var), var.axes) for var in program.states]
    return _phases(
        list(zip(leaves, roots[:count], strict=True)),
        list(zip(gradients, roots[count : 2 * count], strict=True)),
        roots[2 * count :],
    )


def _as_it_is(node: Node) -> Node:
    return node


def _phases(
    forward: list[tuple[Node, Node]], backward: list[tuple[Node, Node]], roots: list[Node]
) -> Phases:
    leaves = [leaf for leaf, _ in (*forward, *backward)]
    everything = [following for _, following in (*forward, *backward)] + roots
    for leaf in leaves:
        everything = hoisted(everything, leaf, in_loop=False)
    carries = []
    for i, leaf in enumerate(leaves):
        (following,) = hoisted([everything[i]], leaf, in_loop=True)
        carries.append(Carry(leaf, following, reverse=i >= len(forward)))
    return Phases(tuple(_ordered(carries)), tuple(everything[len(leaves) :]))


def _ordered(carries: Sequence[Carry]) -> Iterator[Carry]:
    """Each after those whose leaf its body reads."""
    waiting = list(carries)
    while waiting:
        for carry in waiting:
            others = (c for c in waiting if c is not carry)
            if not any(carry.following in dependent([carry.following], c.leaf) for c in others):
                break
        else:
            raise AssertionError("carried values depend on each other in a circle")
        waiting.remove(carry)
        yield carry


@dataclass(frozen=True)
class Rows:
    """One call on rows of equal padded length: inputs in the call's layouts, and how they are cut."""

    program: Program
    sizes: Sizes
    inputs: Sequence[Tensor]
    lengths: Tensor | None
    chunk: int

    @property
    def length(self) -> int:
        return self.token.shape[1]

    @property
    def token(self) -> Tensor:
        pairs = zip(self.program.inputs, self.inputs, strict=True)
        return next(x for var, x in pairs if var.kind == "token")

    def segments(self) -> list[slice]:
        """Spans of the sequence, multiples of the chunk but for the last."""
        batch, dims = self.token.shape[0], self.sizes.dims
        width = max(prod(dims[a] for a in var.axes) for var in self.program.inputs)
        row = max(1, batch * self.sizes.heads * width)
        size = max(1, SEGMENT_ELEMENTS // (row * self.chunk)) * self.chunk
        return [slice(a, min(a + size, self.length)) for a in range(0, self.length, size)]

    def full(self, span: slice) -> bool:
        return self.lengths is None and (span.stop - span.start) % self.chunk == 0

    def environment(self, span: slice) -> tuple[Env, dict[str, int]]:
        """The leaves of a segment but for what is carried, and the sizes of axes."""
        heads, dtype = self.sizes.heads, self.sizes.accumulate
        env: Env = {}
        for var, x in zip(self.program.inputs, self.inputs, strict=True):
            if var.kind == "token":
                env[_row_leaf(var)] = Value(
                    to_chunks(x[:, span], self.chunk, heads, dtype), (ROW, *var.axes)
                )
            else:
                env[_row_leaf(var)] = Value(to_head(x, heads, dtype), var.axes)
        env[input_(VALID, (ROW,))] = Value(self.valid(span), (ROW,))
        chunks = -(-(span.stop - span.start) // self.chunk)
        sizes = self.sizes.dims | {ROW: self.chunk, SOURCE: self.chunk, CHUNKS: chunks}
        return env, sizes

    def valid(self, span: slice) -> Tensor:
        """1 for a real row: [N, B, 1, C], B = 1 where all rows end together."""
        chunks = -(-(span.stop - span.start) // self.chunk)
        at = torch.arange(chunks * self.chunk, device=self.token.device) + span.start
        if self.lengths is None:
            inside = (at < span.stop)[None]
        else:
            inside = at < self.lengths.to(at.device)[:, None]
        rows: Tensor = inside.to(self.sizes.accumulate).unflatten(1, (chunks, self.chunk))
        return rows.transpose(0, 1).unsqueeze(2)

    def output(self) -> Tensor:
        dims = (self.sizes.dims[a] for a in self.program.output.axes)
        return self.token.new_empty(*self.token.shape[:2], self.sizes.heads, *dims)


def _row_leaf(var: Var) -> Node:
    return input_(var.name, (ROW, *var.axes) if var.kind == "token" else var.axes)


def scan(rows: Rows, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Output [B, T, H, *axes] and final states; `states` [B, H, *axes] in the dtype of accumulation."""
    program, output = rows.program, rows.output()
    now = _by_leaf(program, states)
    for span in rows.segments():
        env, sizes = rows.environment(span)
        (o,), now = _forward(program, rows.full(span), True).run(env, now, sizes)
        axes = (ROW, *program.output.axes)
        _store(o.to(axes), output[:, span], rows.sizes.heads, rows.chunk)
    return output, list(now.values())


def final_states(rows: Rows, states: Sequence[Tensor]) -> list[Tensor]:
    """What `scan` ends with, without the output."""
    *_, last = _entries(rows, states, rows.segments())
    return last


def _entries(
    rows: Rows, states: Sequence[Tensor], segments: Sequence[slice]
) -> Iterator[list[Tensor]]:
    """The states before each segment, and after the last."""
    now = _by_leaf(rows.program, states)
    yield list(now.values())
    for span in segments:
        env, sizes = rows.environment(span)
        _, now = _forward(rows.program, rows.full(span), False).run(env, now, sizes)
        yield list(now.values())


def _by_leaf(program: Program, states: Sequence[Tensor]) -> dict[Node, Tensor]:
    return dict(zip((var.node for var in program.states), states, strict=True))


def _store(chunks: Tensor, into: Tensor, heads: int, size: int) -> None:
    """Values of chunks, the same along dimensions of size 1, into rows [B, T, h, *axes]."""
    count = -(-into.shape[1] // size)
    shape = (count, into.shape[0], heads, size, *into.shape[3:])
    into.copy_(from_chunks(chunks.expand(shape), into.shape[1], into.shape[2]))


def scan_backward(
    rows: Rows, states: Sequence[Tensor], d_output: Tensor | None, d_states: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the inputs and of the initial states; those of heads in the dtype of accumulation."""
    program, segments = rows.program, rows.segments()
    entries = list(_entries(rows, states, segments[:-1]))
    leaves = [input_(gradient_name(var), var.axes) for var in program.states]
    carried = dict(zip(leaves, d_states, strict=True))
    grads = [_gradient_buffer(v, x, rows) for v, x in zip(program.inputs, rows.inputs, strict=True)]
    for span, entry in zip(reversed(segments), reversed(entries), strict=bool(segments)):
        env, sizes = rows.environment(span)
        seed = input_(gradient_name(OUTPUT), (ROW, *program.output.axes))
        env[seed] = Value(_seed(rows, d_output, span), seed.axes)
        ends = _by_leaf(program, entry) | carried
        values, finals = _backward(program, rows.full(span)).run(env, ends, sizes)
        carried = {leaf: finals[leaf] for leaf in leaves}
        for var, value, grad in zip(program.inputs, values, grads, strict=True):
            if var.kind == "token":
                _store(value.to((ROW, *var.axes)), grad[:, span], rows.sizes.heads, rows.chunk)
            else:
                grad += _of_heads(value.to(var.axes), grad, sizes[CHUNKS] * states[0].shape[0])
    for i, (var, x) in enumerate(zip(program.inputs, rows.inputs, strict=True)):
        if var.kind == "head":
            grads[i] = narrowed(grads[i], 0, x.shape[0])
    return grads, list(carried.values())


def _seed(rows: Rows, d_output: Tensor | None, span: slice) -> Tensor:
    """The output's gradient in chunks, zero in padding rows (which repeat the last token)."""
    dtype = rows.sizes.accumulate
    if d_output is None:
        return rows.token.new_zeros((), dtype=dtype)
    chunks = to_chunks(d_output[:, span], rows.chunk, rows.sizes.heads, dtype)
    if not rows.full(span):
        chunks *= rows.valid(span).unflatten(-1, (-1, *[1] * (chunks.dim() - 4)))
    return chunks


def _gradient_buffer(var: Var, x: Tensor, rows: Rows) -> Tensor:
    if var.kind == "token":
        return x.new_empty(x.shape)
    return x.new_zeros(rows.sizes.heads, *x.shape[1:], dtype=rows.sizes.accumulate)


def _of_heads(value: Tensor, like: Tensor, count: int) -> Tensor:
    """A head's gradient [H, *axes]: summed over chunks and batch, also where it is the same in all of them."""
    repeated = count // (value.shape[0] * value.shape[1]) if value.dim() > like.dim() else count
    summed = value.sum((0, 1)) if value.dim() > like.dim() else value
    return (summed * repeated).expand_as(like)
