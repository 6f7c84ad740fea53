"""A 2-d convolution with masked filters, and its grad_input, as GEMMs that gather their pixels.

Meaning: sparsefx/ops/nm.py.  Tiles, and which way: kernels/_tiles.py.  Derivation: README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.nm_conv import geometry
from sparsefx.kernels.nm_conv.geometry import Ints, Where
from sparsefx.kernels.nm_mm.triton import _keep_largest, _place, masked_weight
from sparsefx.ops import dense
from sparsefx.ops import nm as meaning


@triton.jit
def _first(residue, TAPS: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, GAP: tl.constexpr):
    """Find the first tap that lands on pixels residue, residue + STEP, ..; TAPS where none does."""
    first = residue * 0 + TAPS
    for back in tl.static_range(TAPS):
        tap = TAPS - 1 - back
        first = tl.where((residue + PAD - tap * GAP) % STEP == 0, tap, first)
    return first


@triton.jit
def _pixels(i, phase, images, high, wide, STEP_H: tl.constexpr, STEP_W: tl.constexpr):
    """Turn row i into its image and pixel, STEP apart, and say whether there is such an image."""
    top, left = phase // STEP_W, phase % STEP_W
    tall, broad = tl.cdiv(high - top, STEP_H), tl.cdiv(wide - left, STEP_W)
    some, tall, broad = tall * broad > 0, tl.maximum(tall, 1), tl.maximum(broad, 1)
    n, h, v = i // (tall * broad), i // broad % tall, i % broad
    h, v = top + STEP_H * h.to(tl.int32), left + STEP_W * v.to(tl.int32)
    return n, h, v, (n < images) & some


@triton.jit
def _seen(h, tap, size, BACK: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr,
          GAP: tl.constexpr):  # fmt: skip
    """Where the pixel lies that a tap joins to h, and whether the image has it."""
    # going back it is exact: _first left out the taps that miss h
    at = (h + PAD - tap * GAP) // STEP if BACK else h * STEP - PAD + tap * GAP
    return at.to(tl.int64), (at >= 0) & (at < size)


@triton.jit
def _masked_conv_kernel(
    x, w, mask, bias, y, images, cols, depth, high, wide, tall, broad,
    sxn, sxk, sxh, sxw, swg, swk, swj, swh, sww, smg, smk, smj, smh, smw, sb, syn, syj, syh, syw,
    BACK: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    JH: tl.constexpr, JW: tl.constexpr,
    DIM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write y [images, cols, tall, broad] from x [images, depth, high, wide]; BACK: grad_input."""
    WIDE: tl.constexpr = BN if DIM == 0 else BN // MP * M  # columns and depth that a tile holds
    DEEP: tl.constexpr = BK // MP * M if DIM == 0 else BK
    QH: tl.constexpr = SH if BACK else 1  # rows of a program share their taps
    QW: tl.constexpr = SW if BACK else 1
    pid, across = tl.program_id(0), tl.cdiv(cols, WIDE)
    down = tl.num_programs(0) // across
    pi, pj = tl.swizzle2d(pid // across, pid % across, down, across, GROUP)
    group, phase = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * WIDE + _place(BN, M if DIM == 1 else MP, MP)[None, :]
    k = _place(BK, M if DIM == 0 else MP, MP)
    n, h, v, inside = _pixels(i, phase, images, tall, broad, QH, QW)
    x += n * sxn + group * depth * sxk + k[None, :] * sxk  # int64 offsets, once
    w += group * swg + k[:, None] * swk + j * swj
    if mask is not None:
        mask += group * smg + k[:, None] * smk + j * smj
    top, left = _first(phase // QW, KH, QH, PH, DH), _first(phase % QW, KW, QW, PW, DW)
    a_row = tl.cdiv(KW - left, JW)  # taps that land, JH and JW apart
    chunks = tl.cdiv(depth, DEEP)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.cdiv(KH - top, JH) * a_row * chunks):  # of a tap all channels
        tap, start = step // chunks, (step % chunks) * DEEP  # a group never spans two tiles
        kh, kw = top + tap // a_row * JH, left + tap % a_row * JW
        ih, seen_h = _seen(h, kh, high, BACK, SH, PH, DH)
        iw, seen_w = _seen(v, kw, wide, BACK, SW, PW, DW)
        at = ih * sxh + iw * sxw + start.to(tl.int64) * sxk
        a = tl.load(x + at, inside & seen_h & seen_w & (k[None, :] < depth - start), 0.0)
        here = (k[:, None] < depth - start) & (j < cols)
        deep, kh, kw = start.to(tl.int64), kh.to(tl.int64), kw.to(tl.int64)
        b = tl.load(w + (deep * swk + kh * swh + kw * sww), here, 0.0)  # [BK, BN]
        if mask is not None:
            keep = tl.load(mask + (deep * smk + kh * smh + kw * smw), here, 0)
            b = tl.where(keep != 0, b, 0.0).to(b.dtype)
        else:
            b = _keep_largest(b, DIM, N, M, MP)
            if DIM == 1:  # Triton refuses a reshape right before the dot where k is contiguous
                b = tl.where(here, b, 0.0).to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + (group * cols + j) * sb, j < cols, 0.0).to(tl.float32)
    y += n * syn + h.to(tl.int64) * syh + v.to(tl.int64) * syw + (group * cols + j) * syj
    tl.store(y, acc.to(y.dtype.element_ty), inside & (j < cols))


def nm_conv(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, n: int, m: int, dim: int, transposable: bool,
) -> Tensor:  # fmt: skip
    """Convolve x with w, of which n of every m along dim act, sum in float32.

    Anything but 2 spatial axes, float64, mixed dtypes, transposable masks, m > 32, filters of one
    channel, empty tensors and groups of m that span groups of the convolution take the reference.

    Args:
        x: [batch, in, H, W], any strides.
        w: [out, in / groups, KH, KW], any strides.
        bias: [out] or None.
        stride: Of the two spatial axes, as the next two.
        padding: Zeros on either side.
        dilation: Between taps.
        groups: Of the convolution.
        n: Kept of every m.
        m: Group size.
        dim: Axis of w along which the groups run, for each tap.
        transposable: The mask keeps n of m along both channel axes.

    Returns:
        [batch, out, OH, OW] in x's dtype, laid out as the reference does.

    Raises:
        MaskError: Unless 1 <= n < m and m divides the axis.
    """
    where, pattern = (stride, padding, dilation, groups), (n, m, dim)
    size = geometry.result_size(x.shape, w.shape, where)
    ranked = not transposable and _ranked(w, groups, n, m, dim)
    if not ranked or not _served(x.shape, w, size, where, x, bias):
        return ops.REFERENCES[ops.nm_conv](x, w, bias, *where, *pattern, transposable)
    if _inside(x, w, size, where, (n, m)):
        return fused(x, w, None, bias, where, pattern)
    return copied(x, w, bias, where, pattern)


def masked_conv(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:  # fmt: skip
    """Convolve x with w where mask, sum in float32; served as nm_conv is, mask bool in w's shape.

    Returns:
        [batch, out, OH, OW] in x's dtype, laid out as the reference does.
    """
    where = stride, padding, dilation, groups
    size = geometry.result_size(x.shape, w.shape, where)
    known = _stored(w, mask) and _served(x.shape, w, size, where, x, bias)
    if known and _inside(x, w, size, where, None):
        return fused(x, w, mask, bias, where)
    return ops.REFERENCES[ops.masked_conv](x, w, mask, bias, *where)


def nm_conv_grad_input(
    grad: Tensor, w: Tensor, input_size: Ints, stride: Ints, padding: Ints, dilation: Ints,
    groups: int, n: int, m: int, dim: int, transposable: bool,
) -> Tensor:  # fmt: skip
    """Return nm_conv's gradient by x [input_size] from grad [batch, out, OH, OW]; served as it is.

    Raises:
        MaskError: Unless 1 <= n < m and m divides the axis.
    """
    where, pattern = (stride, padding, dilation, groups), (n, m, dim)
    ranked = not transposable and _ranked(w, groups, n, m, dim)
    if not ranked or not _served(input_size, w, grad.shape, where, grad, None):
        arguments = grad, w, input_size, *where, *pattern, transposable
        return ops.REFERENCES[ops.nm_conv_grad_input](*arguments)
    if _inside(grad, w, input_size, where, (n, m)):
        return fused(grad, w, None, None, where, pattern, input_size)
    return copied(grad, w, None, where, pattern, input_size)


def masked_conv_grad_input(
    grad: Tensor, w: Tensor, mask: Tensor, input_size: Ints, stride: Ints, padding: Ints,
    dilation: Ints, groups: int,
) -> Tensor:  # fmt: skip
    """Return masked_conv's gradient by x [input_size] from grad [batch, out, OH, OW]."""
    where = stride, padding, dilation, groups
    known = _stored(w, mask) and _served(input_size, w, grad.shape, where, grad, None)
    if known and _inside(grad, w, input_size, where, None):
        return fused(grad, w, mask, None, where, input_size=input_size)
    return ops.REFERENCES[ops.masked_conv_grad_input](grad, w, mask, input_size, *where)


def _ranked(w: Tensor, groups: int, n: int, m: int, dim: int) -> bool:
    """Whether the kernel ranks such groups: along a channel axis, within a group of filters."""
    if w.dim() != 4 or dim % 4 > 1 or not 1 <= n < m <= 32 or groups < 1:
        return False
    axis = w.shape[1] if dim % 4 == 1 else w.shape[0] // groups
    return axis % m == 0


def _stored(w: Tensor, mask: Tensor) -> bool:
    return mask.dtype == torch.bool and mask.shape == w.shape


def _served(
    image: Ints, w: Tensor, result: Ints, where: Where, x: Tensor, bias: Tensor | None
) -> bool:
    sizes = geometry.served(image, w.shape, result, where)
    return sizes and geometry.adds_up(w.shape[0], bias, x, w)


def _inside(
    x: Tensor, w: Tensor, size: Ints, where: Where, pattern: tuple[int, int] | None
) -> bool:
    """Whether to mask in the GEMM that makes ``size``; x's channels are what it sums over."""
    groups = where[3]
    rows = size[0] * min(size[2] * size[3], x.shape[2] * x.shape[3])  # a stride spares grad_input
    depth = x.shape[1] // groups * w.shape[2] * w.shape[3]
    shape = rows, size[1] // groups, depth, x.numel(), groups
    return _tiles.mask_in_conv(*shape, x.itemsize, pattern)


def _layout(
    x: Tensor, w: Tensor, mask: Tensor | None, where: Where, input_size: Ints | None
) -> torch.memory_format:
    """Layout of the reference's result, which follows x's and that of the weight it makes."""
    turned = input_size is not None
    extra = geometry.spare(input_size, w.shape, x.shape, where) if turned else [0, 0]
    key = w.shape, w.stride(), None if mask is None else mask.stride()

    def acting() -> Tensor:
        bits = torch.ones(w.shape, dtype=torch.bool, device=w.device) if mask is None else mask
        return meaning.keep(w, bits)

    return geometry.layout(key, x, acting, turned, extra, where)


def fused(
    x: Tensor, w: Tensor, mask: Tensor | None, bias: Tensor | None, where: Where,
    pattern: tuple[int, int, int] = (0, 1, 0), input_size: Ints | None = None,
) -> Tensor:  # fmt: skip
    """Run one launch, the filters masked inside it: by ``mask``, or by ``pattern`` (n, m, axis).

    With ``input_size`` x is the gradient of the result, and what returns is that of the input.
    """
    (n, m, axis), back, groups = pattern, input_size is not None, where[3]
    size = input_size if back else geometry.result_size(x.shape, w.shape, where)
    y = geometry.new(x, size, _layout(x, w, mask, where, input_size))
    bits = None if mask is None else mask.view(torch.uint8)
    padded, cols, depth = _tiles.power_of_2(m), size[1] // groups, x.shape[1] // groups
    dim = int((axis % 4 == 1) == back)  # groups of m run along the reduction, 0, or the columns, 1
    steps = where[0] if back else (1, 1)
    rows = size[0] * triton.cdiv(size[2], steps[0]) * triton.cdiv(size[3], steps[1])
    phases = steps[0] * steps[1]
    chip = _tiles.shared_chip(x.device, groups * phases)
    if mask is None:
        tile = _tiles.gemm(rows, cols, depth, x.itemsize, padded, chip)
    else:
        tile = _tiles.stored_mask_gemm(rows, cols, depth, x.itemsize, chip)
    wide = tile["BN"] // padded * m if dim else tile["BN"]
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, wide), groups, phases)
    with torch.cuda.device_of(x):
        _masked_conv_kernel[grid](
            x, w, bits, bias, y, size[0], cols, depth, *x.shape[2:], *size[2:], *x.stride(),
            *geometry.filter_strides(w, groups, back), *geometry.filter_strides(bits, groups, back),
            0 if bias is None else bias.stride(0), *y.stride(), BACK=back,
            **geometry.constants(w.shape, where, steps), DIM=dim, N=n, M=m, MP=padded,
            **tile)  # fmt: skip
    return y


def copied(
    x: Tensor, w: Tensor, bias: Tensor | None, where: Where, pattern: tuple[int, int, int],
    input_size: Ints | None = None,
) -> Tensor:  # fmt: skip
    """Run it as one masked copy of w and the library's convolution; arguments as fused has them."""
    kept = masked_filters(w, *pattern)
    if input_size is None:
        y = meaning._conv(x, kept, bias, *where)
    else:
        y = dense._grad_input(x, kept, input_size, *where)
    return y.contiguous(memory_format=_layout(x, w, None, where, input_size))


def masked_filters(w: Tensor, n: int, m: int, axis: int) -> Tensor:
    """Copy w [out, in, KH, KW] with zeros outside the mask along axis 0 or 1, of each tap.

    Where channels lie next to each other the copy does, too; else the result is contiguous.
    """
    if w.is_contiguous(memory_format=torch.channels_last):
        last = w.permute(0, 2, 3, 1)  # contiguous
        if axis % 4 == 1:
            kept = masked_weight(last.flatten(0, 2), n, m, 1)
        else:
            kept = masked_weight(last.flatten(1), n, m, 0)
        return kept.view(last.shape).permute(0, 3, 1, 2)
    first = w.contiguous()
    if axis % 4 == 0:
        return masked_weight(first.flatten(1), n, m, 0).view(w.shape)
    return masked_weight(first.flatten(2), n, m, 0).view(w.shape)
