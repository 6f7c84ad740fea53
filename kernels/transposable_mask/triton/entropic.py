"""Near-optimal masks: transport, rounding, exchange, all in registers.

Meaning: sparsefx/masks/entropic.py, step by step in its order. Sums are float32's, so a near tie
may fall otherwise than there.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparsefx.kernels.transposable_mask.triton.levels import integer_levels
from sparsefx.kernels.transposable_mask.triton.tile import (
    chosen,
    corners,
    largest_of_rows,
    launch,
    load_bits,
    over_tile,
    places,
    summary,
)

ROUNDS = 60
SHARPNESS = 30.0  # of a tile's largest |w|
FAR = tl.constexpr(3e38)


@triton.jit
def _transport(level, N: tl.constexpr, SHARPNESS: tl.constexpr, ROUNDS: tl.constexpr):
    """The plan [T, M, M]: fractions, not negative, that order a row's entries above 1, too."""
    plan = tl.exp((level - 1.0) * SHARPNESS)
    cut = tl.full(plan.shape, 1.0, tl.float32)
    for _ in range(ROUNDS):
        plan *= N / tl.sum(plan, 2, keep_dims=True)
        plan *= N / tl.sum(plan, 1, keep_dims=True)
        plan *= cut
        cut = tl.maximum(plan, 1.0)
        plan = tl.minimum(plan, 1.0)
    return plan * cut


@triton.jit
def _first(x, place, AXIS: tl.constexpr):
    """The least of x along AXIS and its first place."""
    least = tl.min(x, AXIS, keep_dims=True)
    return least, tl.min(tl.where(x == least, place, 1 << 20), AXIS, keep_dims=True)


@triton.jit
def _move(kept, level, sums, row, col, N: tl.constexpr):
    """Take the cheapest entry out of each tile's fullest column, into one below its limit."""
    _, source = _first(-sums, col, 2)  # [T, 1, 1]
    full = tl.max(sums, 2, keep_dims=True) <= N
    give = tl.where(kept & (col == source), level, 0.0)
    give = tl.sum(give, 2, keep_dims=True)  # [T, M, 1]
    has = tl.max((kept & (col == source)).to(tl.int32), 2, keep_dims=True) > 0
    open = has & ~kept & (sums < N)
    loss, target = _first(tl.where(open, give - level, FAR), col, 2)  # [T, M, 1]
    _, best = _first(loss, row, 1)  # [T, 1, 1]
    here = (row == best) & ~full
    return (kept | (here & (col == chosen(target, row == best, 1)))) & ~(here & (col == source))


@triton.jit
def _balance(kept, level, there, row, col, N: tl.constexpr):
    """Move entries until no column is over its limit."""
    sums = tl.where(there, tl.sum(kept.to(tl.int32), 1, keep_dims=True), N)  # [T, 1, M]
    most = tl.max(sums)
    while most > N:
        kept = _move(kept, level, sums, row, col, N)
        sums = tl.where(there, tl.sum(kept.to(tl.int32), 1, keep_dims=True), N)
        most = tl.max(sums)
    return kept


@triton.jit
def _opponent(row, turn, M: tl.constexpr):
    """Whom a row meets: seat 0 stays, the others go round; seats k and M - 1 - k meet."""
    seat = tl.where(row == 0, 0, (row - 1 + turn) % (M - 1) + 1)
    other = M - 1 - seat
    return tl.where(other == 0, 0, (other + M - 2 - turn) % (M - 1) + 1)


@triton.jit
def _exchange(kept, level, row, col, M: tl.constexpr):
    """Let every pair of rows make its best swap, in the rounds of a tournament."""
    for turn in range(M - 1):
        other = tl.broadcast_to(_opponent(row, turn, M), kept.shape)
        lead = level - tl.gather(level, other, 1)
        theirs = tl.gather(kept.to(tl.int32), other, 1) > 0
        least, give = _first(tl.where(kept & ~theirs, lead, FAR), col, 2)
        most, take = _first(tl.where(theirs & ~kept, -lead, FAR), col, 2)
        kept = kept ^ ((-most > least) & ((col == give) | (col == take)))
    return kept


@triton.jit
def _entropic_kernel(w, mask, count, down, across, swt, swi, swj, smt, smi, smj,
                     N: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr,
                     SHARPNESS: tl.constexpr, ROUNDS: tl.constexpr):  # fmt: skip
    M: tl.constexpr = 1 << LOG
    row, col = tl.arange(0, M)[None, :, None], tl.arange(0, M)[None, None, :]
    tap, line, column, there = corners(count, across, down, M, T)
    bits = load_bits(w, places(swt, swi, swj, tap, line, column, M), there)
    largest, finite = summary(bits)
    level = integer_levels(bits, largest, finite, 2 * LOG + 1).to(tl.float32)  # [T, M, M]
    level = level / tl.maximum(over_tile(level), 1.0)
    plan = _transport(level, N, SHARPNESS, ROUNDS)
    order = tl.minimum(tl.maximum(plan, 0.0), FAR).to(tl.int32, bitcast=True).to(tl.int64)
    kept = largest_of_rows((order << LOG) + (M - 1 - col), N, M)
    kept = _balance(kept, level, there, row, col, N)
    kept = _exchange(kept, level, row, col, M)
    to = places(smt, smi, smj, tap, line, column, M)
    tl.store(mask + to, kept.to(tl.uint8), there & (to == to))


def solve(w: Tensor, mask: Tensor, n: int, m: int) -> None:
    """Write masks of m x m tiles within 0.5 % of the best, exactly n per row and column.

    Args:
        w: [taps, rows, cols] with sizes of whole tiles; float32, float16 or bfloat16.
        mask: uint8, the shape of w.
        n: 1 to m - 1.
        m: a power of two, 4 to 32.
    """
    launch(_entropic_kernel, w, mask, n, m, SHARPNESS=SHARPNESS, ROUNDS=ROUNDS)
