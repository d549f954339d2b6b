"""Between the layouts of a call and those of a chunk: rows of tokens, cut into chunks; documents as rows of a batch.

  token   [B, T, h, *axes]  <->  [N, B, H, C, *axes]    N chunks of C rows; h groups of heads widened to H
  head    [h, *axes]        <->  [1, 1, H, *axes]
Padding after the end repeats the last token, so that no expression meets a value that no token had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def widened(x: Tensor, dim: int, heads: int) -> Tensor:
    """Head h reads group h // factor."""
    factor = heads // x.shape[dim]
    if factor == 1:
        return x
    return (
        x.unsqueeze(dim + 1)
        .expand(*x.shape[: dim + 1], factor, *x.shape[dim + 1 :])
        .flatten(dim, dim + 1)
    )


def narrowed(x: Tensor, dim: int, groups: int) -> Tensor:
    """The transpose of `widened`."""
    return x if x.shape[dim] == groups else x.unflatten(dim, (groups, -1)).sum(dim + 1)


def to_chunks(x: Tensor, size: int, heads: int, dtype: torch.dtype) -> Tensor:
    """Tokens [B, T, h, *axes], T > 0, as chunks."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat((x, x[:, -1:].expand(-1, missing, *x.shape[2:])), 1)
    chunks = x.unflatten(1, (-1, size)).permute(1, 0, 3, 2, *range(4, x.dim() + 1))
    return widened(chunks.to(dtype), 2, heads).contiguous()


def from_chunks(x: Tensor, length: int, groups: int) -> Tensor:
    """Rows [B, T, h, *axes] of chunks, summed over the heads of a group, padding dropped."""
    rows = narrowed(x, 2, groups)
    return rows.permute(1, 0, 3, 2, *range(4, rows.dim())).flatten(1, 2)[:, :length]


def to_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    return widened(x.to(dtype), 0, heads)[None, None]


@dataclass(frozen=True)
class Packing:
    """Documents of similar length as rows of one padded batch.

    `documents` are their numbers, `tokens` [D, T] the positions of each row's tokens (the last one repeated),
    `lengths` [D] how many there are.
    """

    documents: Tensor
    tokens: Tensor
    lengths: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """Packed tokens [1, T, h, *axes] as rows [D, T, h, *axes]."""
        return x[0, self.tokens]

    def scatter(self, x: Tensor, into: Tensor) -> None:
        """Rows back to packed tokens [1, T, h, *axes]; padding is dropped."""
        real = torch.arange(x.shape[1]) < self.lengths[:, None]
        into[0, self.tokens[real]] = x[real]


def packings(cu_seqlens: Tensor) -> list[Packing]:
    """Every document that has tokens, grouped so that padding at most doubles the rows."""
    bounds: Sequence[int] = cu_seqlens.tolist()
    groups: dict[int, list[int]] = {}
    for n, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            groups.setdefault((stop - start - 1).bit_length(), []).append(n)
    result = []
    for members in groups.values():
        documents = torch.tensor(members)
        starts = cu_seqlens.long().cpu()[documents]
        lengths = cu_seqlens.long().cpu()[documents + 1] - starts
        offsets = torch.arange(int(lengths.max()))
        tokens = starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1)
        result.append(Packing(documents, tokens, lengths))
    return result
