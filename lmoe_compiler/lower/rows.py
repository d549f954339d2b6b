"""Token tensors as rows of chunks and back, and the scan over chunks.

[B, T, H_group, *axes]  <->  Value [B, H, chunks, C, *axes] with axes (t, *axes)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lmoe_compiler.config import Options
from lmoe_compiler.ir.interpret import Value, evaluate
from lmoe_compiler.ir.nodes import ROW, SOURCE, Node, Program, Var, input_
from lmoe_compiler.lower.ops import RULES
from lmoe_compiler.lower.program import VALID, gradient_name
from lmoe_compiler.lower.schedule import Loop

CHUNK = 64
CHUNKS_DIM = 2


class Rows:
    """Sizes of a call: batch, tokens, heads, chunk length (a power of two), number of chunks."""

    def __init__(
        self,
        program: Program,
        inputs: Sequence[Tensor],
        options: Options,
        valid: Tensor | None = None,
    ) -> None:
        self.program, self.valid = program, valid
        self.sizes: dict[str, int] = {}
        self.heads = 1
        for var, x in zip(program.inputs, inputs, strict=True):
            first = 3 if var.kind == "token" else 1
            self.sizes.update(zip(var.axes, x.shape[first:], strict=True))
            self.heads = max(self.heads, x.shape[first - 1])
            if var.kind == "token":
                self.batch, self.length = x.shape[0], x.shape[1]
        wanted = min(options.chunk_size or CHUNK, max(self.length, 1))
        self.chunk = 1 << (wanted - 1).bit_length()
        self.chunks = -(-self.length // self.chunk)
        self.sizes[ROW] = self.sizes[SOURCE] = self.chunk

    @property
    def output_shape(self) -> tuple[int, ...]:
        axes = self.program.output.axes
        return (self.batch, self.length, self.heads, *(self.sizes[a] for a in axes))

    def shape(self, axes: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.sizes[a] for a in axes)

    def initial(
        self, states: Sequence[Tensor] | None, documents: int, dtype: torch.dtype
    ) -> list[Tensor]:
        if states is not None:
            return [s.to(dtype) for s in states]
        return [
            torch.zeros(documents, self.heads, *self.shape(v.axes), dtype=dtype)
            for v in self.program.states
        ]

    def leaves(self, inputs: Sequence[Tensor], dtype: torch.dtype) -> dict[Node, Value]:
        """Values of the chunk program's token, head and `valid` leaves."""
        env = {}
        for var, x in zip(self.program.inputs, inputs, strict=True):
            if var.kind == "head":
                env[var.node] = Value(self.whole_heads(x, 0).to(dtype)[None, :, None], var.axes)
            else:
                env[input_(var.name, (ROW, *var.axes))] = self.rows(x, var.axes, dtype)
        env[input_(VALID, (ROW,))] = self._valid(dtype)
        return env

    def output_gradient(self, d_output: Tensor, dtype: torch.dtype) -> dict[Node, Value]:
        axes = tuple(a for a in self.program.output.axes)
        return {input_(gradient_name("o"), (ROW, *axes)): self.rows(d_output, axes, dtype)}

    def _valid(self, dtype: torch.dtype) -> Value:
        valid = torch.ones(1, self.length) if self.valid is None else self.valid
        rows = pad_rows(valid.to(dtype), self.chunks * self.chunk, 1)
        return Value(rows.unflatten(1, (self.chunks, self.chunk))[:, None], (ROW,))

    def whole_heads(self, x: Tensor, dim: int) -> Tensor:
        factor = self.heads // x.shape[dim]
        return x.repeat_interleave(factor, dim) if factor > 1 else x

    def rows(self, x: Tensor, axes: tuple[str, ...], dtype: torch.dtype) -> Value:
        x = self.whole_heads(x.transpose(1, 2), 1).to(dtype)
        x = pad_rows(x, self.chunks * self.chunk, 2)
        return Value(x.unflatten(2, (self.chunks, self.chunk)), (ROW, *axes))

    def tokens(self, value: Value, axes: tuple[str, ...]) -> Tensor:
        """[B, T, H, *axes] of a value with rows."""
        shape = (self.batch, self.heads, self.chunks, self.chunk, *self.shape(axes))
        x = value.to((ROW, *axes)).expand(shape).flatten(2, 3)[:, :, : self.length]
        return x.transpose(1, 2)

    def token_gradient(self, value: Value, var: Var, groups: int) -> Tensor:
        """[B, T, groups, *axes]: heads that read one group are summed."""
        grad = self.tokens(value, var.axes)
        return grad if groups == self.heads else grad.unflatten(2, (groups, -1)).sum(3)

    def head_gradient(self, value: Value, var: Var, groups: int) -> Tensor:
        """[groups, *axes]"""
        shape = (self.batch, self.heads, self.chunks, *self.shape(var.axes))
        grad = value.to(var.axes).expand(shape).sum((0, 2))
        return grad if groups == self.heads else grad.unflatten(0, (groups, -1)).sum(1)

    def evaluate(self, roots: Sequence[Node], env: Mapping[Node, Value]) -> list[Value]:
        return evaluate(roots, env, self.sizes, RULES)

    def loop(
        self, loop: Loop, env: Mapping[Node, Value], *, reverse: bool
    ) -> tuple[dict[Node, Value], list[Tensor]]:
        """Each chunk's incoming carried values [B, H, chunks, *axes], and the last outgoing ones."""
        known = {n: v for n, v in env.items() if n not in loop.carried}
        bounds = self.evaluate(loop.bounds, known) if loop.bounds else []
        now = [env[leaf] for leaf in loop.carried]
        shapes = [(self.batch, self.heads, *self.shape(v.axes)) for v in now]
        kept: list[list[Tensor]] = [[] for _ in now]
        order = range(self.chunks - 1, -1, -1) if reverse else range(self.chunks)
        for chunk in order:
            for keep, value in zip(kept, now, strict=True):
                keep.append(value.tensor)
            here = {n: _of_chunk(v, chunk) for n, v in zip(loop.bounds, bounds, strict=True)}
            here.update(zip(loop.carried, now, strict=True))
            following = self.evaluate(loop.following, here)
            now = [
                Value(f.to(v.axes).expand(shape), v.axes)
                for f, v, shape in zip(following, now, shapes, strict=True)
            ]
        entering = {
            leaf: Value(torch.stack(keep[::-1] if reverse else keep, CHUNKS_DIM), value.axes)
            for leaf, keep, value in zip(loop.carried, kept, now, strict=True)
            if keep
        }
        return entering, [v.tensor for v in now]


def _of_chunk(value: Value, chunk: int) -> Value:
    """One chunk of a value that may be the same for all."""
    if value.tensor.dim() - len(value.axes) <= CHUNKS_DIM:
        return value
    return Value(
        value.tensor.select(CHUNKS_DIM, min(chunk, value.tensor.shape[CHUNKS_DIM] - 1)), value.axes
    )


def pad_rows(x: Tensor, rows: int, dim: int) -> Tensor:
    """`x` with zero rows appended along `dim` up to `rows`."""
    missing = rows - x.shape[dim]
    return F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing)) if missing else x
