"""Packed N:M weights: kept values and where they stood, nothing of the rest.

    nm_pack(w, n, m)                            w[R, K] -> values [R, K/m*n], codes [R, bytes]
    nm_unpack(values, codes, n, m, K)           -> [R, K], zeros where nothing was kept
    nm_packed_mm(x, values, codes, bias, n, m)  x[M, K] @ unpacked.T + bias -> [M, R]
    nm_pack_both(w, mask, n, m)                 w along K, then w.T along R, by one mask

Of every m consecutive weights along the last axis the n largest |w| are kept, as in ``nm_mask``;
K is a multiple of m. values[r, g*n + i] is the i-th kept weight of group g, in the order in which
they stood; its code is its place within the group, 0 .. m - 1. A code takes 1, 2, 4 or 8 bits, the
fewest that hold m - 1; codes of a row follow each other from the lowest bit of its first byte on,
and a row's last byte is filled up with zeros. 2:4 float32 takes 0.53 of the dense bytes, 1:4 0.27.

nm_pack_both packs what a transposable mask [R, K] keeps, values [R, K/m*n] and codes as above, then
those of the transpose: [K, R/m*n]. R and K are multiples of m. A group holds its n first places in
this order: those that the mask keeps, then those that it doesn't, each as they stand. They are
written as they stand, with value 0 where the mask keeps nothing: a group of fewer than n kept is so
filled by its earliest other places, and of one with more the later are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx import masks
from sparsefx.errors import MaskError
from sparsefx.masks.checks import check_pattern
from sparsefx.ops._define import define

Ints = Sequence[int]


def code_bits(m: int) -> int:
    """Bits of one code: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def code_bytes(kept: Any, m: int) -> Any:
    """Bytes of a row's codes."""
    return (kept * code_bits(m) + 7) // 8


def _nm_pack(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, depth = w.shape
    groups = depth // m
    mask = masks.nm_mask(w, n, m, 1).reshape(rows, groups, m)
    # kept places first, each in the order in which they stood
    places = torch.sort(mask.logical_not().to(torch.uint8), dim=-1, stable=True).indices[..., :n]
    values = torch.gather(w.reshape(rows, groups, m), 2, places).reshape(rows, groups * n)
    return values, _packed(places.reshape(rows, groups * n), m)


def _nm_pack_both(w: Tensor, mask: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_pattern(n, m)
    if w.dim() != 2 or any(size % m for size in w.shape):
        raise MaskError(
            f"shape {tuple(w.shape)} can't be packed both ways; pass a matrix of which m={m} "
            "divides both sizes"
        )
    if mask.dtype != torch.bool or mask.shape != w.shape:
        raise MaskError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; pass a bool tensor of shape "
            f"{tuple(w.shape)}"
        )
    return *_nm_pack_marked(w, mask, n, m), *_nm_pack_marked(w.t(), mask.t(), n, m)


def _nm_pack_marked(w: Tensor, mask: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    rows, groups = w.shape[0], w.shape[1] // m
    left_out = mask.logical_not().to(torch.uint8).reshape(rows, groups, m)
    first = torch.sort(left_out, dim=-1, stable=True).indices[..., :n]
    places = torch.sort(first, dim=-1).values
    kept = torch.where(mask, w, 0).reshape(rows, groups, m)
    values = torch.gather(kept, 2, places).reshape(rows, groups * n)
    return values, _packed(places.reshape(rows, groups * n), m)


def _packed(places: Tensor, m: int) -> Tensor:
    """Places [R, kept] below m -> bytes [R, code_bytes]."""
    bits = code_bits(m)
    each = 8 // bits
    rows, kept = places.shape
    filled = torch.nn.functional.pad(places, (0, -kept % each))
    filled = filled.reshape(rows, code_bytes(kept, m), each)
    shifts = torch.arange(each, device=places.device) * bits
    return (filled << shifts).sum(-1).to(torch.uint8)


def places_of(codes: Tensor, kept: Any, m: int) -> Tensor:
    """The places [R, kept], int64, that ``codes`` hold."""
    bits = code_bits(m)
    shifts = torch.arange(8 // bits, device=codes.device) * bits
    found = (codes.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return found.flatten(1).narrow(1, 0, kept)


def _nm_unpack(values: Tensor, codes: Tensor, n: int, m: int, depth: int) -> Tensor:
    rows, kept = values.shape
    first = torch.arange(kept, device=values.device) // n * m
    columns = places_of(codes, kept, m) + first
    return values.new_zeros(rows, depth).scatter(1, columns, values)


def _nm_packed_mm(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    return torch.nn.functional.linear(x, _nm_unpack(values, codes, n, m, x.shape[1]), bias)


def _fake_nm_pack(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    kept = w.shape[1] // m * n
    codes = w.new_empty((w.shape[0], code_bytes(kept, m)), dtype=torch.uint8)
    return w.new_empty((w.shape[0], kept)), codes


def _fake_nm_pack_both(
    w: Tensor, mask: Tensor, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_fake_nm_pack(w, n, m), *_fake_nm_pack(w.t(), n, m)


def _fake_nm_unpack(values: Tensor, codes: Tensor, n: int, m: int, depth: int) -> Tensor:
    return values.new_empty((values.shape[0], depth))


def _fake_nm_packed_mm(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], values.shape[0]))


def _packed_mm_flops(x: Ints, values: Ints, *_: Any, **__: Any) -> int:
    return 2 * x[0] * values[0] * values[1]


nm_pack = define("nm_pack(Tensor w, int n, int m) -> (Tensor, Tensor)", _nm_pack, _fake_nm_pack)
nm_pack_both = define(
    "nm_pack_both(Tensor w, Tensor mask, int n, int m) -> (Tensor, Tensor, Tensor, Tensor)",
    _nm_pack_both,
    _fake_nm_pack_both,
)
nm_unpack = define(
    "nm_unpack(Tensor values, Tensor codes, int n, int m, SymInt depth) -> Tensor",
    _nm_unpack,
    _fake_nm_unpack,
)
nm_packed_mm = define(
    "nm_packed_mm(Tensor x, Tensor values, Tensor codes, Tensor? bias, int n, int m) -> Tensor",
    _nm_packed_mm,
    _fake_nm_packed_mm,
    _packed_mm_flops,
)
