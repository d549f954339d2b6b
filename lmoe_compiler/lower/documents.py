"""Packed documents as batches: token rows of [1, T, ...] gathered to [n, length, ...] and put back.

Documents of similar length (within a factor of two) share a batch: padding at most doubles the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Documents run as one batch.

    `rows` are their numbers, `index` [n, length] their tokens, `valid` which of those exist. A part without `index` is the whole unpacked batch.
    """

    rows: Tensor | None = None
    index: Tensor | None = None
    valid: Tensor | None = None

    def tokens(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [n, length, ...], zero past each document's end."""
        if self.index is None or self.valid is None:
            return x
        gathered = x[0, self.index]
        return gathered * self.valid.reshape(*self.valid.shape, *(1,) * (x.dim() - 2)).to(x.dtype)

    def states(self, s: Tensor) -> Tensor:
        return s if self.rows is None else s[self.rows]

    def put_tokens(self, into: Tensor, piece: Tensor) -> None:
        if self.index is None or self.valid is None:
            into.copy_(piece)
        else:
            into[0, self.index[self.valid]] = piece[self.valid].to(into.dtype)

    def put_states(self, into: Tensor, piece: Tensor) -> None:
        if self.rows is None:
            into.copy_(piece)
        else:
            into[self.rows] = piece.to(into.dtype)


def parts(cu_seqlens: Tensor | None, length: int) -> list[Part]:
    """Batches that together hold all tokens: one whole part where nothing is packed."""
    if cu_seqlens is None:
        return [Part()] if length else []
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    buckets: dict[int, list[int]] = {}
    for number, tokens in enumerate(lengths.tolist()):
        if tokens:
            buckets.setdefault(int(tokens).bit_length(), []).append(number)
    found = []
    for numbers in buckets.values():
        rows = torch.tensor(numbers, device=cu_seqlens.device)
        longest = int(lengths[rows].max())
        offsets = torch.arange(longest, device=cu_seqlens.device)
        valid = offsets < lengths[rows, None]
        index = torch.where(valid, starts[rows, None] + offsets, 0)
        found.append(Part(rows, index, valid))
    return found
