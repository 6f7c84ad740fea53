"""y = x[:, idx] @ w[idx, :] + bias and its two gradients: gathered and scattered inside the GEMM.

Meaning: sparsefx/ops/sampled.py.  Tiles, and which way: kernels/_tiles.py.  Why: README.md.
Indices lie in 0..K-1; the forward takes any order and repeats, the gradients need them unique.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.ops import gathers as meaning


@triton.jit
def _sampled_mm_kernel(x, w, index, bias, y, rows, cols, depth,
                       sxi, sxk, swk, swj, st, sb, syi, syj,
                       BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                       GROUP: tl.constexpr):  # fmt: skip
    pid, across = tl.program_id(0), tl.cdiv(cols, BN)
    pi, pj = tl.swizzle2d(pid // across, pid % across, tl.cdiv(rows, BM), across, GROUP)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * BN + tl.arange(0, BN)[None, :]
    t = tl.arange(0, BK).to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        drawn = t < depth - start
        k = tl.load(index + (t + start) * st, drawn, 0).to(tl.int64)  # [BK]
        a = tl.load(x + i * sxi + k[None, :] * sxk, (i < rows) & drawn[None, :], 0.0)  # [BM, BK]
        b = tl.load(w + k[:, None] * swk + j * swj, drawn[:, None] & (j < cols), 0.0)  # [BK, BN]
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + j * sb, j < cols, 0.0).to(tl.float32)
    tl.store(y + i * syi + j * syj, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


@triton.jit
def _scattered_mm_kernel(a, b, index, y, rows, cols, depth, sai, sak, sbk, sbj, st, syi, syj,
                         GATHER: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                         GROUP: tl.constexpr):  # fmt: skip
    """Do y[:, index] = a @ b, or a @ b[:, index] where GATHER."""
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
    tl.store(y + i * syi + to * syj, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


def sampled_mm(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None,
    scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    """Multiply x [M, K] by w [K, N] over the K's in indices [k], add bias [N], sum in float32.

    float64, mixed dtypes, large shapes, and pairs that are scaled or stood in for take the
    reference: gathered copies, the library's GEMM.
    """
    shape = x.shape[0], w.shape[1], len(indices)
    plain = scale is None and not rest and _adds_up(x, w, bias)
    if not plain or not _tiles.columns_in_gemm(*shape, x.itemsize):
        return ops.REFERENCES[ops.sampled_mm](x, w, indices, bias, scale, rest)
    return fused(x, w, indices, bias)


def fused(x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None) -> Tensor:
    """Run sampled_mm in one launch: neither gathered operand is written."""
    rows, cols, depth = x.shape[0], w.shape[1], len(indices)
    if x.shape[1] != w.shape[0]:
        raise ValueError(f"x {list(x.shape)} @ w {list(w.shape)}: K differs")
    y = x.new_empty(rows, cols)
    if not y.numel():
        return y
    b = None if bias is None else bias.expand(cols)
    tile = _tiles.gemm(rows, cols, depth, x.itemsize, 1, _tiles.chip(x.device))
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]),)
    with torch.cuda.device_of(x):
        _sampled_mm_kernel[grid](
            x, w, indices, b, y, rows, cols, depth, *x.stride(), *w.stride(), *indices.stride(),
            0 if b is None else b.stride(0), *y.stride(), **tile)  # fmt: skip
    return y


def sampled_mm_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    """Return [M, K]: zeros, but columns indices [k] are grad [M, N] @ w[indices] turned."""
    if scale is not None or rest:
        return ops.REFERENCES[ops.sampled_mm_grad_input](grad, w, indices, scale, rest)
    y = grad.new_zeros(grad.shape[0], w.shape[0])
    shape = grad.shape[0], len(indices), w.shape[1]
    if not _adds_up(grad, w) or not _tiles.rows_in_gemm(*shape, grad.itemsize, copies=2):
        return y.index_copy_(1, indices, grad @ meaning.rows(w, indices).t())
    return scattered(grad, w.t(), indices, y, gather=True)


def sampled_mm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, transposed: bool, rest: bool = False
) -> Tensor:
    """Return [depth, N], zero but for rows indices [k]: xs [M, k] turned @ grad [M, N].

    ``transposed`` returns the same as [N, depth], contiguous.
    """
    if rest:
        arguments = xs, grad, indices, depth, transposed, rest
        return ops.REFERENCES[ops.sampled_mm_grad_weight](*arguments)
    cols = grad.shape[1]
    y = grad.new_zeros((cols, depth) if transposed else (depth, cols))
    turned = y if transposed else y.t()  # [N, depth]
    shape = cols, len(indices), len(xs)
    if not _adds_up(xs, grad) or not _tiles.rows_in_gemm(*shape, grad.itemsize, copies=1):
        turned.index_copy_(1, indices, grad.t() @ xs if transposed else (xs.t() @ grad).t())
    else:
        scattered(grad.t(), xs, indices, turned, gather=False)
    return y


def scattered(a: Tensor, b: Tensor, indices: Tensor, y: Tensor, *, gather: bool) -> Tensor:
    """Write a [M, D] @ b [D, k] into columns indices [k] of y; gather picks b's columns too."""
    (rows, depth), cols = a.shape, len(indices)
    if depth != b.shape[0] or (not gather and cols != b.shape[1]):
        raise ValueError(f"{list(a.shape)} @ {list(b.shape)} into {cols} columns: sizes differ")
    if not rows * cols:
        return y
    tile = _tiles.gemm(rows, cols, depth, a.itemsize, 1, _tiles.chip(a.device))
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]),)
    with torch.cuda.device_of(a):
        _scattered_mm_kernel[grid](
            a, b, indices, y, rows, cols, depth, *a.stride(), *b.stride(), *indices.stride(),
            *y.stride(), GATHER=gather, **tile)  # fmt: skip
    return y


def _adds_up(*operands: Tensor | None) -> bool:
    dtypes = {o.dtype for o in operands if o is not None}
    return len(dtypes) == 1 and dtypes <= set(_tiles.DTYPES)
