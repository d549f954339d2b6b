"""Products of rows and sources under a diagonal decay, by dyadic local sums.

  A[t, s] = sum_i r[t, i] x[s, i] exp(sum of g[u, i] for u in (s, t])     s < t (strict) or s <= t; (s, t) if exclusive

Every pair s < t is separated by the middle of exactly one dyadic block of 2h rows. In it the upper half's rows decay
from the middle and the lower half's sources decay to it, so each exponent is a sum of g <= 0 of at most h rows, built
up by doubling: nothing overflows, a decay of 0 (g = -inf) is exact, and no long sums are subtracted. See
reference/analysis.md section 4. All tensors are [..., C, K], C a power of two.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """Lower and upper halves [..., C / 2h, h, K] of every block of 2h rows."""
    blocks = x.unflatten(-2, (-1, 2, h))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def levels(g: Tensor, exclusive: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(h, decay of upper rows from the middle, decay of lower rows to the middle) for h = 1, 2, ..., C / 2."""
    to_row = (
        torch.zeros_like(g, memory_format=torch.contiguous_format)
        if exclusive
        else g.clone(memory_format=torch.contiguous_format)
    )
    after = torch.zeros_like(to_row)
    whole = g
    h = 1
    while h < g.shape[-2]:
        lower, upper = halves(after, h)[0], halves(to_row, h)[1]
        yield h, upper.exp(), lower.exp()
        # Local sums of blocks of 2h rows: one half has the other half's whole sum to add.
        of_first, of_second = whole.unflatten(-2, (-1, 2)).split(1, dim=-2)
        upper.add_(of_first)
        lower.add_(of_second)
        whole = (of_first + of_second).squeeze(-2)
        h *= 2


def corner(weights: Tensor, h: int) -> Tensor:
    """[..., C / 2h, h, h]: upper rows against lower sources of every diagonal block of 2h."""
    blocks = weights.unflatten(-1, (-1, 2, h)).unflatten(-4, (-1, 2, h))
    lower_left: Tensor = blocks[..., :, 1, :, :, 0, :]
    return lower_left.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def decayed(r: Tensor, x: Tensor, g: Tensor, strict: bool, exclusive: bool) -> Tensor:
    """A [..., C, C]."""
    r, x, g = torch.broadcast_tensors(r, x, g)
    size = r.shape[-2]
    result = r.new_zeros(*r.shape[:-1], size)
    if not strict:
        result.diagonal(dim1=-2, dim2=-1).copy_((r * x).sum(-1))
    for h, to_row, to_middle in levels(g, exclusive):
        rows, sources = halves(r, h)[1] * to_row, halves(x, h)[0] * to_middle
        corner(result, h).copy_(rows @ sources.mT)
    return result


def decayed_rows(w: Tensor, x: Tensor, g: Tensor, strict: bool, exclusive: bool) -> Tensor:
    """sum over s of w[t, s] x[s] exp(segment): the gradient of A to r, weighted by w [..., C, C]."""
    return _gradients(w, None, x, g, strict, exclusive)[0]


def decayed_cols(w: Tensor, r: Tensor, g: Tensor, strict: bool, exclusive: bool) -> Tensor:
    """sum over t of w[t, s] r[t] exp(segment): the gradient of A to x."""
    return _gradients(w, r, None, g, strict, exclusive)[1]


def decayed_gate(
    w: Tensor, r: Tensor, x: Tensor, g: Tensor, strict: bool, exclusive: bool
) -> Tensor:
    """The gradient of sum(w * A) to g."""
    return decayed_gradients(w, r, x, g, strict, exclusive)[2]


def decayed_gradients(
    w: Tensor, r: Tensor, x: Tensor, g: Tensor, strict: bool, exclusive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of sum(w * A) to r, x and g in one pass over the levels."""
    r, x, g = torch.broadcast_tensors(r, x, g)
    to_rows: list[Tensor] = []
    to_sources: list[Tensor] = []
    d_r, d_x = _gradients(w, r, x, g, strict, exclusive, to_rows, to_sources)
    d_g = _through_levels(to_rows, to_sources, exclusive) if to_rows else torch.zeros_like(d_r)
    return d_r, d_x, d_g


def _gradients(
    w: Tensor,
    r: Tensor | None,
    x: Tensor | None,
    g: Tensor,
    strict: bool,
    exclusive: bool,
    to_rows: list[Tensor] | None = None,
    to_sources: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients to r (given x) and to x (given r); the parts of each level's exponents are appended to the lists."""
    like = r if r is not None else x
    assert like is not None
    shape = torch.broadcast_shapes(like.shape, g.shape, (*w.shape[:-1], like.shape[-1]))
    g = g.expand(shape)
    diagonal = w.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    d_r = like.new_zeros(shape) if strict or x is None else (diagonal * x).expand(shape).clone()
    d_x = like.new_zeros(shape) if strict or r is None else (diagonal * r).expand(shape).clone()
    for h, to_row, to_middle in levels(g, exclusive):
        block = corner(w, h)
        if x is not None:
            d_rows = (block @ (halves(x.expand(shape), h)[0] * to_middle)) * to_row
            halves(d_r, h)[1].add_(d_rows)
        if r is not None:
            d_sources = (block.mT @ (halves(r.expand(shape), h)[1] * to_row)) * to_middle
            halves(d_x, h)[0].add_(d_sources)
        if r is not None and x is not None and to_rows is not None and to_sources is not None:
            to_rows.append(d_rows * halves(r, h)[1])
            to_sources.append(d_sources * halves(x, h)[0])
    return d_r, d_x


def _through_levels(to_rows: list[Tensor], to_sources: list[Tensor], exclusive: bool) -> Tensor:
    """The gradient to g from those to the exponents of every level: the transpose of the doubling in `levels`."""
    half = torch.zeros_like(to_rows[-1])
    d_row = torch.stack((torch.zeros_like(half), to_rows[-1]), dim=-3).flatten(-4, -2)
    d_after = torch.stack((to_sources[-1], torch.zeros_like(half)), dim=-3).flatten(-4, -2)
    d_whole = torch.zeros_like(d_row[..., :2, :])
    h = d_row.shape[-2] // 2
    for level in reversed(range(len(to_rows) - 1)):
        h //= 2
        d_whole = _undoubled(d_whole, d_row, d_after, h)
        halves(d_row, h)[1].add_(to_rows[level])
        halves(d_after, h)[0].add_(to_sources[level])
    return d_whole if exclusive else d_whole + d_row


def _undoubled(d_whole: Tensor, d_row: Tensor, d_after: Tensor, h: int) -> Tensor:
    """Gradient to the whole sums of blocks of h rows, from that to blocks of 2h and to their local sums."""
    of_first = d_whole + halves(d_row, h)[1].sum(-2)
    of_second = d_whole + halves(d_after, h)[0].sum(-2)
    return torch.stack((of_first, of_second), dim=-2).flatten(-3, -2)
