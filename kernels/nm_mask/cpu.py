"""The launcher of nm_mask.cpp: what it declines goes to the reference."""

import ctypes
import math
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.kernels import _native
from sparsefx.ops import REFERENCES
from sparsefx.ops import nm_mask as nm_mask_op

_SOURCE = Path(__file__).with_name("nm_mask.cpp")
_TYPES = (torch.float32, torch.bfloat16)
_MOST_RANKED = 32  # m, of which all pairs are compared


def _declare(library: ctypes.CDLL) -> None:
    size, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    for bits in (16, 32):
        mask = getattr(library, f"sparsefx_nm_mask_{bits}")
        mask.argtypes = [address, size, size, number, number, address, number]
        mask.restype = None


def nm_mask(w: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    """Bool, the shape of w: the n largest |w| of every m along dim, of equals the earlier.

    Row-wise masks of contiguous float32 and bfloat16, m up to 32, run here; the rest is declined.
    """
    library = _native.library(_SOURCE, _declare)
    if library is None or transposable or not _ranked(w, n, m, dim):
        return REFERENCES[nm_mask_op](w, n, m, dim, transposable)
    out = w.new_empty(w.shape, dtype=torch.bool)
    inner = math.prod(w.shape[dim % w.dim() + 1 :])
    getattr(library, f"sparsefx_nm_mask_{8 * w.element_size()}")(
        w.data_ptr(), w.numel() // (m * inner), inner, n, m, out.data_ptr(),
        _native.threads(w.numel()),
    )  # fmt: skip
    return out


def _ranked(w: Tensor, n: int, m: int, dim: int) -> bool:
    """Whether type, pattern and sizes are those that the C++ knows."""
    known = w.dtype in _TYPES and 1 <= n < m <= _MOST_RANKED and -w.dim() <= dim < w.dim()
    return known and w.is_contiguous() and w.numel() > 0 and w.shape[dim] % m == 0
