"""A weight's gradient, summed over pixels of all or of sampled examples, in parts where long."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx.kernels import _tiles
from sparsefx.kernels.nm_conv import geometry
from sparsefx.kernels.nm_conv.geometry import Where
from sparsefx.kernels.nm_conv.triton import _seen


@triton.jit
def _conv_weight_kernel(
    g, x, index, columns, y, rows, cols, channels, depth, steps, high, wide, tall, broad,
    sgn, sgi, sgh, sgw, sxn, sxc, sxh, sxw, st, scg, scc, sys, syi, syc, syh, syw,
    GATHERED: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Sum g's pixels [depth] times x's under each tap: y [splits, groups * rows, channels, taps].

    ``index`` names the examples of g, and of x unless GATHERED; ``columns`` [groups, channels]
    where in y each channel goes.
    """
    pid, across = tl.program_id(0), tl.cdiv(cols, BN)
    down = tl.num_programs(0) // across
    pi, pj = tl.swizzle2d(pid // across, pid % across, down, across, GROUP)
    group, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj * BN + tl.arange(0, BN)[None, :]
    tap, c = j // channels, (j % channels).to(tl.int64)  # channels of a tap side by side
    kh, kw = tap // KW, tap % KW
    g += (group * rows + i) * sgi
    x += (group * channels + c) * sxc
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, steps):
        p = (split * steps + step) * BK + tl.arange(0, BK)
        n, inside = (p // (tall * broad)).to(tl.int64), p < depth
        h, v = p // broad % tall, p % broad
        e = n if index is None else tl.load(index + n * st, inside, 0).to(tl.int64)
        at = e * sgn + h.to(tl.int64) * sgh + v.to(tl.int64) * sgw
        a = tl.load(g + at[None, :], (i < rows) & inside[None, :], 0.0)  # [BM, BK]
        ih, seen_h = _seen(h[:, None], kh, high, False, SH, PH, DH)
        iw, seen_w = _seen(v[:, None], kw, wide, False, SW, PW, DW)
        at = (n if GATHERED else e)[:, None] * sxn + ih * sxh + iw * sxw
        b = tl.load(x + at, inside[:, None] & seen_h & seen_w & (j < cols), 0.0)  # [BK, BN]
        acc = tl.dot(a, b, acc, input_precision="ieee")
    to = c
    if columns is not None:
        to = tl.load(columns + group * scg + c * scc, j < cols, 0).to(tl.int64)
    y += split.to(tl.int64) * sys + (group * rows + i) * syi + to * syc
    y += kh.to(tl.int64) * syh + kw.to(tl.int64) * syw
    tl.store(y, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


def weight_sums(
    x: Tensor, grad: Tensor, y: Tensor, channels: int, where: Where, *,
    columns: Tensor | None = None, examples: Tensor | None = None, gathered: bool = False,
) -> Tensor:  # fmt: skip
    """Write a weight's gradient into y [out, in / groups, KH, KW] and return it.

    A long sum is split: float32 sums of the parts are written, added up and rounded.

    Args:
        x: [batch, groups * channels, H, W].
        grad: [batch, out, OH, OW].
        y: What is written, zero where ``columns`` leave it out.
        channels: Of x, in a group.
        where: Geometry.
        columns: [groups, channels], where in y each channel goes; None is where it is.
        examples: [k] of grad's batch that count; None is all.
        gathered: Whether x's batch is those examples.
    """
    groups, (out, _, *taps) = where[3], y.shape
    rows, cols = out // groups, channels * taps[0] * taps[1]
    depth = (len(grad) if examples is None else len(examples)) * grad.shape[2] * grad.shape[3]
    tile = _tiles.gemm(rows, cols, depth, x.itemsize, 1, _tiles.shared_chip(x.device, groups))
    tiles = triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"])
    chip = _tiles.chip(x.device)
    splits = _tiles.conv_weight_splits(tiles * groups, depth, tile["BK"], chip)
    steps = triton.cdiv(triton.cdiv(depth, tile["BK"]), splits)
    direct = splits == 1
    parts = y if direct else grad.new_empty(splits, out, channels, *taps, dtype=torch.float32)
    at = columns if direct else None
    constants = geometry.constants([out, channels, *taps], where, (1, 1))
    kept = {name: constants[name] for name in ("KW", "SH", "SW", "PH", "PW", "DH", "DW")}
    with torch.cuda.device_of(x):
        _conv_weight_kernel[tiles, groups, splits](
            grad, x, examples, at, parts, rows, cols, channels, depth, steps, *x.shape[2:],
            *grad.shape[2:], *grad.stride(), *x.stride(),
            0 if examples is None else examples.stride(0), *((0, 0) if at is None else at.stride()),
            *((0, *y.stride()) if direct else parts.stride()), GATHERED=gathered, **kept,
            **tile)  # fmt: skip
    return y if direct else _added(parts, y, columns)


def _added(parts: Tensor, y: Tensor, columns: Tensor | None) -> Tensor:
    """Add parts [splits, out, channels, KH, KW] up into y, at the channels ``columns``."""
    total = parts.sum(0).to(y.dtype)
    if columns is None:
        return y.copy_(total)
    each = columns.repeat_interleave(len(total) // len(columns), 0)[:, :, None, None]
    return y.scatter_(1, each.expand(total.shape), total)
