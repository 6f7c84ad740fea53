"""2:4 weights as sparse tensor cores take them: compressed once, multiplied several times.

    nm24_compress(w, mask)               w [R, K], 2 of every 4 along K -> packed [R, K*9/16]
    nm24_mm(x, packed, w, mask, bias)    x [M, K] @ where(mask, w, 0) + bias -> [M, N]

nm24_mm's w and mask are [K, N], and ``packed`` was made of their transposes: a library for sparse
tensor cores groups along K. A transposable mask has two packed forms, of w and of w.t(), for the
forward and for grad_input. w and mask are there for what no library can multiply: ``packed`` is
opaque, its size alone is not. It holds K/2 values of a row and then their places, 2 bits each, in
elements of w's dtype: 9/16 of a 16-bit row. So do cuSPARSELt and CUTLASS, each in an order of its
own; the reference writes row by row, as ``nm_pack`` does.

Where x holds an infinity or NaN, ``masked_mm`` gives NaN for 0 * inf at a pruned weight; a sparse
product never multiplies that pair. Values that are finite are those of ``masked_mm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx import compat
from sparsefx.errors import MaskError
from sparsefx.ops._define import define
from sparsefx.ops.nm import keep
from sparsefx.ops.packed import _packed, code_bytes, places_of

Ints = Sequence[int]
DTYPES = (torch.float16, torch.bfloat16)


def misfit(rows: int, cols: int, dtype: torch.dtype, library: str) -> str:
    """Say why a library doesn't take a 2:4 weight [rows, cols], "" if it does.

    Args:
        rows: of the weight, as it is packed.
        cols: along which the groups run.
        dtype: of the weight.
        library: "cusparselt", "cutlass", or "" where there is none.
    """
    if not library:
        return "neither cuSPARSELt nor CUTLASS serves 2:4 products here"
    if dtype not in DTYPES:
        return f"{library} multiplies 2:4 weights in float16 and bfloat16 here, not in {dtype}"
    step = compat.SEMI_STRUCTURED_STEP[library]
    if rows % step or cols % step or not rows or not cols:
        return f"{library} takes 2:4 weights of multiples of {step}, not [{rows}, {cols}]"
    return ""


def packed_cols(cols: Any) -> Any:
    """Elements of a packed row: values, then places of 2 bits in elements of 16."""
    return cols // 2 + (cols + 15) // 16


def _check(w: Tensor, mask: Tensor) -> None:
    if w.dim() != 2 or w.shape[1] % 4 or mask.shape != w.shape or mask.dtype != torch.bool:
        raise MaskError(
            f"nm24_compress: w {list(w.shape)} with a mask {mask.dtype} {list(mask.shape)}: needs "
            "a matrix whose columns are a multiple of 4 and a bool mask of its shape"
        )


def _nm24_compress(w: Tensor, mask: Tensor) -> Tensor:
    _check(w, mask)
    rows, cols = w.shape
    groups = mask.reshape(rows, cols // 4, 4)
    # kept places first, each in the order in which they stood
    places = torch.sort(groups.logical_not().to(torch.uint8), dim=-1, stable=True).indices[..., :2]
    values = torch.gather(keep(w, mask).reshape(rows, cols // 4, 4), 2, places)
    codes = _packed(places.reshape(rows, cols // 2), 4)
    room = (cols + 15) // 16 * w.element_size() - code_bytes(cols // 2, 4)
    stored = torch.nn.functional.pad(codes, (0, room)).contiguous().reshape(-1).view(w.dtype)
    return torch.cat([values.reshape(rows, cols // 2), stored.view(rows, (cols + 15) // 16)], 1)


def unpacked(packed: Tensor, cols: Any) -> Tensor:
    """Return the dense weight [R, cols] of what the reference packed."""
    rows, kept = packed.shape[0], cols // 2
    held = (cols + 15) // 16 * packed.element_size()
    codes = packed[:, kept:].contiguous().reshape(-1).view(torch.uint8).view(rows, held)
    columns = (
        places_of(codes[:, : code_bytes(kept, 4)], kept, 4)
        + torch.arange(kept, device=packed.device) // 2 * 4
    )
    return packed.new_zeros(rows, cols).scatter(1, columns, packed[:, :kept])


def _nm24_mm(x: Tensor, packed: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, unpacked(packed, x.shape[1]), bias)


def _fake_compress(w: Tensor, mask: Tensor) -> Tensor:
    _check(w, mask)
    return w.new_empty((w.shape[0], packed_cols(w.shape[1])))


def _fake_mm(x: Tensor, packed: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _mm_flops(x: Ints, packed: Ints, w: Ints, *_: Any, **__: Any) -> int:
    return x[0] * x[1] * w[1]  # half of a product's 2 * M * K * N


nm24_compress = define(
    "nm24_compress(Tensor w, Tensor mask) -> Tensor", _nm24_compress, _fake_compress
)
nm24_mm = define(
    "nm24_mm(Tensor x, Tensor packed, Tensor w, Tensor mask, Tensor? bias) -> Tensor",
    _nm24_mm,
    _fake_mm,
    _mm_flops,
)
