"""2-d convolutions over sampled channels, and their gradients: gathered and scattered inside.

Meaning: sparsefx/ops/sampled_conv.py.  Tiles, and which way: kernels/_tiles.py.  Why: README.md.
Indices lie in 0..channels - 1; the gradients by x and w need them unique.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
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


def sampled_conv(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Convolve the channels indices [groups, k] of x with those of w, add bias, sum in float32.

    Anything but 2 spatial axes, float64, mixed dtypes, filters of one channel, empty tensors,
    pairs that are scaled or stood in for, and large shapes take the reference: gathered copies and
    the library's convolution.

    Args:
        x: [batch, in, H, W], any strides.
        w: [out, in / groups, KH, KW], any strides.
        indices: [groups, k], positions within each group, any order, repeats count again.
        bias: [out] or None.
        stride: Of the two spatial axes, as the next two.
        padding: Zeros on either side.
        dilation: Between taps.
        groups: Of the convolution.
        scale: Leaves it to the reference, unless None.
        rest: Leaves it to the reference, if true.

    Returns:
        [batch, out, OH, OW] in x's dtype, contiguous.
    """
    where = stride, padding, dilation, groups
    size = geometry.result_size(x.shape, w.shape, where)
    if scale is None and not rest and _served(x.shape, w, size, where, indices, x, bias):
        k, (out, per_group, *_) = indices.shape[1], w.shape
        shape = _pixels_of(size), out // groups, k * _taps(w.shape), groups, x.itemsize
        moved = (x.numel() + w.numel()) * k // per_group
        if _tiles.gathers_in_conv(*shape, moved, 2, _tiles.COLUMNS_SHARE):
            return fused(x, w, indices, bias, where, size)
    arguments = x, w, indices, bias, *where, scale, rest
    return ops.REFERENCES[ops.sampled_conv](*arguments)


def sampled_conv_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Return sampled_conv's gradient by x: zeros, but for channels indices [groups, k], unique.

    Served as sampled_conv is; [batch, in, H, W] in grad's dtype, contiguous.
    """
    where = stride, padding, dilation, groups
    served = _served(input_size, w, grad.shape, where, indices, grad, None)
    if scale is None and not rest and served:
        k, (out, per_group, *_) = indices.shape[1], w.shape
        shape = _pixels_of(grad.shape), k, out // groups * _taps(w.shape), groups, grad.itemsize
        moved = w.numel() * k // per_group + _pixels_of(input_size) * groups * k
        if _tiles.gathers_in_conv(*shape, moved, 2, _tiles.CONV_SHARE):
            return fused(grad, w, indices, None, where, input_size, back=True, columns=True)
    arguments = grad, w, indices, input_size, *where, scale, rest
    return ops.REFERENCES[ops.sampled_conv_grad_input](*arguments)


def sampled_conv_input(
    grad: Tensor, w: Tensor, indices: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Return a convolution's gradient by x, summed over filters indices [groups, k] alone.

    Served as sampled_conv is; [batch, in, H, W] in grad's dtype, contiguous.
    """
    where = stride, padding, dilation, groups
    served = _served(input_size, w, grad.shape, where, indices, grad, None)
    if scale is None and not rest and served:
        k, (out, per_group, *_) = indices.shape[1], w.shape
        shape = _pixels_of(grad.shape), per_group, k * _taps(w.shape), groups, grad.itemsize
        moved = (grad.numel() + w.numel()) * k * groups // out
        if _tiles.gathers_in_conv(*shape, moved, 2, _tiles.COLUMNS_SHARE):
            return fused(grad, w, indices, None, where, input_size, back=True)
    arguments = grad, w, indices, input_size, *where, scale, rest
    return ops.REFERENCES[ops.sampled_conv_input](*arguments)


def sampled_conv_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, weight_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Return sampled_conv's gradient by w, zero but for the channels indices [groups, k], unique.

    Served as sampled_conv is; xs [batch, groups * k, H, W] are the sampled channels of x.
    """
    where, (out, _, *taps) = (stride, padding, dilation, groups), weight_size
    arguments = xs, grad, indices, weight_size, *where, rest
    reference = ops.REFERENCES[ops.sampled_conv_grad_weight]
    if rest or len(xs) != len(grad) or not _drawn(indices, groups):
        return reference(*arguments)
    size = [out, indices.shape[1], *taps]  # of the part that is not zero
    if not _adds_to_weight(xs, grad, size, where):
        return reference(*arguments)
    shape = out // groups, size[1] * _taps(size), _pixels_of(grad.shape), groups, xs.itemsize
    if not _tiles.gathers_in_conv(*shape, out * size[1] * _taps(size), 1, _tiles.CONV_SHARE):
        return reference(*arguments)
    y = xs.new_zeros(weight_size)
    return weight_sums(xs, grad, y, size[1], where, columns=indices)


def sampled_conv_weight(
    grad: Tensor, x: Tensor, indices: Tensor, weight_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int, scale: Tensor | None = None, rest: bool = False,
    gathered: bool = False,
) -> Tensor:  # fmt: skip
    """Return a convolution's gradient by w, summed over the examples indices [1, k] alone.

    Served as sampled_conv is; ``gathered`` says that x holds those examples and no others.
    """
    where = stride, padding, dilation, groups
    arguments = grad, x, indices, weight_size, *where, scale, rest, gathered
    reference = ops.REFERENCES[ops.sampled_conv_weight]
    known = scale is None and not rest and _drawn(indices, 1)
    examples = len(x) == (indices.shape[-1] if gathered else len(grad))
    if not known or not examples or not _adds_to_weight(x, grad, weight_size, where):
        return reference(*arguments)
    out, per_group, k = *weight_size[:2], indices.shape[1]
    depth = k * _pixels_of(grad.shape) // len(grad)
    shape = out // groups, per_group * _taps(weight_size), depth, groups, x.itemsize
    each, launches = (0, 1) if gathered else (x[0].numel(), 2)
    moved = k * (grad[0].numel() + each)
    if not _tiles.gathers_in_conv(*shape, moved, launches, _tiles.CONV_SHARE):
        return reference(*arguments)
    memory = torch.contiguous_format
    if gathered:  # the reference copies examples into contiguous memory, else
        like = x.new_empty(()).expand(weight_size)
        memory = geometry.layout(tuple(weight_size), x, lambda: like, False, [0, 0], where)
    y = geometry.new(x, weight_size, memory)
    return weight_sums(x, grad, y, per_group, where, examples=indices[0], gathered=gathered)


def _drawn(indices: Tensor, groups: int) -> bool:
    return indices.dim() == 2 and len(indices) == groups and indices.shape[1] > 0


def _served(
    image: Ints, w: Tensor, result: Ints, where: Where, indices: Tensor, x: Tensor,
    bias: Tensor | None,
) -> bool:  # fmt: skip
    sizes = geometry.served(image, w.shape, result, where) and _drawn(indices, where[3])
    return sizes and geometry.adds_up(w.shape[0], bias, x, w)


def _adds_to_weight(x: Tensor, grad: Tensor, size: Ints, where: Where) -> bool:
    """Whether x and grad give a weight's gradient of this size, as far as their images go."""
    image, result = [1, *x.shape[1:]], [1, *grad.shape[1:]]
    sizes = min(len(x), len(grad)) > 0 and geometry.served(image, size, result, where)
    return sizes and _pixels_of(grad.shape) < 1 << 30 and geometry.adds_up(size[0], None, x, grad)


def _pixels_of(size: Ints) -> int:
    """Of all images [batch, channels, high, wide]."""
    return size[0] * size[2] * size[3]


def _taps(size: Ints) -> int:
    return size[2] * size[3]


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
    depth = (len(grad) if examples is None else len(examples)) * _taps(grad.shape)
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
