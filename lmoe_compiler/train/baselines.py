"""What a model must beat: byte n-gram models fitted on the same training text, and zlib.

Witten-Bell interpolation (Witten and Bell 1991): with history h, its count c(h) and the number
d(h) of different bytes seen after it,  p(w | h) = (c(hw) + d(h) p(w | shorter h)) / (c(h) +
d(h)). The shortest history interpolates with the uniform distribution over 256 bytes.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BYTES = 256
_BLOCK = 1 << 22

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]


def _codes(text: Bytes, order: int, start: int, stop: int) -> NDArray[np.int64]:
    """The `order` bytes that end at each position of [start, stop) as one number, base 256."""
    code = np.zeros(stop - start, dtype=np.int64)
    for back in reversed(range(order)):
        code = code * BYTES + text[start - back : stop - back]
    return code


@dataclass(frozen=True)
class NGram:
    """Counts of all strings of 1 to `order` bytes, and a probability for each next byte."""

    order: int
    counts: tuple[NDArray[np.int64], ...]

    @classmethod
    def fit(cls, text: Bytes, order: int) -> NGram:
        counts = []
        for length in range(1, order + 1):
            count = np.zeros(BYTES**length, dtype=np.int64)
            for start in range(length - 1, len(text), _BLOCK):
                codes = _codes(text, length, start, min(start + _BLOCK, len(text)))
                count += np.bincount(codes, minlength=BYTES**length)
            counts.append(count.reshape(-1, BYTES))
        return cls(order, tuple(counts))

    def shorter(self) -> NGram:
        return NGram(self.order - 1, self.counts[:-1])

    def probabilities(self, text: Bytes) -> Floats:
        """p of each byte of `text` after its first order - 1, given the bytes before it."""
        first = self.order - 1
        target = text[first:].astype(np.int64)
        p: Floats = np.full(len(target), 1 / BYTES)
        for length, count in enumerate(self.counts, start=1):
            history = _codes(text, length - 1, first - 1, len(text) - 1) if length > 1 else 0
            total, different = count.sum(axis=1), (count > 0).sum(axis=1)
            seen, kinds = total[history], different[history]
            known = seen + kinds
            p = np.where(known > 0, (count[history, target] + kinds * p) / np.maximum(known, 1), p)
        return p

    def bits_per_byte(self, text: Bytes) -> float:
        return float(-np.log2(self.probabilities(text)).mean())


def zlib_bits_per_byte(text: Bytes) -> float:
    return 8 * len(zlib.compress(text.tobytes(), level=9)) / len(text)


def baselines(train: Bytes, held_out: Bytes) -> dict[str, float]:
    """Held-out bits per byte of every baseline, in the order they are printed."""
    trigram = NGram.fit(train, 3)
    bigram = trigram.shorter()
    return {
        "unigram": bigram.shorter().bits_per_byte(held_out),
        "bigram": bigram.bits_per_byte(held_out),
        "trigram": trigram.bits_per_byte(held_out),
        "zlib": zlib_bits_per_byte(held_out),
    }
