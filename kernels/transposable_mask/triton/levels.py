"""Magnitudes as integers whose sums are exact in any order: what sparsefx/masks/levels.py computes.

Everything here is a part of a kernel.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)
BITS = tl.constexpr(46)
SHIFTED = tl.constexpr(2.0**52)  # a sum with it shows an integer below 2**52 in its low bits


@triton.jit
def magnitude_bits(w):
    """Return int32, those of |w| in float32; above INFINITY for each NaN."""
    if w.dtype == tl.bfloat16:
        return (w.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF) << 16
    return w.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def integer_levels(bits, largest, finite, ROOM: tl.constexpr, FINITE: tl.constexpr = False):
    """Round magnitudes to integers up to 2**46, those of a tile in one unit.

    Args:
        bits: of magnitude_bits, at most float32's infinity or NaN.
        largest: of the tile, broadcast against bits.
        finite: the largest of its finite ones.
        ROOM: 2**ROOM is above the number of a tile's entries.
        FINITE: no tile of the program holds NaN or infinity, which are not looked for then.

    Returns:
        int64, the shape of bits.
    """
    top = finite.to(tl.float32, bitcast=True).to(tl.float64).to(tl.int64, bitcast=True) >> 52
    top = tl.maximum(top - 1022, -200)  # 2**top is above each finite magnitude; -1022 is zero's
    room = tl.where(
        largest == INFINITY, BITS - ROOM, tl.where(largest > INFINITY, BITS - 2 * ROOM, BITS)
    )
    room = room.to(tl.int64)
    unit = ((room - top + 1023) << 52).to(tl.float64, bitcast=True)
    value = bits if FINITE else tl.where(bits < INFINITY, bits, 0)
    value = value.to(tl.float32, bitcast=True).to(tl.float64)
    level = (value * unit + SHIFTED).to(tl.int64, bitcast=True) & 0xFFFFFFFFFFFFF  # ties to even
    if FINITE:
        return level
    one = tl.full((), 1, tl.int64)
    level = tl.where(bits == INFINITY, one << (room + ROOM), level)
    return tl.where(bits > INFINITY, one << (room + 2 * ROOM), level)
