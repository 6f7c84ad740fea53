"""Tiles of a matrix, or of each tap of a conv weight, in registers: parts of kernels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx.kernels.transposable_mask.triton.levels import INFINITY, magnitude_bits


@triton.jit
def corners(count, across, down, M: tl.constexpr, T: tl.constexpr):
    """Tap, first row and first column of this program's tiles, int64 [T, 1, 1]; whether there."""
    tile = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)[:, None, None]
    line = tile // across
    return line // down, line % down * M, tile % across * M, tile < count


@triton.jit
def places(st, si, sj, tap, row, col, M: tl.constexpr):
    """Offsets [T, M, M] of the tiles' entries."""
    row = row + tl.arange(0, M)[None, :, None]
    return tap * st + row * si + (col + tl.arange(0, M)[None, None, :]) * sj


@triton.jit
def summary(bits):
    """The largest magnitude of each tile, and the largest finite one, [T, 1, 1]."""
    return over_tile(bits), over_tile(tl.where(bits < INFINITY, bits, 0))


@triton.jit
def over_tile(x):
    """The maximum of each tile of [T, M, M]."""
    return tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)


@triton.jit
def load_bits(w, at, there):
    """Magnitudes of the tiles' entries; zeros where there is no tile."""
    return magnitude_bits(tl.load(w + at, there & (at == at), 0.0))


@triton.jit
def largest_of_rows(key, N: tl.constexpr, M: tl.constexpr):
    """Mark the N largest of every row of int64 [T, M, M]; from 0 to 2**62, none of a row equal."""
    DROP: tl.constexpr = 2 * N > M
    if DROP:
        key = (1 << 62) - key
    last = tl.max(key, 2, keep_dims=True)
    for _ in range(1, M - N if DROP else N):
        last = tl.max(tl.where(key < last, key, -1), 2, keep_dims=True)
    return key < last if DROP else key >= last


@triton.jit
def chosen(x, here, AXIS: tl.constexpr):
    """The one entry along AXIS where ``here``; 0 where there is none."""
    return tl.sum(tl.where(here, x, 0), AXIS, keep_dims=True)


def launch(kernel: Any, w: Tensor, mask: Tensor, n: int, m: int, **constants: Any) -> None:
    """Run a kernel on the m x m tiles of w [taps, rows, cols], a warp's worth in a program."""
    taps, down, across = w.shape[0], w.shape[1] // m, w.shape[2] // m
    count, tiles = taps * down * across, max(1, 256 // (m * m))
    with torch.cuda.device_of(w):
        kernel[(triton.cdiv(count, tiles),)](
            w, mask, count, down, across, *w.stride(), *mask.stride(), N=n,
            LOG=m.bit_length() - 1, T=tiles, num_warps=4 if m > 16 else 1, **constants)  # fmt: skip
