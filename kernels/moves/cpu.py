"""Launchers of moves.cpp: what they decline goes to the reference."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.kernels import _native
from sparsefx.ops import REFERENCES
from sparsefx.ops import scattered_mm as scattered_mm_op
from sparsefx.ops import sum_rows as sum_rows_op
from sparsefx.ops import take_columns as take_columns_op

_SOURCE = Path(__file__).with_name("moves.cpp")
_LANES = 16  # float32 in the widest vector
_ALIGNED = (torch.float32, torch.float64)  # the library writes 16-bit results through a copy


def _declare(library: ctypes.CDLL) -> None:
    size, address, count = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    for bits in (8, 16, 32, 64):
        take = getattr(library, f"sparsefx_take_{bits}")
        take.argtypes = [address, size, size, size, address, size, address, count]
        put = getattr(library, f"sparsefx_put_{bits}")
        put.argtypes = [address, size, size, address, size, address, address, size, count]
    for sums in (library.sparsefx_sum_rows_f32, library.sparsefx_sum_rows_f64):
        sums.argtypes = [address, size, size, size, address, count, count]
        sums.restype = None


def take_columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[:, S], of x[M, K] -> [M, k].

    Raises:
        IndexError: an index is outside 0 .. K - 1.
    """
    library = _native.library(_SOURCE, _declare)
    if library is None or not _movable(x, indices):
        return REFERENCES[take_columns_op](x, indices)
    (rows, size), k = x.shape, indices.shape[0]
    out = x.new_empty(rows, k)
    take = getattr(library, f"sparsefx_take_{8 * x.element_size()}")
    _within(
        take(
            x.data_ptr(), rows, size, x.stride(0), indices.data_ptr(), k, out.data_ptr(),
            _native.threads(out.numel()),
        ),
        indices, size,
    )  # fmt: skip
    return out


def scattered_mm(
    a: Tensor, b: Tensor, indices: Tensor, size: int, rest: Tensor | None = None
) -> Tensor:
    """A @ b, [M, J] @ [J, k], at the columns S of [M, size]; zeros, or ``rest`` [M, 1], elsewhere.

    Raises:
        IndexError: an index is outside 0 .. size - 1.
    """
    library = _native.library(_SOURCE, _declare)
    if library is None or not _movable(a.new_empty(0, 0), indices):
        return REFERENCES[scattered_mm_op](a, b, indices, size, rest)
    rows, k = a.shape[0], b.shape[1]
    put = getattr(library, f"sparsefx_put_{8 * a.element_size()}")
    # rows of the product that start on a vector: an odd distance costs up to half as long again
    width = k + (-k % _LANES if a.dtype in _ALIGNED else 0)
    values = a.new_empty(rows, width)[:, :k]
    torch.mm(a, b, out=values)
    out = a.new_empty(rows, size)
    rest = rest if rest is None else rest.contiguous()
    _within(
        put(
            values.data_ptr(), rows, width, indices.data_ptr(), k,
            None if rest is None else rest.data_ptr(), out.data_ptr(), size,
            _native.threads(out.numel()),
        ),
        indices, size,
    )  # fmt: skip
    return out


def sum_rows(x: Tensor, squared: bool) -> Tensor:
    """The sum over the rows of x[M, K], or of their squares, -> [K]."""
    library = _native.library(_SOURCE, _declare)
    along = x.stride(1) == 1 or x.shape[1] <= 1
    if library is None or not along or x.dtype not in _ALIGNED:
        return REFERENCES[sum_rows_op](x, squared)
    out = x.new_empty(x.shape[1])
    sums = getattr(library, f"sparsefx_sum_rows_f{8 * x.element_size()}")
    threads = _native.threads(x.numel())
    sums(x.data_ptr(), x.shape[0], x.stride(0), x.shape[1], out.data_ptr(), squared, threads)
    return out


def _movable(x: Tensor, indices: Tensor) -> bool:
    """Whether rows lie in memory one element after the other, of a size that is known."""
    along = x.stride(1) == 1 or x.shape[1] <= 1
    return along and indices.is_contiguous() and x.element_size() <= 8 and not x.is_complex()


def _within(refused: int, indices: Tensor, size: int) -> None:
    if refused:
        low, high = int(indices.min()), int(indices.max())
        raise IndexError(f"columns {low} .. {high} of a matrix of {size} columns")
