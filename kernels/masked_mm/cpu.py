"""The launcher of masked_mm.cpp: what it declines goes to the reference."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.kernels import _native
from sparsefx.ops import REFERENCES
from sparsefx.ops import masked_mm as masked_mm_op

_SOURCE = Path(__file__).with_name("masked_mm.cpp")
_MOST_KEPT = 0.4  # share of the mask above which a dense product is faster: README.md


def _declare(library: ctypes.CDLL) -> None:
    size, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    library.sparsefx_masked_mm.argtypes = [
        address, size, address, address, *[size] * 4, number, ctypes.c_double, address, address,
        number,
    ]  # fmt: skip


def masked_mm(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x[M, K] @ where(mask, w, 0) + bias -> [M, N], of w, mask [K, N].

    float32 runs here where little is kept; the rest is declined.
    """
    library = _native.library(_SOURCE, _declare)
    if library is None or not _multiplied(x, w, mask, bias):
        return REFERENCES[masked_mm_op](x, w, mask, bias)
    stored, bits, along = _as_stored(w, mask)
    own, added = x.contiguous(), bias if bias is None else bias.contiguous()
    depth, outputs = w.shape
    out = x.new_empty(x.shape[0], outputs)
    done = library.sparsefx_masked_mm(
        own.data_ptr(), own.shape[0], stored.data_ptr(), bits.data_ptr(), stored.stride(0),
        bits.stride(0), depth, outputs, along, _MOST_KEPT,
        None if added is None else added.data_ptr(), out.data_ptr(), _native.threads(w.numel()),
    )  # fmt: skip
    return out if done else REFERENCES[masked_mm_op](x, w, mask, bias)


def _as_stored(w: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both [lines, length], lengths along memory, and whether lines are outputs."""
    along = w.stride(0) == 1 and w.stride(1) != 1
    stored, bits = (w.t(), mask.t()) if along else (w, mask)
    stored = stored if stored.stride(1) == 1 else stored.contiguous()
    return stored, bits if bits.stride(1) == 1 else bits.contiguous(), along


def _multiplied(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> bool:
    """Whether types and sizes are those that the C++ knows."""
    known = x.dtype == w.dtype == torch.float32 and mask.dtype == torch.bool
    same = bias is None or (bias.dtype == x.dtype and bias.shape == w.shape[1:])
    filled = 0 not in (*x.shape, *w.shape)
    return known and same and filled and mask.shape == w.shape and x.shape[1] == w.shape[0]
