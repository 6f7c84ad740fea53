"""Row-wise N:M masks in one pass: the n largest |w| of every m, of equals the earlier, NaN first.

Meaning: sparsefx/masks/magnitude.py. A key holds the magnitude's bits above the place in the group,
as in kernels/nm_mm, so that no two keys are equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx.kernels import _tiles
from sparsefx.masks.magnitudes import BITS


@triton.jit
def _keys(bits, place, INFINITY: tl.constexpr, MP: tl.constexpr, DROP: tl.constexpr):
    """One integer for each weight, wide enough to hold its place; the least first where DROP."""
    if bits.dtype == tl.int32:
        size = tl.minimum(bits & 0x7FFFFFFF, INFINITY + 1).to(tl.int64)
    else:
        size = tl.minimum((bits & 0x7FFF).to(tl.int32), INFINITY + 1)
    return (INFINITY + 1 - size) * MP + place if DROP else size * MP + (MP - 1 - place)


@triton.jit
def _rows_kernel(w, mask, lanes, second, swl, sw2, sw3, swk, sml, sm2, sm3, smk,
                 N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, INFINITY: tl.constexpr,
                 ALONG: tl.constexpr, L: tl.constexpr):  # fmt: skip
    DROP: tl.constexpr = 2 * N > M
    blocks = tl.cdiv(lanes, L)
    block, rest = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    at2, at3 = (rest % second).to(tl.int64), (rest // second).to(tl.int64)
    lane = block.to(tl.int64) * L + tl.arange(0, L)[:, None]
    place = tl.arange(0, MP)[None, :]
    inside = (lane < lanes) & (place < M)
    if ALONG:  # the lanes are the groups of one row
        w_at, mask_at = (lane * M + place) * swk, (lane * M + place) * smk
    else:
        far = place.to(tl.int64)
        w_at, mask_at = lane * swl + far * swk, lane * sml + far * smk
    bits = tl.load(w + at2 * sw2 + at3 * sw3 + w_at, inside, 0)  # [L, MP]
    key = _keys(bits, place, INFINITY, MP, DROP)
    if M != MP:
        key = tl.where(place < M, key, -1)
    last = tl.max(key, 1, keep_dims=True)
    for _ in range(1, M - N if DROP else N):
        last = tl.max(tl.where(key < last, key, -1), 1, keep_dims=True)
    keep = key < last if DROP else key >= last
    tl.store(mask + at2 * sm2 + at3 * sm3 + mask_at, keep.to(tl.uint8), inside)


def solve(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Mark the n largest of every m along dim.

    Args:
        w: float32, float16 or bfloat16, with something in it, of any rank and strides.
        n: 1 to m - 1.
        m: 2 to 32, a divisor of ``w.shape[dim]``.
        dim: from the front.

    Returns:
        bool, the shape of w, contiguous.
    """
    integer, infinity = BITS[w.dtype]
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    shape = w.shape[:dim].numel(), w.shape[dim], w.shape[dim + 1 :].numel()
    bits = w.detach().view(integer).reshape(shape)  # [outer, K, inner]
    groups, padded = shape[1] // m, _tiles.power_of_2(m)
    along = shape[2] < 32 or bits.stride(1) <= bits.stride(2)
    lanes, second = (groups, shape[2]) if along else (shape[2], groups)
    strides = [_strides(x, m, along) for x in (bits, mask.view(torch.uint8).view(shape))]
    wide = min(_tiles.power_of_2(lanes), max(32, 2048 // padded))
    grid = (triton.cdiv(lanes, wide) * second * shape[0],)
    with torch.cuda.device_of(w):
        _rows_kernel[grid](
            bits, mask.view(torch.uint8), lanes, second, *strides[0], *strides[1],
            N=n, M=m, MP=padded, INFINITY=infinity, ALONG=along, L=wide)  # fmt: skip
    return mask


def _strides(x: Tensor, m: int, along: bool) -> tuple[int, int, int, int]:
    """Of the lanes, the second axis, the third and a group's places."""
    outer, k, inner = x.stride()
    return (m * k, inner, outer, k) if along else (inner, m * k, outer, k)
