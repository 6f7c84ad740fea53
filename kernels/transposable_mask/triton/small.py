"""The best masks of 4 x 4 tiles in one pass: the largest total of all patterns, in registers.

Meaning: sparsefx/masks/patterns.py. Derivation: README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx.kernels.transposable_mask.triton.levels import integer_levels, magnitude_bits

SIDE = 4
CODE = tl.constexpr(12)  # bits below a level: which of the first three rows' entries are kept


@triton.jit
def _columns(row):
    """Split [T, 4] into its four columns."""
    even, odd = tl.split(row.reshape(row.shape[0], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _crossed(a0, a1, a2, a3, b0, b1, b2, b3):
    """One entry of each of two rows, in different columns j and k, by {j, k}: the better way."""
    return (
        tl.maximum(a0 + b1, a1 + b0),
        tl.maximum(a0 + b2, a2 + b0),
        tl.maximum(a0 + b3, a3 + b0),
        tl.maximum(a1 + b2, a2 + b1),
        tl.maximum(a1 + b3, a3 + b1),
        tl.maximum(a2 + b3, a3 + b2),
    )


@triton.jit
def _spread(x01, x02, x13, x23):
    """Two rows of two entries that cover the columns once."""
    return tl.maximum(x01 + x23, x02 + x13)


@triton.jit
def _largest(x01, x02, x03, x12, x13, x23, y01, y02, y03, y12, y13, y23):
    """The largest sum of a pair of columns above and the two others below."""
    one = tl.maximum(x01 + y23, x23 + y01)
    two = tl.maximum(x02 + y13, x13 + y02)
    return tl.maximum(tl.maximum(one, two), tl.maximum(x03 + y12, x12 + y03))


@triton.jit
def _best(k0, k1, k2, k3, N: tl.constexpr):
    """The largest total of N entries per row and column, of keys [T, 4] for each row."""
    if N == 3:  # keep all but the least entry of each row and column
        k0, k1, k2, k3 = -k0, -k1, -k2, -k3
    a0, a1, a2, a3 = _columns(k0)
    b0, b1, b2, b3 = _columns(k1)
    c0, c1, c2, c3 = _columns(k2)
    d0, d1, d2, d3 = _columns(k3)
    x01, x02, x03, x12, x13, x23 = _crossed(a0, a1, a2, a3, b0, b1, b2, b3)
    y01, y02, y03, y12, y13, y23 = _crossed(c0, c1, c2, c3, d0, d1, d2, d3)
    if N != 2:
        best = _largest(x01, x02, x03, x12, x13, x23, y01, y02, y03, y12, y13, y23)
        if N == 3:
            best -= (a0 + a1 + a2 + a3) + (b0 + b1 + b2 + b3)
            best -= (c0 + c1 + c2 + c3) + (d0 + d1 + d2 + d3)
    else:
        # a column twice in the upper rows is in neither of the lower ones, and the other way round
        z01, z02, z03, z12, z13, z23 = _crossed(
            a0 + b0, a1 + b1, a2 + b2, a3 + b3, c0 + d0, c1 + d1, c2 + d2, c3 + d3
        )
        # once above and once below in all columns; in none; in two
        best = _spread(x01, x02, x13, x23) + _spread(y01, y02, y13, y23)
        best = tl.maximum(best, _spread(z01, z02, z13, z23))
        mixed = _largest(
            x01 + y01, x02 + y02, x03 + y03, x12 + y12, x13 + y13, x23 + y23,
            z01, z02, z03, z12, z13, z23,
        )  # fmt: skip
        best = tl.maximum(best, mixed)
    return best


@triton.jit
def _key(bits, largest, finite, ROW: tl.constexpr, FINITE: tl.constexpr):
    """A level above its place in the code: earlier places weigh more, the last row nothing."""
    level = integer_levels(bits, largest, finite, 5, FINITE) << CODE
    if ROW < 3:
        level += tl.full((), 1, tl.int64) << (11 - 4 * ROW - tl.arange(0, 4))[None, :]
    return level


@triton.jit
def _best_of_rows(b0, b1, b2, b3, largest, N: tl.constexpr, FINITE: tl.constexpr):
    """The best total and its code, of the magnitudes [T, 4] of each row."""
    finite = largest
    if not FINITE:
        finite = tl.maximum(_finite(b0), _finite(b1))
        finite = tl.maximum(finite, tl.maximum(_finite(b2), _finite(b3)))
        finite = tl.max(finite, 1, keep_dims=True)
    k0, k1 = _key(b0, largest, finite, 0, FINITE), _key(b1, largest, finite, 1, FINITE)
    k2, k3 = _key(b2, largest, finite, 2, FINITE), _key(b3, largest, finite, 3, FINITE)
    return _best(k0, k1, k2, k3, N)


@triton.jit
def _small_kernel(w, mask, down, across, swt, swi, swj, smt, smi, smj,
                  N: tl.constexpr, T: tl.constexpr):  # fmt: skip
    blocks = tl.cdiv(across, T)
    pid = tl.program_id(0)
    line = pid // blocks
    tap, line = (line // down).to(tl.int64), (line % down).to(tl.int64)
    tile = (pid % blocks).to(tl.int64) * T + tl.arange(0, T)[:, None]
    place = tl.arange(0, 4)[None, :]
    at, inside = w + tap * swt + line * 4 * swi + (tile * 4 + place) * swj, tile < across
    row = tl.full((), 1, tl.int64)
    b0 = magnitude_bits(tl.load(at, inside, 0.0))
    b1 = magnitude_bits(tl.load(at + row * swi, inside, 0.0))
    b2 = magnitude_bits(tl.load(at + 2 * row * swi, inside, 0.0))
    b3 = magnitude_bits(tl.load(at + 3 * row * swi, inside, 0.0))  # [T, 4]
    largest = tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))
    largest = tl.max(largest, 1, keep_dims=True)
    if tl.max(largest) < 0x7F800000:  # no NaN or infinity: a third less to do
        best = _best_of_rows(b0, b1, b2, b3, largest, N, True)
    else:
        best = _best_of_rows(b0, b1, b2, b3, largest, N, False)
    code = (best & 0xFFF).to(tl.int32)[:, None]
    m0 = (code >> (11 - place)) & 1
    m1 = (code >> (7 - place)) & 1
    m2 = (code >> (3 - place)) & 1
    m3 = N - m0 - m1 - m2  # a column holds N
    to = mask + tap * smt + line * 4 * smi + (tile * 4 + place) * smj
    tl.store(to, m0.to(tl.uint8), inside)
    tl.store(to + row * smi, m1.to(tl.uint8), inside)
    tl.store(to + 2 * row * smi, m2.to(tl.uint8), inside)
    tl.store(to + 3 * row * smi, m3.to(tl.uint8), inside)


@triton.jit
def _finite(bits):
    return tl.where(bits < 0x7F800000, bits, 0)


def solve(w: Tensor, mask: Tensor, n: int, m: int = SIDE) -> None:
    """Write the best masks of 4 x 4 tiles, n per row and column.

    Args:
        w: [taps, rows, cols] with sizes of whole tiles; float32, float16 or bfloat16.
        mask: uint8, the shape of w.
        n: 1, 2 or 3.
        m: 4.
    """
    taps, down, across = w.shape[0], w.shape[1] // m, w.shape[2] // m
    lanes = min(128, triton.next_power_of_2(across))
    grid = (taps * down * triton.cdiv(across, lanes),)
    with torch.cuda.device_of(w):
        _small_kernel[grid](w, mask, down, across, *w.stride(), *mask.stride(), N=n, T=lanes)
