"""Weights packed on CUDA, along one dimension by magnitude, or along both by a mask.

Meaning: sparsefx/ops/packed.py.  Tiles: kernels/_tiles.py.  Derivation: ../README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.nm_mm.triton import _place
from sparsefx.ops.packed import code_bits, code_bytes


@triton.jit
def _bits_of(values):
    """Numbers as integers of their size: moved by these, a NaN and a -0.0 stay what they are."""
    return values.to(tl.int32 if values.dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def _magnitude_keys(w, place, M: tl.constexpr, MP: tl.constexpr):
    """Distinct keys in the order of |w|: of equals the earlier is larger, NaN above infinity."""
    if w.dtype == tl.float32:
        NAN: tl.constexpr = 0x7F800001  # one above infinity: all NaNs rank alike
        size = tl.minimum(_bits_of(w) & 0x7FFFFFFF, NAN).to(tl.int64)
    else:
        NAN: tl.constexpr = 0x7C01 if w.dtype == tl.float16 else 0x7F81
        size = tl.minimum((_bits_of(w) & 0x7FFF).to(tl.int32), NAN)
    return tl.where(place < M, size * MP + (MP - 1 - place), -1)


@triton.jit
def _largest(key, N: tl.constexpr, M: tl.constexpr):
    """Mark the N largest of M distinct keys along axis 3, where padding holds -1."""
    if N <= M - N:
        last = tl.max(key, axis=3, keep_dims=True)
        for _ in tl.static_range(1, N):
            last = tl.max(tl.where(key < last, key, -1), axis=3, keep_dims=True)
        keep = key >= last
    else:
        TOP: tl.constexpr = (1 << 62) if key.dtype == tl.int64 else (1 << 30)
        last = tl.min(tl.where(key < 0, TOP, key), axis=3, keep_dims=True)
        for _ in tl.static_range(1, M - N):
            last = tl.min(tl.where(key > last, key, TOP), axis=3, keep_dims=True)
        keep = key > last
    return keep


@triton.jit
def _write(bits, keep, values, codes, r, chunk, rows, groups, width,
           N: tl.constexpr, NP: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Store what is kept of a tile [A, C, E, MP], groups of MP lanes, E of them N whole bytes.

    r [A] are the rows, chunk [C] which E groups. The i-th kept place is the least above the last.
    """
    A: tl.constexpr = bits.shape[0]
    C: tl.constexpr = bits.shape[1]
    E: tl.constexpr = bits.shape[2]
    MP: tl.constexpr = bits.shape[3]
    place = tl.arange(0, MP)[None, None, None, :]
    slot = tl.arange(0, NP)[None, None, None, :]
    e = tl.arange(0, E)
    row, group = r[:, None, None, None], (chunk[:, None] * E + e[None, :])[None, :, :, None]
    inside = (row < rows) & (group < groups)
    found = tl.zeros((A, C, E, NP), tl.int32)
    packed = tl.zeros((A, C, 1, NP), tl.int32)
    last = tl.full((A, C, E, 1), -1, tl.int32)
    for i in tl.static_range(N):
        last = tl.min(tl.where(keep & (place > last), place, MP), axis=3, keep_dims=True)
        value = tl.sum(tl.where(place == last, bits, 0).to(tl.int32), axis=3, keep_dims=True)
        found = tl.where(slot == i, value, found)
        at = (e * N + i)[None, None, :, None]  # which code of the chunk
        code = tl.where(inside, last, 0) << (at % E * BITS)
        packed += tl.sum(tl.where(at // E == slot, code, 0), axis=2, keep_dims=True)
    to = values + row * (groups * N) + group * N + slot
    found = found.to(bits.dtype).to(values.dtype.element_ty, bitcast=True)
    tl.store(to, found, inside & (slot < N))
    byte = chunk[None, :, None, None] * N + slot
    tl.store(codes + row * width + byte, packed.to(tl.uint8),
             (row < rows) & (byte < width) & (slot < N))  # fmt: skip


@triton.jit
def _pack_kernel(w, values, codes, rows, groups, width, sr, sk,
                 N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                 BITS: tl.constexpr, A: tl.constexpr, C: tl.constexpr):  # fmt: skip
    E: tl.constexpr = 8 // BITS
    pid, across = tl.program_id(0), tl.cdiv(tl.cdiv(groups, E), C)
    r = (pid // across).to(tl.int64) * A + tl.arange(0, A)
    chunk = (pid % across).to(tl.int64) * C + tl.arange(0, C)
    k = (pid % across).to(tl.int64) * (C * E * M) + _place(C * E * MP, M, MP)[None, :]
    tile = tl.load(w + r[:, None] * sr + k * sk, (r[:, None] < rows) & (k < groups * M), 0.0)
    tile = tile.reshape(A, C, E, MP)
    keys = _magnitude_keys(tile, tl.arange(0, MP)[None, None, None, :], M, MP)
    _write(_bits_of(tile), _largest(keys, N, M), values, codes, r, chunk, rows, groups, width,
           N, NP, BITS)  # fmt: skip


@triton.jit
def _pack_marked(bits, mark, values, codes, r, chunk, rows, groups, width,
                 N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                 BITS: tl.constexpr):  # fmt: skip
    """Store along the second axis of a tile: marked places first, then the earliest of the rest."""
    E: tl.constexpr = 8 // BITS
    A: tl.constexpr = bits.shape[0]
    C: tl.constexpr = bits.shape[1] // (E * MP)
    place = tl.arange(0, MP)[None, None, None, :]
    key = mark.reshape(A, C, E, MP) * MP + (MP - 1 - place)
    keep = _largest(tl.where(place < M, key, -1), N, M)
    _write(bits.reshape(A, C, E, MP), keep, values, codes, r, chunk, rows, groups, width,
           N, NP, BITS)  # fmt: skip


@triton.jit
def _pack_both_kernel(w, mask, values, codes, values_t, codes_t, rows, cols, width, width_t,
                      sr, sk, smr, smk,
                      N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                      BITS: tl.constexpr, CR: tl.constexpr, CK: tl.constexpr):  # fmt: skip
    SPAN: tl.constexpr = 8 // BITS * MP  # lanes of a chunk; M / MP of them hold weights
    DENSE: tl.constexpr = 8 // BITS * M
    pid, across = tl.program_id(0), tl.cdiv(cols, CK * DENSE)
    pr, pk = (pid // across).to(tl.int64), (pid % across).to(tl.int64)
    r = pr * (CR * DENSE) + _place(CR * SPAN, M, MP)
    k = pk * (CK * DENSE) + _place(CK * SPAN, M, MP)
    inside = (r[:, None] < rows) & (k[None, :] < cols)
    tile = tl.load(w + r[:, None] * sr + k[None, :] * sk, inside, 0.0)
    mark = tl.load(mask + r[:, None] * smr + k[None, :] * smk, inside, 0).to(tl.int32)
    bits = tl.where(mark != 0, _bits_of(tile), 0)
    _pack_marked(bits, mark, values, codes, r, pk * CK + tl.arange(0, CK), rows, cols // M, width,
                 N, NP, M, MP, BITS)  # fmt: skip
    _pack_marked(tl.trans(bits), tl.trans(mark), values_t, codes_t, k,
                 pr * CR + tl.arange(0, CR), cols, rows // M, width_t,
                 N, NP, M, MP, BITS)  # fmt: skip


def nm_pack(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Keep the n largest of every m of w [R, K] along K.

    float64, m > 32, and what the reference refuses take the reference.

    Args:
        w: [R, K], any strides.
        n: Kept of every m.
        m: Group size, which divides K.

    Returns:
        values [R, K/m*n] in w's dtype and codes [R, bytes] in uint8, bit by bit the reference's.

    Raises:
        MaskError: Unless 1 <= n < m and m divides K.
    """
    if w.dim() != 2 or not packable(w, n, m) or w.shape[1] % m:
        return ops.REFERENCES[ops.nm_pack](w, n, m)
    values, codes = _fresh(w, *w.shape, n, m)
    if not values.numel():
        return values, codes
    (rows, depth), constants = w.shape, pattern(n, m)
    tile = _tiles.pack_tile(rows, depth, n, m)
    grid = (triton.cdiv(rows, tile["A"]) * triton.cdiv(depth, _dense(constants) * tile["C"]),)
    with torch.cuda.device_of(w):
        _pack_kernel[grid](w, values, codes, rows, depth // m, codes.shape[1], *w.stride(),
                           **constants, **tile)  # fmt: skip
    return values, codes


def nm_pack_both(w: Tensor, mask: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pack w [R, K] under a mask along K, and w.T along R, from one read of both.

    float64, m > 32, and what the reference refuses take the reference.

    Args:
        w: [R, K], any strides.
        mask: bool [R, K], any strides; n of every m along both dimensions, or fewer.
        n: Kept of every m.
        m: Group size, which divides R and K.

    Returns:
        values [R, K/m*n] and codes, then the same of w.T: [K, R/m*n] and codes.

    Raises:
        MaskError: Unless 1 <= n < m, m divides R and K, and mask is boolean and of w's shape.
    """
    alike = mask.dtype == torch.bool and mask.shape == w.shape
    if w.dim() != 2 or not alike or not packable(w, n, m) or any(s % m for s in w.shape):
        return ops.REFERENCES[ops.nm_pack_both](w, mask, n, m)
    rows, cols = w.shape
    values, codes = _fresh(w, rows, cols, n, m)
    values_t, codes_t = _fresh(w, cols, rows, n, m)
    if not w.numel():
        return values, codes, values_t, codes_t
    constants = pattern(n, m)
    tile = _tiles.pack_both_tile(n, m)
    high, wide = (tile[c] * _dense(constants) for c in ("CR", "CK"))
    stored = mask.view(torch.uint8)
    with torch.cuda.device_of(w):
        _pack_both_kernel[(triton.cdiv(rows, high) * triton.cdiv(cols, wide),)](
            w, stored, values, codes, values_t, codes_t, rows, cols, codes.shape[1],
            codes_t.shape[1], *w.stride(), *stored.stride(), **constants, **tile)  # fmt: skip
    return values, codes, values_t, codes_t


def packable(w: Tensor, n: int, m: int) -> bool:
    """Whether the kernels take a pattern and a dtype."""
    return 1 <= n < m <= 32 and w.dtype in _tiles.DTYPES


def _fresh(w: Tensor, rows: int, depth: int, n: int, m: int) -> tuple[Tensor, Tensor]:
    kept = depth // m * n
    codes = w.new_empty(rows, code_bytes(kept, m), dtype=torch.uint8)
    return w.new_empty(rows, kept), codes


def pattern(n: int, m: int) -> dict[str, int]:
    """The constants of a kernel that a pattern decides."""
    sizes = {"N": n, "NP": _tiles.power_of_2(n), "M": m, "MP": _tiles.power_of_2(m)}
    return sizes | {"BITS": code_bits(m)}


def _dense(constants: dict[str, int]) -> int:
    """Weights of a chunk, whose codes are n whole bytes."""
    return 8 // constants["BITS"] * constants["M"]
