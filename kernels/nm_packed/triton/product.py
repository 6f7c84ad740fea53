"""Packed N:M weights on CUDA: unpacked, and multiplied by few rows as they are streamed.

Meaning: sparsefx/ops/packed.py.  Tiles: kernels/_tiles.py.  Derivation: ../README.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.nm_mm.triton import _place
from sparsefx.kernels.nm_packed.triton.packing import _bits_of, packable, pattern
from sparsefx.ops.packed import code_bytes

SUM_BLOCK = 1024  # results that a program adds up over the splits


@triton.jit
def _placed(bits, code, A: tl.constexpr, G: tl.constexpr, NP: tl.constexpr, M: tl.constexpr,
            MP: tl.constexpr):  # fmt: skip
    """Put values [A, G * NP] to the places that their codes say: [A, G, MP]."""
    place = tl.arange(0, MP)[None, None, None, :]
    hit = (code.reshape(A, G, NP, 1) == place) & (place < M)
    return tl.sum(tl.where(hit, bits.reshape(A, G, NP, 1).to(tl.int32), 0), axis=2)


@triton.jit
def _shifted(bits, code, A: tl.constexpr, G: tl.constexpr, NP: tl.constexpr, M: tl.constexpr,
             MP: tl.constexpr):  # fmt: skip
    """The same of 16-bit values and up to 4 places, by shifts of one word that holds them all."""
    if M != MP:
        bits = tl.where(code < M, bits, 0)  # the padding stays 0 whatever a code says
    word = (bits.to(tl.int64 if MP == 4 else tl.int32) & 0xFFFF) << (code * 16)
    word = tl.sum(word.reshape(A, G, NP), axis=2)  # [A, G]: no two values share a place
    dense = tl.join(word.to(tl.int16), (word >> 16).to(tl.int16))
    if MP == 4:
        even = tl.join(word.to(tl.int16), (word >> 32).to(tl.int16))
        odd = tl.join((word >> 16).to(tl.int16), (word >> 48).to(tl.int16))
        dense = tl.join(even, odd)
    return dense


@triton.jit
def _loaded(values, codes, r, first, rows, groups, width, svr, svk, scr, sck,
            N: tl.constexpr, NP: tl.constexpr, BITS: tl.constexpr, A: tl.constexpr,
            G: tl.constexpr):  # fmt: skip
    """Load G groups of A rows from group ``first`` on: values and codes, [A, G * NP] both."""
    E: tl.constexpr = 8 // BITS
    lane = tl.arange(0, G * NP)
    group, slot = first + lane // NP, lane % NP
    at = (group * N + slot)[None, :]
    here = (r[:, None] < rows) & ((group < groups) & (slot < N))[None, :]
    kept = tl.load(values + r[:, None] * svr + at * svk, here, 0.0)
    if N == NP:  # whole bytes, each read once: G * N is a multiple of E
        byte = (first * N // E + tl.arange(0, G * N // E))[None, :]
        read = (r[:, None] < rows) & (byte < width)
        code = tl.load(codes + r[:, None] * scr + byte * sck, read, 0).to(tl.int32)
        shift = (tl.arange(0, E) * BITS)[None, None, :]
        code = (code[:, :, None] >> shift).reshape(A, G * N)
    else:
        code = tl.load(codes + r[:, None] * scr + at // E * sck, here, 0).to(tl.int32)
        code = code >> (at % E * BITS).to(tl.int32)
    return kept, code & ((1 << BITS) - 1)


@triton.jit
def _expanded(kept, code, A: tl.constexpr, G: tl.constexpr, NP: tl.constexpr, M: tl.constexpr,
              MP: tl.constexpr):  # fmt: skip
    """Make what was loaded dense: [A, G * MP].

    A weight is the value whose code is its place, else 0. Bits are moved and none multiplied, so a
    NaN stays where it is.
    """
    bits = _bits_of(kept)
    if MP <= 4 and kept.dtype != tl.float32:
        dense = _shifted(bits, code, A, G, NP, M, MP)
    else:
        dense = _placed(bits, code, A, G, NP, M, MP)
    return dense.reshape(A, G * MP).to(bits.dtype).to(kept.dtype, bitcast=True)


@triton.jit
def _unpack_kernel(values, codes, y, rows, groups, width, svr, svk, scr, sck,
                   N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                   BITS: tl.constexpr, A: tl.constexpr, G: tl.constexpr):  # fmt: skip
    pid, across = tl.program_id(0), tl.cdiv(groups, G)
    r = (pid // across).to(tl.int64) * A + tl.arange(0, A)
    first = (pid % across).to(tl.int64) * G
    kept, code = _loaded(values, codes, r, first, rows, groups, width, svr, svk, scr, sck,
                         N, NP, BITS, A, G)  # fmt: skip
    to = y + r[:, None] * (groups * M)
    k = first * M + _place(G * MP, M, MP)[None, :]
    inside = (r[:, None] < rows) & (k < groups * M)
    if MP <= 4 and kept.dtype != tl.float32:
        tl.store(to + k, _expanded(kept, code, A, G, NP, M, MP), inside)
    else:  # instructions for each value kept, not for each place that it could have
        tl.store(to + k, tl.zeros((A, G * MP), kept.dtype), inside)
        lane = tl.arange(0, G * NP)
        group, slot = first + lane // NP, lane % NP
        here = ((group < groups) & (slot < N))[None, :] & (r[:, None] < rows) & (code < M)
        tl.debug_barrier()  # the zeros of this program come before its values
        tl.store(to + group[None, :] * M + code, kept, here)


@triton.jit
def _packed_mm_kernel(x, values, codes, bias, y, rows, cols, groups, width, each,
                      sxi, sxk, svr, svk, scr, sck, sb,
                      N: tl.constexpr, NP: tl.constexpr, M: tl.constexpr, MP: tl.constexpr,
                      BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                      DOT: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Sum ``each`` tiles of the depth: y [BM, BN] of one split, the weight as the left operand."""
    G: tl.constexpr = BK // MP
    across = tl.cdiv(cols, BN)
    pid, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = (pid // across).to(tl.int64) * BM + tl.arange(0, BM)
    j = (pid % across).to(tl.int64) * BN + tl.arange(0, BN)
    lane = _place(BK, M, MP)
    acc = tl.zeros((BN, BM) if DOT else (BM, BN, BK), tl.float32)
    begin = split * each * G
    end = tl.minimum(begin + each * G, groups)
    for first in tl.range(begin, end, G, num_stages=STAGES):
        kept, code = _loaded(values, codes, j, first, cols, groups, width, svr, svk, scr, sck,
                             N, NP, BITS, BN, G)  # fmt: skip
        w = _expanded(kept, code, BN, G, NP, M, MP)
        k = first * M + lane
        if DOT:
            a = tl.load(
                x + k[:, None] * sxk + i[None, :] * sxi,
                (k[:, None] < groups * M) & (i[None, :] < rows),
                0.0,
            )  # [BK, BM]
            acc = tl.dot(w, a, acc, input_precision="ieee")
        else:
            a = tl.load(
                x + i[:, None] * sxi + k[None, :] * sxk,
                (i[:, None] < rows) & (k[None, :] < groups * M),
                0.0,
            )  # [BM, BK]
            acc += a[:, None, :].to(tl.float32) * w[None, :, :].to(tl.float32)
    out = tl.trans(acc) if DOT else tl.sum(acc, axis=2)
    if bias is not None:
        out += tl.load(bias + j * sb, j < cols, 0.0).to(tl.float32)[None, :]
    to = y + (split * rows + i[:, None]) * cols + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < cols)
    tl.store(to, out.to(y.dtype.element_ty), inside)


@triton.jit
def _sum_splits_kernel(parts, bias, y, splits, size, cols, sb, BLOCK: tl.constexpr):
    """Add the splits of y [M, R] in their order, and bias: the same result at every run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        acc += tl.load(parts + tl.full((), split, tl.int64) * size + at, at < size, 0.0)
    if bias is not None:
        acc += tl.load(bias + at % cols * sb, at < size, 0.0).to(tl.float32)
    tl.store(y + at, acc.to(y.dtype.element_ty), at < size)


def nm_unpack(values: Tensor, codes: Tensor, n: int, m: int, depth: int) -> Tensor:
    """Write a packed weight dense: [R, depth], zeros where nothing was kept.

    float64, m > 32, and sizes that contradict each other take the reference.

    Args:
        values: [R, K/m*n], any strides.
        codes: uint8 [R, bytes], any strides.
        n: Kept of every m.
        m: Group size.
        depth: K.

    Returns:
        [R, depth] in the dtype of values.

    Raises:
        RuntimeError: The reference's, where sizes contradict each other.
    """
    if not _whole(values, codes, n, m, depth):
        return ops.REFERENCES[ops.nm_unpack](values, codes, n, m, depth)
    rows, groups = values.shape[0], depth // m
    y = values.new_empty(rows, depth)
    if not y.numel():
        return y
    tile = _tiles.unpack_tile(depth, m)
    grid = (triton.cdiv(rows, tile["A"]) * triton.cdiv(groups, tile["G"]),)
    with torch.cuda.device_of(values):
        _unpack_kernel[grid](values, codes, y, rows, groups, codes.shape[1], *values.stride(),
                             *codes.stride(), **pattern(n, m), **tile)  # fmt: skip
    return y


def nm_packed_mm(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """Multiply x [M, K] by the packed weight, transposed, add bias, sum in float32.

    Few rows stream values and codes; more take nm_unpack and the library's product. float64,
    mixed dtypes, m > 32, and sizes that contradict each other take the reference.

    Args:
        x: [M, K], any strides.
        values: [R, K/m*n], any strides.
        codes: uint8 [R, bytes], any strides.
        bias: [R] or None.
        n: Kept of every m.
        m: Group size.

    Returns:
        [M, R] in x's dtype.

    Raises:
        RuntimeError: The reference's, where sizes or dtypes contradict each other.
    """
    if not _multiplied(x, values, codes, bias, n, m):
        return ops.REFERENCES[ops.nm_packed_mm](x, values, codes, bias, n, m)
    if _tiles.packed_in_gemm(x.shape[0], values.shape[0], x.shape[1], x.itemsize, n, m):
        return streamed(x, values, codes, bias, n, m)
    return torch.nn.functional.linear(x, nm_unpack(values, codes, n, m, x.shape[1]), bias)


def streamed(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """Run it with the weight expanded in registers: nothing of its dense size is read or written.

    Arguments are as in nm_packed_mm, and have been checked.
    """
    (rows, depth), cols, groups = x.shape, values.shape[0], x.shape[1] // m
    y = x.new_empty(rows, cols)
    if not y.numel():
        return y
    tile = _tiles.packed_gemm(rows, cols, depth, x.itemsize, n, m, _tiles.chip(x.device))
    splits, each = tile.pop("splits"), tile.pop("each")
    parts = y if splits == 1 else y.new_empty(splits, rows, cols, dtype=torch.float32)
    grid = (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]), splits)
    step = 0 if bias is None else bias.stride(0)
    with torch.cuda.device_of(x):
        _packed_mm_kernel[grid](
            x, values, codes, bias if splits == 1 else None, parts, rows, cols, groups,
            codes.shape[1], each, *x.stride(), *values.stride(), *codes.stride(), step,
            **pattern(n, m), **tile)  # fmt: skip
        if splits > 1:
            _sum_splits_kernel[(triton.cdiv(y.numel(), SUM_BLOCK),)](
                parts, bias, y, splits, y.numel(), cols, step, BLOCK=SUM_BLOCK)  # fmt: skip
    return y


def _whole(values: Tensor, codes: Tensor, n: int, m: int, depth: int) -> bool:
    """Whether values, codes and depth belong together: the kernels read what these promise."""
    if not packable(values, n, m) or depth % m:
        return False
    sized = values.shape[1] == depth // m * n and codes.dtype == torch.uint8
    return sized and codes.shape == (values.shape[0], code_bytes(values.shape[1], m))


def _multiplied(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> bool:
    """Whether the kernels take dtypes and sizes."""
    same = bias is None or (bias.dtype == x.dtype and bias.shape == values.shape[:1])
    return x.dtype == values.dtype and same and _whole(values, codes, n, m, x.shape[1])
