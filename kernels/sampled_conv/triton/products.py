"""Convolutions summed over, or written to, the channels of an index: nm_conv's implicit GEMM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx.kernels import _tiles
from sparsefx.kernels.nm_conv import geometry
from sparsefx.kernels.nm_conv.geometry import Ints, Where
from sparsefx.kernels.nm_conv.triton import _first, _pixels, _seen


@triton.jit
def _sampled_conv_kernel(
    x, w, index, bias, y, images, cols, depth, among, full, high, wide, tall, broad,
    sxn, sxk, sxh, sxw, swg, swk, swj, swh, sww, stg, stk, sb, syn, syj, syh, syw,
    COLUMNS: tl.constexpr, BACK: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    JH: tl.constexpr, JW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum over channels index [groups, depth] of x and w; COLUMNS: it names those of w and y."""
    QH: tl.constexpr = SH if BACK else 1  # rows of a program share their taps
    QW: tl.constexpr = SW if BACK else 1
    pid, across = tl.program_id(0), tl.cdiv(cols, BN)
    down = tl.num_programs(0) // across
    pi, pj = tl.swizzle2d(pid // across, pid % across, down, across, GROUP)
    group, phase = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK).to(tl.int64)
    n, h, v, inside = _pixels(i, phase, images, tall, broad, QH, QW)
    index += group * stg
    to = tl.load(index + j * stk, j < cols, 0).to(tl.int64) if COLUMNS else j
    x += n * sxn + group * among * sxk  # int64 offsets, once
    w += group * swg + to * swj
    top, left = _first(phase // QW, KH, QH, PH, DH), _first(phase % QW, KW, QW, PW, DW)
    a_row = tl.cdiv(KW - left, JW)  # taps that land, JH and JW apart
    chunks = tl.cdiv(depth, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(KH - top, JH) * a_row * chunks):  # of a tap all channels
        tap, start = step // chunks, (step % chunks) * BK
        kh, kw = top + tap // a_row * JH, left + tap % a_row * JW
        ih, seen_h = _seen(h, kh, high, BACK, SH, PH, DH)
        iw, seen_w = _seen(v, kw, wide, BACK, SW, PW, DW)
        t, drawn = k + start, k < depth - start
        c = t if COLUMNS else tl.load(index + t * stk, drawn, 0).to(tl.int64)  # [BK]
        at = ih * sxh + iw * sxw + c[None, :] * sxk
        a = tl.load(x + at, inside & seen_h & seen_w & drawn[None, :], 0.0)  # [BM, BK]
        at = c[:, None] * swk + (kh.to(tl.int64) * swh + kw.to(tl.int64) * sww)
        b = tl.load(w + at, drawn[:, None] & (j < cols), 0.0)  # [BK, BN]
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + (group * cols + j) * sb, j < cols, 0.0).to(tl.float32)
    y += n * syn + h.to(tl.int64) * syh + v.to(tl.int64) * syw + (group * full + to) * syj
    tl.store(y, acc.to(y.dtype.element_ty), inside & (j < cols))


def fused(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None, where: Where, size: Ints, *,
    back: bool = False, columns: bool = False,
) -> Tensor:  # fmt: skip
    """Run one launch (two for ``columns``, which are zeroed first): no gathered copy is written.

    Args:
        x: Left operand: the input, or for ``back`` the gradient of the result.
        w: Weight.
        indices: [groups, k] of the channels that are summed, or for ``columns`` are written.
        bias: [out] or None.
        where: Geometry.
        size: Of what returns.
        back: Whether that is a gradient by the input.
        columns: Whether indices name channels of the result.
    """
    groups, k, steps = where[3], indices.shape[1], where[0] if back else (1, 1)
    y = x.new_zeros(size) if columns else x.new_empty(size)
    among, full = x.shape[1] // groups, size[1] // groups
    cols, depth = (k, among) if columns else (full, k)
    rows = size[0] * triton.cdiv(size[2], steps[0]) * triton.cdiv(size[3], steps[1])
    phases = steps[0] * steps[1]
    chip = _tiles.shared_chip(x.device, groups * phases)
    tile = _tiles.gemm(rows, cols, depth, x.itemsize, 1, chip)
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]), groups, phases)
    with torch.cuda.device_of(x):
        _sampled_conv_kernel[grid](
            x, w, indices, bias, y, size[0], cols, depth, among, full, *x.shape[2:], *size[2:],
            *x.stride(), *geometry.filter_strides(w, groups, back), *indices.stride(),
            0 if bias is None else bias.stride(0), *y.stride(), COLUMNS=columns, BACK=back,
            **geometry.constants(w.shape, where, steps), **tile)  # fmt: skip
    return y
