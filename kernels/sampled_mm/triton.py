"""y = x[:, idx] @ w[idx, :] + bias and its gradients: gathered and scattered inside the GEMM.

Meaning: sparsefx/ops/sampled.py.  Tiles, and which way: kernels/_tiles.py.  Why: README.md.
Indices lie in 0..K-1; the forward takes any order and repeats, the gradients need them unique.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.scores import triton as sums
from sparsefx.ops import gathers as meaning


@triton.jit
def _sampled_mm_kernel(x, w, index, bias, scale, left, right, y, rows, cols, depth,
                       sxi, sxk, swk, swj, st, sb, sc, sl, syi, syj,
                       GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                       BK: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Do y = (x[:, index] * scale) @ w[index] + left right' + bias; x is gathered unless GATHER."""
    pid, across = tl.program_id(0), tl.cdiv(cols, BN)
    pi, pj = tl.swizzle2d(pid // across, pid % across, tl.cdiv(rows, BM), across, GROUP)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    t = tl.arange(0, BK).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        drawn = t < depth - start
        k = tl.load(index + (t + start) * st, drawn, 0).to(tl.int64)  # [BK]
        at = k if GATHER else t + start
        a = tl.load(x + i * sxi + at[None, :] * sxk, (i < rows) & drawn[None, :], 0.0)  # [BM, BK]
        if scale is not None:  # rounded, as the reference's scaled copy is
            factor = tl.load(scale + (t + start) * sc, drawn, 0.0)[None, :]
            a = (a.to(tl.float32) * factor).to(a.dtype)
        b = tl.load(w + k[:, None] * swk + j * swj, drawn[:, None] & (j < cols), 0.0)  # [BK, BN]
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if left is not None:  # the pair that stands for the others
        u = tl.load(left + i * sl, i < rows, 0.0).to(tl.float32)  # [BM, 1]
        acc += u * tl.load(right + j, j < cols, 0.0).to(tl.float32)
    if bias is not None:
        acc += tl.load(bias + j * sb, j < cols, 0.0).to(tl.float32)
    tl.store(y + i * syi + j * syj, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


@triton.jit
def _scattered_mm_kernel(a, b, index, scale, y, rows, cols, depth,
                         sai, sak, sbk, sbj, st, sc, syi, syj,
                         GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                         GROUP: tl.constexpr):  # fmt: skip
    """Do y[:, index] = a @ b * scale, or a @ b[:, index] * scale where GATHER."""
    pid, across = tl.program_id(0), tl.cdiv(cols, BN)
    pi, pj = tl.swizzle2d(pid // across, pid % across, tl.cdiv(rows, BM), across, GROUP)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK).to(tl.int64)
    to = tl.load(index + j * st, j < cols, 0).to(tl.int64)  # [1, BN]
    at, bt = a + i * sai + k[None, :] * sak, b + k[:, None] * sbk + (to if GATHER else j) * sbj
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        u = tl.load(at, (i < rows) & (k[None, :] < depth - start), 0.0)  # [BM, BK]
        v = tl.load(bt, (k[:, None] < depth - start) & (j < cols), 0.0)  # [BK, BN]
        acc = tl.dot(u, v, acc, input_precision="ieee")
        at += tl.full((), BK, tl.int64) * sak
        bt += tl.full((), BK, tl.int64) * sbk
    if scale is not None:
        acc *= tl.load(scale + j * sc, j < cols, 0.0)
    tl.store(y + i * syi + to * syj, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


@triton.jit
def _taken_kernel(x, index, scale, last, y, rows, depth, width, sxi, sxk, st, sc, sl, syi, syk,
                  BR: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """Do y = x[:, index] * scale, then the column last, then zeros up to width."""
    pid, across = tl.program_id(0), tl.cdiv(width, BT)
    i = (pid // across).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    t = (pid % across) * BT + tl.arange(0, BT).to(tl.int64)[None, :]
    k = tl.load(index + t * st, t < depth, 0).to(tl.int64)  # [1, BT]
    v = tl.load(x + i * sxi + k * sxk, (i < rows) & (t < depth), 0.0)  # [BR, BT]
    if scale is not None:
        v = (v.to(tl.float32) * tl.load(scale + t * sc, t < depth, 0.0)).to(v.dtype)
    if last is not None:
        v = tl.where(t == depth, tl.load(last + i * sl, i < rows, 0.0), v)
    tl.store(y + i * syi + t * syk, v, (i < rows) & (t < width))


def sampled_mm(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None,
    scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply x [M, K] by w [K, N] over the K's in indices [k], add bias [N], sum in float32.

    float64, mixed dtypes and a scale that isn't float32 take the reference; large shapes are
    gathered copies and the library's GEMM.
    """
    if not _adds_up(x, w, bias) or not _float32(scale):
        return ops.REFERENCES[ops.sampled_mm](x, w, indices, bias, scale, rest)
    left, right = _others(x, w, indices) if rest else (None, None)
    shape = x.shape[0], w.shape[1], len(indices)
    # columns that lie in memory as rows do (x is turned, as in a weight's gradient) are rows
    turned = x.stride(0) < x.stride(1)
    inside = _tiles.rows_in_gemm(*shape, x.itemsize, copies=2) if turned else (
        _tiles.columns_in_gemm(*shape, x.itemsize))  # fmt: skip
    if inside:
        return fused(x, w, indices, bias, scale, left, right)
    xs, ws = taken(x, indices, scale, left), taken(w.t(), indices, None, right).t()
    return xs @ ws if bias is None else torch.addmm(bias, xs, ws)


def sampled_mm_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, transposed: bool, rest: bool = False
) -> Tensor:
    """Return [K, N]: xs [k, K] turned @ rows indices [k] of grad [M, N]; transposed, [N, K].

    With rest, xs [k + 1, K] ends in what goes with the mean of grad's other rows. float64 and mixed
    dtypes take the reference; large shapes copy the rows for the library's GEMM.
    """
    if not _adds_up(xs, grad):
        return ops.REFERENCES[ops.sampled_mm_weight](xs, grad, indices, transposed, rest)
    k, shape = len(indices), (xs.shape[1], grad.shape[1])
    right = _others(None, grad, indices)[1] if rest else None
    if not _tiles.rows_in_gemm(*shape, k, grad.itemsize, copies=1):
        gs = taken(grad.t(), indices, None, right, multiple=1)  # [N, k + rest]
        return gs @ xs if transposed else xs.t() @ gs.t()
    out = xs.new_empty(shape[::-1]).t() if transposed else None
    left = xs[k] if rest else None
    y = fused(xs[:k].t(), grad, indices, None, None, left, right, out=out, gather=False)
    return y.t() if transposed else y


def fused(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None, scale: Tensor | None = None,
    left: Tensor | None = None, right: Tensor | None = None, *,
    out: Tensor | None = None, gather: bool = True,
) -> Tensor:  # fmt: skip
    """Run sampled_mm in one launch: neither gathered operand is written.

    ``left`` [M] and ``right`` [N] add their outer product; without ``gather`` x is [M, k] already.

    Raises:
        ValueError: K of x and w differ, or k of x and the indices.
    """
    rows, cols, depth = x.shape[0], w.shape[1], len(indices)
    if x.shape[1] != (w.shape[0] if gather else depth):
        raise ValueError(f"x {list(x.shape)} @ w {list(w.shape)}: K differs")
    y = x.new_empty(rows, cols) if out is None else out
    if not y.numel():
        return y
    b = None if bias is None else bias.expand(cols)
    tile = _tiles.gemm(rows, cols, depth, x.itemsize, 1, _tiles.chip(x.device))
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]),)
    with torch.cuda.device_of(x):
        _sampled_mm_kernel[grid](
            x, w, indices, b, scale, left, right, y, rows, cols, depth,
            *x.stride(), *w.stride(), *indices.stride(), _step(b), _step(scale), _step(left),
            *y.stride(), GATHER=gather, **tile)  # fmt: skip
    return y


def sampled_mm_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    """Return [M, K]: columns indices [k] are grad [M, N] @ w[indices] turned * scale.

    The others are zeros; with rest, grad @ the mean of w's other rows. Scales multiply float32
    sums where it is fused. float64, mixed dtypes and a scale that isn't float32 take the reference.
    """
    if not _adds_up(grad, w) or not _float32(scale):
        return ops.REFERENCES[ops.sampled_mm_grad_input](grad, w, indices, scale, rest)
    size, others = (grad.shape[0], w.shape[0]), None
    if rest:
        mean = _others(None, w, indices)[1]
        others = _weighted(grad, mean, 1)
    y = grad.new_zeros(size) if others is None else grad.new_empty(size).copy_(others[:, None])
    shape = grad.shape[0], len(indices), w.shape[1]
    if _tiles.rows_in_gemm(*shape, grad.itemsize, copies=2):
        return scattered(grad, w.t(), indices, y, scale, gather=True)
    product = grad @ taken(w.t(), indices, scale)
    return y.index_copy_(1, indices, product[:, : len(indices)])


def sampled_mm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, transposed: bool, rest: bool = False
) -> Tensor:
    """Return [depth, N]: rows indices [k] are xs [M, k] turned @ grad [M, N], the others zeros.

    With rest, xs has one column more, and the others share its gradient evenly. ``transposed``
    returns the same as [N, depth], contiguous. float64 and mixed dtypes take the reference.
    """
    if not _adds_up(xs, grad):
        arguments = xs, grad, indices, depth, transposed, rest
        return ops.REFERENCES[ops.sampled_mm_grad_weight](*arguments)
    cols, k = grad.shape[1], len(indices)
    size = (cols, depth) if transposed else (depth, cols)
    if rest:
        others = _weighted(grad.t(), xs[:, k], max(depth - k, 1))  # [N]
        y = grad.new_empty(size).copy_(others[:, None] if transposed else others)
        xs = xs[:, :k]
    else:
        y = grad.new_zeros(size)
    turned = y if transposed else y.t()  # [N, depth]
    if _tiles.rows_in_gemm(cols, k, len(xs), grad.itemsize, copies=1):
        scattered(grad.t(), xs, indices, turned, gather=False)
    else:
        turned.index_copy_(1, indices, grad.t() @ xs if transposed else (xs.t() @ grad).t())
    return y


def scattered(
    a: Tensor, b: Tensor, indices: Tensor, y: Tensor, scale: Tensor | None = None, *, gather: bool
) -> Tensor:
    """Write a [M, D] @ b [D, k] * scale into columns indices [k] of y; gather picks b's too.

    Raises:
        ValueError: D of a and b differ, or k of b and the indices.
    """
    (rows, depth), cols = a.shape, len(indices)
    if depth != b.shape[0] or (not gather and cols != b.shape[1]):
        raise ValueError(f"{list(a.shape)} @ {list(b.shape)} into {cols} columns: sizes differ")
    if not rows * cols:
        return y
    tile = _tiles.gemm(rows, cols, depth, a.itemsize, 1, _tiles.chip(a.device))
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]),)
    with torch.cuda.device_of(a):
        _scattered_mm_kernel[grid](
            a, b, indices, scale, y, rows, cols, depth, *a.stride(), *b.stride(),
            *indices.stride(), _step(scale), *y.stride(), GATHER=gather, **tile)  # fmt: skip
    return y


def taken(
    x: Tensor, indices: Tensor, scale: Tensor | None = None, last: Tensor | None = None,
    *, multiple: int = 8,
) -> Tensor:  # fmt: skip
    """Copy columns indices [k] of x [R, K], scaled and rounded once; then the column last [R].

    Zeros follow up to a multiple of 8: the library's GEMM wants rows that start on 16 bytes. The
    copy lies in memory as x does.
    """
    rows, depth = len(x), len(indices)
    width = triton.cdiv(depth + (last is not None), multiple) * multiple
    turned = x.stride(0) < x.stride(1)
    y = x.new_empty(width, rows).t() if turned else x.new_empty(rows, width)
    if y.numel():
        side = 64  # reasoned: whole lines of 128 bytes of 16-bit elements
        grid = (triton.cdiv(rows, side) * triton.cdiv(width, side),)
        with torch.cuda.device_of(x):
            _taken_kernel[grid](
                x, indices, scale, last, y, rows, depth, width, *x.stride(), *indices.stride(),
                _step(scale), _step(last), *y.stride(), BR=side, BT=side)  # fmt: skip
    return y


def _others(x: Tensor | None, w: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the columns of x [M, K] that aren't drawn, and average such rows of w [K, N]: [M], [N].

    One pass over both; without x the first is empty.
    """
    outside = meaning.outside(indices, w.shape[0], w)  # [K]
    count = max(len(w) - len(indices), 1)
    sides = (w.t(), None) if x is None else (x, w.t())
    rows = 0 if x is None else len(x)
    y = sums.finished(sums.partial_sums(*sides, outside), w, rows, count)
    return y[:rows], y[rows:]


def _weighted(a: Tensor, weight: Tensor, count: int) -> Tensor:
    """Multiply a [R, D] by a vector [D], over count, in a's dtype."""
    return sums.finished(sums.partial_sums(a, None, weight), a, 0, count)


def _step(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def _float32(scale: Tensor | None) -> bool:
    return scale is None or scale.dtype == torch.float32


def _adds_up(*operands: Tensor | None) -> bool:
    dtypes = {o.dtype for o in operands if o is not None}
    return len(dtypes) == 1 and dtypes <= set(_tiles.DTYPES)
