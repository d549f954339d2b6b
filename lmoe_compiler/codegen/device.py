"""Device functions that generated kernels import: one per tile operation that is longer than a line.

Shapes: `C` rows of a chunk, [C, C] pairs with the row t first and its source s second, [C, D] rows of vectors.
`SPLIT` says that sums run as two bf16 products (half-precision inputs) instead of one fp32-accurate product.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Products of fp32: six of operands in three bf16 parts each. Beside three of tf32 they are twice as exact (2.5e-7 of
# linear attention's output, not 5e-7) and 1.1 to 1.9 times as fast: parts are small, and wgmma takes them transposed.
FULL = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")

if triton.knobs.runtime.interpret:

    @triton.jit
    def exp(x):
        return tl.exp(x)

else:

    @triton.jit
    def exp(x):
        """One instruction beside the scaling. `tl.exp` has four: it keeps results below 1.2e-38, which are 0 here."""
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], tl.float32, True, 1
        )


@triton.jit
def log1p(x):
    """log(1 + x) without the loss of small x."""
    return tl.where(tl.abs(x) < 1e-3, x * (1.0 - x * (0.5 - x * (1.0 / 3.0))), tl.log(1.0 + x))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(exp(-tl.abs(x)))


@triton.jit
def logsigmoid(x):
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    e = exp(-2.0 * tl.abs(x))
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
    return tl.where(x > 0.0, exp(exponent * tl.log(x)), tl.where(exponent == 0.0, 1.0, 0.0))


@triton.jit
def weighted_sums(weight, x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """[C, D]: sums of the rows of x with weights 1, 0 and -1 [C, C], on tensor cores."""
    if SPLIT:
        picked = weight.to(tl.bfloat16)
        # Rounded as an integer: a conversion to bf16 and back takes the unit that exponentials need.
        bits = x.to(tl.uint32, bitcast=True)
        high = ((bits + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)
        low = (x - high).to(tl.bfloat16)
        sums = tl.dot(picked, high.to(tl.bfloat16)) + tl.dot(picked, low)
    else:
        sums = tl.dot(weight, x, input_precision=PRECISION)
    return sums


@triton.jit
def running_sum(x, C: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums of the rows up to each. Of vectors on tensor cores: a scan over rows is many shuffles for each of them."""
    if SPLIT and len(x.shape) == 2:
        t = tl.arange(0, C)
        upto = tl.where(t[:, None] >= t[None, :], 1.0, 0.0)
        sums = weighted_sums(upto, x, SPLIT, PRECISION)
    else:
        sums = tl.cumsum(x, 0)
    return sums


@triton.jit
def exclusive_prefix(x, C: tl.constexpr):
    """Sums of earlier rows, without a difference of sums."""
    t = tl.arange(0, C)
    before = t[:, None] > t[None, :]
    if len(x.shape) == 1:
        sums = tl.sum(tl.where(before, x[None, :], 0.0), 1)
    else:
        sums = tl.dot(before.to(tl.float32), x, input_precision=FULL)
    return sums


@triton.jit
def exclusive_suffix(x, C: tl.constexpr):
    """Sums of later rows, without a difference of sums."""
    t = tl.arange(0, C)
    after = t[:, None] < t[None, :]
    if len(x.shape) == 1:
        sums = tl.sum(tl.where(after, x[None, :], 0.0), 1)
    else:
        sums = tl.dot(after.to(tl.float32), x, input_precision=FULL)
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
def reach(total):
    """How far running sums of log decays get from 0: up to NEAR, their exponentials are far from overflow."""
    return tl.max(tl.max(tl.abs(total), 1), 0)


@triton.jit
def first_near(g, C: tl.constexpr, LIMIT: tl.constexpr):
    """log2 of the rows (16 or 1) of blocks in which all log decays surely sum to at most LIMIT.

    For 16 rows that is read off the largest decay: sums of blocks would cost more registers than they save levels.
    """
    start = 0
    if C > 16:
        start = tl.where(tl.max(tl.max(tl.abs(g), 1), 0) * 16 <= LIMIT, 4, 0)
    return start


@triton.jit
def level_sign(level, start):
    return tl.where(level < start, -1.0, 1.0)


@triton.jit
def level_weight(level, start, EXCLUSIVE: tl.constexpr, COLS: tl.constexpr, C: tl.constexpr):
    """[C, C]: how row t sums rows u to reach the middle of its block of two halves of 2^level rows."""
    t = tl.arange(0, C)[:, None]
    u = tl.arange(0, C)[None, :]
    upper = ((t >> level) & 1) == 1
    same = (t >> level) == (u >> level)
    if EXCLUSIVE:
        picked = same & (
            (upper & (u < t)) | ((upper == 0) & ((u > t) | ((level < start) & (u == t))))
        )
    else:
        picked = same & ((upper & (u <= t)) | ((upper == 0) & (u > t)))
    if COLS:
        negative = upper & (level < start)
    else:
        negative = (upper == 0) & (level < start)
    return tl.where(picked, tl.where(negative, -1.0, 1.0), 0.0)


@triton.jit
def level_sums(
    g,
    level,
    start,
    EXCLUSIVE: tl.constexpr,
    COLS: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[C, D]: log decay between each row and the middle of its block."""
    return weighted_sums(level_weight(level, start, EXCLUSIVE, COLS, C), g, SPLIT, PRECISION)


@triton.jit
def level_gather(
    x,
    level,
    start,
    EXCLUSIVE: tl.constexpr,
    COLS: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The transpose of level_sums."""
    return weighted_sums(
        tl.trans(level_weight(level, start, EXCLUSIVE, COLS, C)), x, SPLIT, PRECISION
    )


@triton.jit
def pairs(x, level, start, C: tl.constexpr):
    """x [C, C] at the pairs of this level, else 0: s in the lower and t in the upper half of one block of two halves
    of 2^level rows; in the near level (level < start) every s < t of one block."""
    t = tl.arange(0, C)[:, None]
    s = tl.arange(0, C)[None, :]
    near = ((t >> (level + 1)) == (s >> (level + 1))) & (t > s)
    halves = (((t >> level) & 1) == 1) & ((t >> level) == (s >> level) + 1)
    return tl.where(tl.where(level < start, near, halves), x, 0.0)


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
    inverse = tl.where(t[:, None] == t[None, :], 1.0, 0.0) + pairs(l, 0, 0, C)
    for level in range(1, LEVELS):
        below = tl.dot(inverse, pairs(l, level, 0, C), input_precision=PRECISION)
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
