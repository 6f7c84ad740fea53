"""Norms of both operands' pairs in one launch, the k largest of them in the next.

Meaning: sparsefx/ops/scores.py, draws.py.  Splits: kernels/_tiles.py.  Why: README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.ops.scores import combined

GRID = 65535  # programs along the third axis of a CUDA grid
LARGEST = 8192  # scores that one program chooses from


@triton.jit
def _sum_rows(a, weight, out, block, size, deep, si, sd, sw,
              SQUARE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Store one split's share of out[r] = sum of a[r, d] * weight[d], or of a[r, d] squared."""
    r = block.to(tl.int64) * BR + tl.arange(0, BR)
    splits = tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(deep, BD), splits) * BD  # one after the other, in whole tiles
    first = tl.program_id(1) * share
    acc = tl.zeros((BR, BD), tl.float32)
    for start in range(first, tl.minimum(first + share, deep), BD):
        d = start + tl.arange(0, BD).to(tl.int64)
        inside = (r < size)[:, None] & (d < deep)[None, :]
        v = tl.load(a + r[:, None] * si + d[None, :] * sd, inside, 0.0).to(tl.float32)  # [BR, BD]
        if SQUARE:
            acc += v * v
        else:
            acc += v * tl.load(weight + d * sw, d < deep, 0.0).to(tl.float32)[None, :]
    tl.store(out + r, tl.sum(acc, axis=1), r < size)


@triton.jit
def _sums_kernel(a, b, weight, parts, rows, cols, a_depth, b_depth,
                 sab, sai, sad, sbb, sbi, sbd, sw, SQUARE: tl.constexpr,
                 BR: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Fill parts[batch, split] with what _sum_rows gives of a's rows, and of b's after them."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    across = tl.cdiv(rows, BR)
    out = parts + (batch * tl.num_programs(1) + tl.program_id(1)) * (rows + cols)
    if block < across:
        _sum_rows(a + batch * sab, weight, out, block, rows, a_depth, sai, sad, sw, SQUARE, BR, BD)
    else:
        block -= across
        _sum_rows(b + batch * sbb, weight, out + rows, block, cols, b_depth, sbi, sbd, sw,
                  SQUARE, BR, BD)  # fmt: skip


@triton.jit
def _total(parts, r, inside, splits, width):
    """Add up parts [splits, width] at r, in order."""
    total = tl.zeros(r.shape, tl.float32)
    for _ in range(splits):
        total += tl.load(parts + r, inside, 0.0)
        parts += width
    return total


@triton.jit
def _finish_kernel(parts, y, size, splits, meant, count, BR: tl.constexpr):
    """Do y = parts summed over splits, from ``meant`` on over count."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    total = _total(parts, r, r < size, splits, size)
    total = tl.where(r < meant, total, tl.div_rn(total, count))
    tl.store(y + r, total.to(y.dtype.element_ty), r < size)


@triton.jit
def _store_largest(score, lane, depth, k, out):
    """Store the places of the k largest of ``depth`` scores, ascending; NaN first, then earlier.

    Integers that order as the scores do; the k-th largest is found bit by bit from above.
    """
    LOWEST: tl.constexpr = -0x80000000
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(score == 0, 0, key)  # -0 is 0
    key = tl.where(score != score, 0x7FFFFFFF, key)
    key = tl.where(lane < depth, key, LOWEST)  # below minus infinity
    last = tl.where(tl.sum((key >= 0).to(tl.int32), axis=0) >= k, 0, LOWEST)
    for step in range(31):
        higher = last | (1 << (30 - step))
        last = tl.where(tl.sum((key >= higher).to(tl.int32), axis=0) >= k, higher, last)
    above, equal = key > last, key == last
    room = k - tl.sum(above.to(tl.int32), axis=0)
    taken = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    place = tl.cumsum(taken.to(tl.int32), axis=0) - 1
    tl.store(out + place, lane.to(tl.int64), taken)


@triton.jit
def _topk_kernel(scores, y, depth, k, sb, sk, BLOCK: tl.constexpr):
    batch, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(scores + batch * sb + lane.to(tl.int64) * sk, lane < depth, 0.0)
    _store_largest(score.to(tl.float32), lane, depth, k, y + batch * k)


@triton.jit
def _topk_of_parts_kernel(parts, y, depth, k, splits, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    """Score from parts [batch, splits, depth], or [.., 2 depth] of BOTH sides; choose."""
    batch, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    width = depth * 2 if BOTH else depth
    parts += batch * splits * width
    score = _total(parts, lane, lane < depth, splits, width)
    if BOTH:
        other = _total(parts + depth, lane, lane < depth, splits, width)
        score = tl.sqrt_rn(score) * tl.sqrt_rn(other)
    _store_largest(score, lane, depth, k, y + batch * k)


def topk_mm_indices(x: Tensor, w: Tensor, k: int, scores: str) -> Tensor:
    """Choose the k largest pairs of x [*, M, K] @ w [*, K, N] by their norms: int64 [*, k].

    float64, other than matrices or one batch of each, and sizes that differ take the reference;
    more than 8192 pairs are sorted by torch.

    Raises:
        RuntimeError: k is larger than K, as torch says it.
    """
    if not _served(x, w, k):
        return ops.REFERENCES[ops.topk_mm_indices](x, w, k, scores)
    batch, depth = x.shape[:-2], x.shape[-1]
    y = x.new_empty(*batch, k, dtype=torch.int64)
    if not y.numel():
        return y
    both = scores not in ("left", "right")
    parts = partial_sums(x.mT if scores != "right" else w, w if both else None, square=True)
    if depth > LARGEST:
        squares = parts.sum(-2).reshape(*batch, -1)
        norms = combined(squares[..., :depth], squares[..., -depth:], scores)
        return ops.REFERENCES[ops.topk_indices](norms, k)
    with torch.cuda.device_of(x):
        _topk_of_parts_kernel[(len(parts),)](
            parts, y, depth, k, parts.shape[1], BOTH=both, **_tiles.choosing(depth))  # fmt: skip
    return y


def _served(x: Tensor, w: Tensor, k: int) -> bool:
    """Whether the kernels take two operands."""
    fit = x.dim() == w.dim() in (2, 3) and x.shape[:-2] == w.shape[:-2]
    fit = (
        fit and x.shape[-1] == w.shape[-2] and k <= x.shape[-1] and len(x) <= GRID ** (4 - x.dim())
    )
    return fit and {x.dtype, w.dtype} <= set(_tiles.DTYPES)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Choose the k largest of scores [*, K]: int64 [*, k], ascending.

    float64 and integers, and more than 8192 scores, take the reference.

    Raises:
        RuntimeError: k is larger than K, as torch says it.
    """
    depth = scores.shape[-1]
    if depth > LARGEST or k > depth or scores.dtype not in _tiles.DTYPES:
        return ops.REFERENCES[ops.topk_indices](scores, k)
    y = scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
    if not y.numel():
        return y
    flat = scores.reshape(-1, depth)
    with torch.cuda.device_of(scores):
        _topk_kernel[(len(flat),)](flat, y, depth, k, *flat.stride(), **_tiles.choosing(depth))
    return y


def partial_sums(
    a: Tensor, b: Tensor | None, weight: Tensor | None = None, *, square: bool = False
) -> Tensor:
    """Sum the rows of a [*, L, D] and of b [*, R, E], squared or times weight [D = E], in float32.

    Returns:
        [B, splits, L + R], to be added up over the splits; B is 1 for matrices, and R 0 without b.
    """
    rows, cols = a.shape[-2], 0 if b is None else b.shape[-2]
    a, b = (t if t.dim() == 3 else t[None] for t in (a, a if b is None else b))
    tile = _tiles.sums(rows, cols, max(a.shape[-1], b.shape[-1]), len(a), _tiles.chip(a.device))
    splits = tile.pop("splits")
    parts = a.new_empty(len(a), splits, rows + cols, dtype=torch.float32)
    if not parts.numel():
        return parts
    blocks = triton.cdiv(rows, tile["BR"]) + triton.cdiv(cols, tile["BR"])
    with torch.cuda.device_of(a):
        _sums_kernel[(blocks, splits, len(a))](
            a, b, weight, parts, rows, cols, a.shape[-1], b.shape[-1], *a.stride(), *b.stride(),
            0 if weight is None else weight.stride(0), SQUARE=square, **tile)  # fmt: skip
    return parts


def finished(parts: Tensor, like: Tensor, meant: int, count: int) -> Tensor:
    """Add up parts [1, splits, R] to [R] in ``like``'s dtype; from ``meant`` on, over count."""
    _, splits, size = parts.shape
    y, block = like.new_empty(size), 256
    if size:
        with torch.cuda.device_of(parts):
            _finish_kernel[(triton.cdiv(size, block),)](
                parts, y, size, splits, meant, float(count), BR=block)  # fmt: skip
    return y
