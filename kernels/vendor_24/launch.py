"""Compress a 2:4 weight, and multiply by it, with the library that serves the device.

Meaning: sparsefx/ops/semi_structured.py.  Which algorithm: search.py.  Why: README.md.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from sparsefx import compat, ops
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.kernels.vendor_24 import search
from sparsefx.ops.nm import keep
from sparsefx.ops.semi_structured import misfit, packed_cols

ROWS = 16  # of x: its transpose and the result are aligned to 16 bytes, and tiles are whole


def nm24_compress(w: Tensor, mask: Tensor) -> Tensor:
    """Compress w [R, K] where mask, which keeps at most 2 of every 4 along K.

    Where no library takes the shape or dtype the reference packs; nm24_mm then unpacks it.

    Returns:
        [R, K*9/16] in w's dtype, in the library's own order.

    Raises:
        MaskError: unless K is a multiple of 4 and mask a bool tensor of w's shape.
        KernelError: when the library's compressed form has another size, or it refuses.
    """
    library = serving(w)
    if not library or mask.shape != w.shape or mask.dtype != torch.bool:
        return ops.REFERENCES[ops.nm24_compress](w, mask)
    kept = keep(w, mask).contiguous()
    try:
        packed = compat.semi_structured_compress(library, kept)
    except RuntimeError as error:
        raise KernelError(
            f"{library} can't compress a {w.dtype} weight {list(w.shape)} here: {error}; leave the "
            'vendor\'s libraries out with Rule(lowering="reference")'
        ) from error
    if packed.shape != (len(w), packed_cols(w.shape[1])):
        raise KernelError(
            f"{library} compresses {list(w.shape)} to {list(packed.shape)}, expected "
            f"[{len(w)}, {packed_cols(w.shape[1])}]; leave the vendor's libraries out with "
            'Rule(lowering="reference")'
        )
    return packed


def nm24_mm(x: Tensor, packed: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [M, K] by what nm24_compress made of w.t() [N, K], add bias, sum in float32.

    Mixed dtypes, no rows, and a product for which no algorithm is known to be right (each is
    checked before its first use, which a CUDA graph that is being recorded can't wait for) take
    the op ``masked_mm``; what no library takes at all, the reference.

    Returns:
        [M, N] in x's dtype.
    """
    library = serving(w.t())
    if not library:
        return ops.REFERENCES[ops.nm24_mm](x, packed, w, mask, bias)
    dtypes = {operand.dtype for operand in (x, w, bias) if operand is not None}
    if len(dtypes) > 1 or not len(x):
        return ops.masked_mm(x, w, mask, bias)
    rows, held = len(x), x.contiguous()
    if rows % ROWS:
        held = torch.nn.functional.pad(held, (0, 0, 0, -rows % ROWS))
    straight = None if bias is None else bias.contiguous()
    algorithm = search.algorithm(library, held, w.shape[1], straight is not None)
    if algorithm is None:
        _warn_once(f"{library}, {w.dtype} {rows} x {w.shape[1]} x {w.shape[0]} on {x.device}")
        return ops.masked_mm(x, w, mask, bias)
    return compat.semi_structured_mm(library, packed, held, straight, algorithm)[:rows]


def serving(w: Tensor) -> str:
    """Which library takes a weight [R, K], "" where none does."""
    library = compat.semi_structured_library(w.device)
    return "" if misfit(*w.shape, w.dtype, library) else library


@functools.lru_cache(64)
def _warn_once(what: str) -> None:
    warnings.warn(
        f"sparsefx: 2:4 product runs as a masked dense one: {what}: no algorithm is known to be "
        "right; run the model once before a CUDA graph is recorded, or leave the vendor's "
        'libraries out with Rule(lowering="reference")',
        SparsefxWarning,
        stacklevel=3,
    )
