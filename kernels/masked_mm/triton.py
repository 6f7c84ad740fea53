"""y = x @ where(mask, w, 0) + bias: the stored mask is applied in registers, empty tiles skipped.

Meaning: sparsefx/ops/nm.py.  Tiles, and which way: kernels/_tiles.py.  Derivation: README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles


@triton.jit
def _occupied_kernel(mask, used, depth, cols, smk, smj, BK: tl.constexpr, BN: tl.constexpr):
    """Note of every [BK, BN] tile of the mask whether it keeps anything: used [N/BN, K/BK]."""
    pid, down = tl.program_id(0), tl.cdiv(depth, BK)
    k = (pid % down).to(tl.int64) * BK + tl.arange(0, BK)[:, None]
    j = (pid // down).to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    kept = tl.load(mask + k * smk + j * smj, (k < depth) & (j < cols), 0)  # bytes, 0 or 1
    any_kept = tl.max(tl.max(kept.to(tl.int32), axis=1), axis=0)
    tl.store(used + pid.to(tl.int64), any_kept.to(tl.int8))


@triton.jit
def _list_kernel(used, order, counts, down, ALL: tl.constexpr):
    """List a column's occupied tiles in order, and how many there are."""
    row, t = tl.program_id(0).to(tl.int64) * down, tl.arange(0, ALL)
    kept = tl.load(used + row + t, t < down, 0).to(tl.int32)
    tl.store(order + row + tl.cumsum(kept, axis=0) - kept, t, kept != 0)
    tl.store(counts + tl.program_id(0), tl.sum(kept, axis=0))


@triton.jit
def _masked_mm_kernel(x, w, mask, order, counts, bias, y, rows, cols, depth,
                      sxi, sxk, swk, swj, smk, smj, sb, syi, syj,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      GROUP: tl.constexpr):  # fmt: skip
    pid, across = tl.program_id(0), tl.cdiv(cols, BN)
    pi, pj = tl.swizzle2d(pid // across, pid % across, tl.cdiv(rows, BM), across, GROUP)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK).to(tl.int64)
    down = tl.cdiv(depth, BK)
    count = down if counts is None else tl.load(counts + pj)
    xt, wt = x + i * sxi + k[None, :] * sxk, w + k[:, None] * swk + j * swj
    mt = mask + k[:, None] * smk + j * smj
    acc = tl.zeros((BM, BN), tl.float32)
    for t in range(0, count):
        tile = t if order is None else tl.load(order + pj.to(tl.int64) * down + t)
        start = tile.to(tl.int64) * BK
        inside = (k[:, None] < depth - start) & (j < cols)
        a = tl.load(xt + start * sxk, (i < rows) & (k[None, :] < depth - start), 0.0)  # [BM, BK]
        b = tl.load(wt + start * swk, inside, 0.0)  # [BK, BN]
        kept = tl.load(mt + start * smk, inside, 0)
        acc = tl.dot(a, tl.where(kept != 0, b, 0.0).to(b.dtype), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + j * sb, j < cols, 0.0).to(tl.float32)
    tl.store(y + i * syi + j * syj, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


def masked_mm(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [M, K] by w [K, N] where mask [K, N], add bias [N], sum in float32.

    float64, mixed dtypes, a mask that isn't boolean or of w's shape, and shapes of which a masked
    copy for the library's GEMM costs less take the reference, which is that copy.
    """
    operands = (x, w) if bias is None else (x, w, bias)
    dtypes = {operand.dtype for operand in operands}
    plain = len(dtypes) == 1 and dtypes <= set(_tiles.DTYPES)
    shape = x.shape[0], w.shape[1], w.shape[0], x.itemsize
    alike = mask.dtype == torch.bool and mask.shape == w.shape
    if not plain or not alike or not _tiles.stored_mask_in_gemm(*shape):
        return ops.REFERENCES[ops.masked_mm](x, w, mask, bias)
    return fused(x, w, mask, bias, skip=_tiles.empty_tiles_skipped(*shape))


def fused(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, *, skip: bool) -> Tensor:
    """Run masked_mm with the mask applied inside the GEMM: nothing of w's size is written.

    ``skip`` first lists the tiles of the mask that keep anything, and multiplies these alone.
    """
    (rows, depth), cols = x.shape, w.shape[1]
    if depth != w.shape[0]:
        raise ValueError(f"x {list(x.shape)} @ w {list(w.shape)}: K differs")
    y = x.new_empty(rows, cols)
    if not y.numel():
        return y
    b = None if bias is None else bias.expand(cols)
    tile = _tiles.stored_mask_gemm(rows, cols, depth, x.itemsize, _tiles.chip(x.device))
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]),)
    stored = mask.view(torch.uint8)
    with torch.cuda.device_of(x):
        listed = occupied(stored, tile["BK"], tile["BN"]) if skip and depth else (None, None)
        _masked_mm_kernel[grid](
            x, w, stored, *listed, b, y, rows, cols, depth, *x.stride(), *w.stride(),
            *mask.stride(), 0 if b is None else b.stride(0), *y.stride(), **tile)  # fmt: skip
    return y


def occupied(mask: Tensor, deep: int, wide: int) -> tuple[Tensor, Tensor]:
    """List the [deep, wide] tiles of a mask [K, N] of bytes that keep anything.

    Returns:
        int32 [N / wide, K / deep]: for every column of tiles the places of its occupied ones,
        ascending, in front of what is never read; and int32 [N / wide]: how many these are.
    """
    depth, cols = mask.shape
    down, across = triton.cdiv(depth, deep), triton.cdiv(cols, wide)
    used = mask.new_empty(across, down, dtype=torch.int8)
    order = mask.new_empty(across, down, dtype=torch.int32)
    counts = mask.new_empty(across, dtype=torch.int32)
    _occupied_kernel[(down * across,)](mask, used, depth, cols, *mask.stride(), BK=deep, BN=wide)
    _list_kernel[(across,)](used, order, counts, down, ALL=_tiles.power_of_2(down))
    return order, counts
