"""Device functions that generated kernels import: one per tile operation that is longer than a line.

Shapes: `C` rows of a chunk, [C, C] pairs with the row t first and its source s second, [C, D] rows of vectors.
`SPLIT` says that sums run as two bf16 products (half-precision inputs) instead of one fp32-accurate product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p(x):
    """log(1 + x) without the loss of small x."""
    return tl.where(tl.abs(x) < 1e-3, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), tl.log(1.0 + x))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def logsigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    small = tl.abs(x) * (1.0 - x * x * (1.0 / 3.0))
    magnitude = tl.where(tl.abs(x) < 1e-2, small, large)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def isfinite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def power(x, exponent):
    """x ** exponent for x >= 0."""
    return tl.where(x > 0.0, tl.exp(exponent * tl.log(x)), tl.where(exponent == 0.0, 1.0, 0.0))


@triton.jit
def masked_sums(mask, x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """[C, D]: sums of the rows of x that `mask` [C, C] picks, on tensor cores; nothing is ever subtracted."""
    if SPLIT:
        weight = mask.to(tl.bfloat16)
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(weight, high) + tl.dot(weight, low)
    return tl.dot(mask.to(tl.float32), x, input_precision=PRECISION)


@triton.jit
def exclusive_prefix(x, C: tl.constexpr):
    """Sums of earlier rows, without a difference of sums."""
    t = tl.arange(0, C)
    before = t[:, None] > t[None, :]
    if len(x.shape) == 1:
        sums = tl.sum(tl.where(before, x[None, :], 0.0), 1)
    else:
        sums = tl.dot(before.to(tl.float32), x, input_precision="tf32x3")
    return sums


@triton.jit
def exclusive_suffix(x, C: tl.constexpr):
    """Sums of later rows, without a difference of sums."""
    t = tl.arange(0, C)
    after = t[:, None] < t[None, :]
    if len(x.shape) == 1:
        sums = tl.sum(tl.where(after, x[None, :], 0.0), 1)
    else:
        sums = tl.dot(after.to(tl.float32), x, input_precision="tf32x3")
    return sums


@triton.jit
def segment_sums(g, EXCLUSIVE: tl.constexpr, C: tl.constexpr):
    """[C, C]: sum of g over rows in (s, t] (or (s, t)) where s < t, else 0, without a difference of sums."""
    t = tl.arange(0, C)
    later = t[:, None] > t[None, :]
    sums = tl.cumsum(tl.where(later, g[:, None], 0.0), 0)
    if EXCLUSIVE:
        sums = sums - g[:, None]
    return tl.where(later, sums, 0.0)


@triton.jit
def between(total, C: tl.constexpr):
    """[C, C]: total_t - total_s where s < t, else 0."""
    t = tl.arange(0, C)
    return tl.where(t[:, None] > t[None, :], total[:, None] - total[None, :], 0.0)


@triton.jit
def half_mask(level, EXCLUSIVE: tl.constexpr, C: tl.constexpr):
    """[C, C]: the rows u that row t sums: its half of 2^level rows up to t (upper half) or after t (lower half)."""
    t = tl.arange(0, C)[:, None]
    u = tl.arange(0, C)[None, :]
    upper = ((t >> level) & 1) == 1
    if EXCLUSIVE:
        earlier = u < t
    else:
        earlier = u <= t
    return ((t >> level) == (u >> level)) & ((upper & earlier) | ((upper == 0) & (u > t)))


@triton.jit
def half_sums(
    g, level, EXCLUSIVE: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """[C, D]: log decay between each row and the middle of its block of 2 halves of 2^level rows."""
    return masked_sums(half_mask(level, EXCLUSIVE, C), g, SPLIT, PRECISION)


@triton.jit
def half_gather(
    x, level, EXCLUSIVE: tl.constexpr, C: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """The transpose of half_sums."""
    return masked_sums(tl.trans(half_mask(level, EXCLUSIVE, C)), x, SPLIT, PRECISION)


@triton.jit
def pairs(x, level, C: tl.constexpr):
    """x [C, C] where t is in the upper and s in the lower half, of 2^level rows, of one block; else 0."""
    t = tl.arange(0, C)[:, None] >> level
    s = tl.arange(0, C)[None, :] >> level
    return tl.where(((t & 1) == 1) & (t == s + 1), x, 0.0)


@triton.jit
def on_diagonal(x, C: tl.constexpr):
    t = tl.arange(0, C)
    return tl.where(t[:, None] == t[None, :], x[:, None], 0.0)


@triton.jit
def diagonal_of(x, C: tl.constexpr):
    t = tl.arange(0, C)
    return tl.sum(tl.where(t[:, None] == t[None, :], x, 0.0), 1)


@triton.jit
def inverse_unit_lower(l, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I - l)^-1 for strictly lower l [C, C]: blocks of twice the size from inverses of their diagonal blocks.

    With A^-1 and D^-1 on the diagonal, the block below is D^-1 l A^-1: substitution by blocks, never powers of l.
    """
    t = tl.arange(0, C)
    inverse = tl.where(t[:, None] == t[None, :], 1.0, 0.0) + pairs(l, 0, C)
    for level in range(1, LEVELS):
        below = tl.dot(inverse, pairs(l, level, C), input_precision=PRECISION)
        inverse += tl.dot(below, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def find_sequence(cu_seqlens, N, slot, C: tl.constexpr):
    """The packed sequence that owns chunk `slot`: the last n with cu_seqlens[n] // C + n <= slot."""
    low = 0
    high = N
    while low + 1 < high:
        middle = (low + high) // 2
        first = tl.load(cu_seqlens + middle) // C + middle
        low = tl.where(first <= slot, middle, low)
        high = tl.where(first <= slot, high, middle)
    return low
