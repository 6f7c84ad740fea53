"""The best masks of larger tiles, by shortest paths: a few tiles in the registers of one warp.

Meaning: sparsefx/masks/flow.py, whose masks these are, ties included. Lengths are integers below
2**53, so a minimum and its first place are one int64, length * M + place.
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
    places,
    summary,
)

FAR = tl.constexpr(1 << 56)  # less a level it is still above REACHED, and every length below
REACHED = tl.constexpr(1 << 55)


@triton.jit
def _nearest(way, place, AXIS: tl.constexpr, LOG: tl.constexpr):
    """The least of int64 ways along AXIS, and its first place."""
    least = tl.min((way << LOG) + place, AXIS, keep_dims=True)
    return least >> LOG, (least & ((1 << LOG) - 1)).to(tl.int32)


@triton.jit
def _shortest_paths(kept, level, to_col, to_row, row, col, LOG: tl.constexpr):
    """Bellman-Ford: lengths to columns [T, 1, M], the rows before them, the columns before rows.

    A row loses an entry that it gives up, and gains one that it takes. to_col is 0 at the sources.
    """
    from_row, from_col = (to_col * 0 - 1).to(tl.int32), (to_row * 0 - 1).to(tl.int32)
    news = 1
    while news > 0:
        way, before = _nearest(tl.where(kept, to_col + level, FAR), col, 2, LOG)
        shorter = (way < to_row) & (way < REACHED)
        to_row, from_col = tl.where(shorter, way, to_row), tl.where(shorter, before, from_col)
        way, before = _nearest(tl.where(kept, FAR, to_row - level), row, 1, LOG)
        shorter = (way < to_col) & (way < REACHED)
        to_col, from_row = tl.where(shorter, way, to_col), tl.where(shorter, before, from_row)
        news = tl.max(shorter.to(tl.int32))
    return to_col, from_row, from_col


@triton.jit
def _shift(kept, from_row, from_col, end, busy, row, col):
    """Move one entry of each busy tile along the path to column ``end`` [T, 1, 1]."""
    at = tl.where(busy, chosen(from_row, col == end, 2), -1)  # a row, or -1 behind the last
    going = tl.max(at)
    while going >= 0:
        kept = kept | ((row == at) & (col == end))
        end = tl.where(at >= 0, chosen(from_col, row == at, 1), end)
        kept = kept & ~((row == at) & (col == end))
        at = tl.where(at >= 0, chosen(from_row, col == end, 2), -1)
        going = tl.max(at)
    return kept


@triton.jit
def _exact_kernel(w, mask, count, down, across, swt, swi, swj, smt, smi, smj,
                  N: tl.constexpr, LOG: tl.constexpr, T: tl.constexpr):  # fmt: skip
    M: tl.constexpr = 1 << LOG
    row, col = tl.arange(0, M)[None, :, None], tl.arange(0, M)[None, None, :]
    tap, line, column, there = corners(count, across, down, M, T)
    bits = load_bits(w, places(swt, swi, swj, tap, line, column, M), there)
    largest, finite = summary(bits)
    level = integer_levels(bits, largest, finite, 2 * LOG + 1)  # [T, M, M]
    kept = largest_of_rows((level << LOG) + (M - 1 - col), N, M)
    sums = tl.where(there, tl.sum(kept.to(tl.int32), 1, keep_dims=True), N)  # [T, 1, M]
    far = tl.sum(level, 2, keep_dims=True) * 0 + FAR  # [T, M, 1]
    most = tl.max(sums)
    while most > N:
        sources = tl.where(sums > N, 0, FAR)
        to_col, from_row, from_col = _shortest_paths(kept, level, sources, far, row, col, LOG)
        _, end = _nearest(tl.where(sums < N, to_col, FAR), col, 2, LOG)
        busy = tl.max(sums, 2, keep_dims=True) > N
        kept = _shift(kept, from_row, from_col, end, busy, row, col)
        sums = tl.where(there, tl.sum(kept.to(tl.int32), 1, keep_dims=True), N)
        most = tl.max(sums)
    to = places(smt, smi, smj, tap, line, column, M)
    tl.store(mask + to, kept.to(tl.uint8), there & (to == to))


def solve(w: Tensor, mask: Tensor, n: int, m: int) -> None:
    """Write the best masks of m x m tiles, n per row and column.

    Args:
        w: [taps, rows, cols] with sizes of whole tiles; float32, float16 or bfloat16.
        mask: uint8, the shape of w.
        n: 1 to m - 1.
        m: a power of two, 8 to 32.
    """
    launch(_exact_kernel, w, mask, n, m)
