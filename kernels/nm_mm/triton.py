"""y = act(x @ (w * mask) + bias): the N:M mask is made in registers and never stored.

Meaning: sparsefx/ops/nm.py, activated.py, batched.py.  Tiles, and which way: kernels/_tiles.py.
Derivation: README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.errors import MaskError
from sparsefx.kernels import _tiles
from sparsefx.ops.activated import activation_of

GRID = 65535  # programs along the second axis of a CUDA grid


@triton.jit
def _place(SIZE: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Where each lane of a tile's side lies; the MP - M padding lanes of a group lie nowhere."""
    lane = tl.arange(0, SIZE).to(tl.int64)
    if M == MP:
        return lane
    return tl.where(lane % MP < M, lane // MP * M + lane % MP, 1 << 60)


@triton.jit
def _keep_largest(w, DIM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr):
    """Zero all but the N largest |w| of every M along DIM; of equals keep the earlier, NaN first.

    A key holds the magnitude's bits above the place in the group, so that no two keys are equal:
    min(N, M - N) maxima then find the last weight to keep, or the last to drop.
    """
    DROP: tl.constexpr = N > M - N
    BK: tl.constexpr = w.shape[0]
    BN: tl.constexpr = w.shape[1]
    if DIM == 0:
        groups = w.reshape(BK // MP, MP, BN)
        place = tl.arange(0, MP)[None, :, None]
    else:
        groups = w.reshape(BK, BN // MP, MP)
        place = tl.arange(0, MP)[None, None, :]
    if w.dtype == tl.float32:
        NAN: tl.constexpr = 0x7F800001  # one above infinity: all NaNs rank alike
        bits = tl.minimum(groups.to(tl.int32, bitcast=True) & 0x7FFFFFFF, NAN).to(tl.int64)
    else:
        NAN: tl.constexpr = 0x7C01 if w.dtype == tl.float16 else 0x7F81
        bits = tl.minimum((groups.to(tl.int16, bitcast=True) & 0x7FFF).to(tl.int32), NAN)
    key = (NAN - bits) * MP + place if DROP else bits * MP + (MP - 1 - place)
    if M != MP:
        key = tl.where(place < M, key, -1)
    last = tl.max(key, axis=DIM + 1, keep_dims=True)
    for _ in tl.static_range(1, M - N if DROP else N):
        last = tl.max(tl.where(key < last, key, -1), axis=DIM + 1, keep_dims=True)
    keep = key < last if DROP else key >= last
    # a reshape right before the dot is refused where the groups run along BN
    return tl.where(keep.reshape(BK, BN), w, 0.0).to(w.dtype)


@triton.jit
def _activate(z, ACT: tl.constexpr):
    """An activation of float32 sums; a NaN stays one, as torch's own leave it."""
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)
    elif ACT == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        z = z / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    elif ACT == "silu":
        z = z / (1 + tl.exp(-z))
    else:
        tl.static_assert(ACT == "none")
    return z


@triton.jit
def _nm_mm_kernel(x, w, bias, y, rows, cols, depth,
                  sxb, sxi, sxk, swb, swk, swj, sb, syb, syi, syj,
                  DIM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                  ACT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                  GROUP: tl.constexpr):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    x, w, y = x + batch * sxb, w + batch * swb, y + batch * syb
    WIDE: tl.constexpr = BN if DIM == 0 else BN // MP * M  # columns and depth that a tile holds
    DEEP: tl.constexpr = BK // MP * M if DIM == 0 else BK
    pid, across = tl.program_id(0), tl.cdiv(cols, WIDE)
    pi, pj = tl.swizzle2d(pid // across, pid % across, tl.cdiv(rows, BM), across, GROUP)
    i = pi.to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    j = pj.to(tl.int64) * WIDE + _place(BN, M if DIM == 1 else MP, MP)[None, :]
    k = _place(BK, M if DIM == 0 else MP, MP)
    xt, wt = x + i * sxi + k[None, :] * sxk, w + k[:, None] * swk + j * swj  # int64 offsets, once
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, DEEP):  # a group never spans two tiles
        a = tl.load(xt, (i < rows) & (k[None, :] < depth - start), 0.0)  # [BM, BK]
        b = tl.load(wt, (k[:, None] < depth - start) & (j < cols), 0.0)  # [BK, BN]
        acc = tl.dot(a, _keep_largest(b, DIM, N, M, MP), acc, input_precision="ieee")
        xt += tl.full((), DEEP, tl.int64) * sxk
        wt += tl.full((), DEEP, tl.int64) * swk
    if bias is not None:
        acc += tl.load(bias + j * sb, j < cols, 0.0).to(tl.float32)
    acc = _activate(acc, ACT)
    tl.store(y + i * syi + j * syj, acc.to(y.dtype.element_ty), (i < rows) & (j < cols))


@triton.jit
def _masked_weight_kernel(w, y, depth, cols, swb, swk, swj, syb, syk, syj,
                          DIM: tl.constexpr, N: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                          BK: tl.constexpr, BN: tl.constexpr):  # fmt: skip
    WIDE: tl.constexpr = BN if DIM == 0 else BN // MP * M
    DEEP: tl.constexpr = BK // MP * M if DIM == 0 else BK
    batch = tl.program_id(1).to(tl.int64)
    w, y = w + batch * swb, y + batch * syb
    pid, across = tl.program_id(0), tl.cdiv(cols, WIDE)
    k = (pid // across).to(tl.int64) * DEEP + _place(BK, M if DIM == 0 else MP, MP)[:, None]
    j = (pid % across).to(tl.int64) * WIDE + _place(BN, M if DIM == 1 else MP, MP)[None, :]
    inside = (k < depth) & (j < cols)
    b = tl.load(w + k * swk + j * swj, inside, 0.0)  # [BK, BN]
    tl.store(y + k * syk + j * syj, _keep_largest(b, DIM, N, M, MP), inside)


def nm_mm(
    x: Tensor, w: Tensor, bias: Tensor | None, n: int, m: int, dim: int, transposable: bool
) -> Tensor:
    """Multiply x [M, K] by w [K, N], masked n of every m along dim, add bias, sum in float32.

    float64, mixed dtypes, m > 32 and transposable masks take the op ``nm_mask`` and ``masked_mm``.

    Args:
        x: [M, K], any strides.
        w: [K, N], any strides; ``dim`` 0 groups along K, 1 along N.
        bias: [N] or None.
        n: Kept of every m.
        m: Group size, which divides ``w.shape[dim]``.
        dim: 0 or 1.
        transposable: The mask keeps n of m along both dimensions.

    Returns:
        [M, N] in x's dtype.

    Raises:
        MaskError: Unless 1 <= n < m and m divides the dimension.
    """
    _check(w, n, m, dim)
    if transposable or not _served(m, x, w, bias):
        return ops.masked_mm(x, w, ops.nm_mask(w, n, m, dim, transposable), bias)
    way = fused if _inside(x, w, n, m) else copied
    return way(x, w, bias, n, m, dim)


def nm_mm_act(
    x: Tensor, w: Tensor, bias: Tensor | None, n: int, m: int, dim: int, transposable: bool,
    activation: str,
) -> Tensor:  # fmt: skip
    """Run nm_mm and, on its float32 sums, an activation; rounded once where fused.

    What nm_mm leaves to other ops, this leaves to the reference.

    Args:
        x: [M, K], any strides.
        w: [K, N], any strides.
        bias: [N] or None.
        n: Kept of every m.
        m: Group size, which divides ``w.shape[dim]``.
        dim: 0 or 1.
        transposable: The mask keeps n of m along both dimensions.
        activation: "relu", "gelu", "gelu_tanh" or "silu".

    Returns:
        [M, N] in x's dtype.

    Raises:
        MaskError: Unless 1 <= n < m and m divides the dimension.
        ConfigError: For another activation.
    """
    _check(w, n, m, dim)
    function = activation_of(activation)
    if transposable or not _served(m, x, w, bias):
        return ops.REFERENCES[ops.nm_mm_act](x, w, bias, n, m, dim, transposable, activation)
    if _inside(x, w, n, m):
        return fused(x, w, bias, n, m, dim, activation)
    return function(copied(x, w, bias, n, m, dim))


def nm_bmm(x: Tensor, w: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    """Multiply x [B, M, K] by w [B, K, N], each masked n of every m along dim, sum in float32.

    float64, mixed dtypes, m > 32, transposable masks and more than 65535 matrices take the
    reference.

    Args:
        x: [B, M, K], any strides.
        w: [B, K, N], any strides; ``dim`` 1 groups along K, 2 along N.
        n: Kept of every m.
        m: Group size, which divides ``w.shape[dim]``.
        dim: 1 or 2.
        transposable: The masks keep n of m along both dimensions.

    Returns:
        [B, M, N] in x's dtype.

    Raises:
        MaskError: Unless 1 <= n < m and m divides the dimension.
    """
    _check(w, n, m, dim)
    if transposable or not _served(m, x, w) or len(x) > GRID:
        return ops.REFERENCES[ops.nm_bmm](x, w, n, m, dim, transposable)
    way = fused if _inside(x, w, n, m) else copied
    return way(x, w, None, n, m, dim % w.dim() - 1)


def _check(w: Tensor, n: int, m: int, dim: int) -> None:
    size = w.shape[dim]
    if not 1 <= n < m or size % m:
        raise MaskError(f"{n}:{m} along dim {dim} of {list(w.shape)}: needs 1 <= n < m, m | {size}")


def _served(m: int, *operands: Tensor | None) -> bool:
    """Whether the kernel takes a group size and the operands' dtypes."""
    dtypes = {o.dtype for o in operands if o is not None}
    return m <= 32 and len(dtypes) == 1 and dtypes <= set(_tiles.DTYPES)


def _inside(x: Tensor, w: Tensor, n: int, m: int) -> bool:
    """Whether to rank inside the GEMM; a batch multiplies, ranks and copies all its columns."""
    batch = len(w) if w.dim() == 3 else 1
    return _tiles.mask_in_gemm(x.shape[-2], batch * w.shape[-1], w.shape[-2], x.itemsize, n, m)


def fused(
    x: Tensor, w: Tensor, bias: Tensor | None, n: int, m: int, dim: int, activation: str = "none"
) -> Tensor:
    """Run it with the mask made inside the GEMM: nothing of w's size is written.

    x is [M, K] or [B, M, K], w [K, N] or [B, K, N]; ``dim`` counts the matrix's axes, 0 or 1.
    """
    (rows, depth), cols, batch = x.shape[-2:], w.shape[-1], w.shape[:-2]
    if depth != w.shape[-2] or x.shape[:-2] != batch:
        what = "K" if x.shape[:-2] == batch else "the batch"
        raise ValueError(f"x {list(x.shape)} @ w {list(w.shape)}: {what} differs")
    y = x.new_empty(*batch, rows, cols)
    if not y.numel():
        return y
    b, padded, dim = None if bias is None else bias.expand(cols), _tiles.power_of_2(m), dim % 2
    tile = _tiles.gemm(rows, cols, depth, x.itemsize, padded, _tiles.shared_chip(x.device, *batch))
    wide = tile["BN"] // padded * m if dim else tile["BN"]
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, wide), *batch)
    with torch.cuda.device_of(x):
        _nm_mm_kernel[grid](
            x, w, b, y, rows, cols, depth, *_strides(x), *_strides(w),
            0 if b is None else b.stride(0), *_strides(y), DIM=dim, N=n, M=m, MP=padded,
            ACT=activation, **tile)  # fmt: skip
    return y


def _strides(matrix: Tensor) -> tuple[int, ...]:
    """Of batch, rows and columns; without a batch its program index is 0."""
    return matrix.stride() if matrix.dim() == 3 else (0, *matrix.stride())


def copied(x: Tensor, w: Tensor, bias: Tensor | None, n: int, m: int, dim: int) -> Tensor:
    """Run it as one masked copy of w and the library's GEMM."""
    kept = masked_weight(w, n, m, dim)
    return x @ kept if bias is None else torch.addmm(bias, x, kept)


def masked_weight(w: Tensor, n: int, m: int, dim: int) -> Tensor:
    """Copy w [K, N] or [B, K, N] with zeros outside the N:M mask, in w's own layout."""
    y, padded, dim = torch.empty_like(w), _tiles.power_of_2(m), dim % 2
    if not y.numel():
        return y
    (depth, cols), side = w.shape[-2:], max(64, padded)
    deep, wide = (side, side // padded * m) if dim else (side // padded * m, side)
    grid = (triton.cdiv(depth, deep) * triton.cdiv(cols, wide), *w.shape[:-2])
    with torch.cuda.device_of(w):
        _masked_weight_kernel[grid](w, y, depth, cols, *_strides(w), *_strides(y),
                                    DIM=dim, N=n, M=m, MP=padded, BK=side, BN=side)  # fmt: skip
    return y
