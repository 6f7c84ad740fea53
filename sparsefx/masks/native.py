"""The C++ solver, built when it is first needed by the compiler that torch itself uses."""

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.compat import build_cpp, outside_graphs
from sparsefx.errors import KernelError, SparsefxWarning

_SOURCE = Path(__file__).with_name("exact.cpp")
_PER_THREAD = 1 << 14  # entries: about half a millisecond, what a second thread is worth
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


@outside_graphs
def solve(tiles: Tensor, n: int) -> Tensor | None:
    """Mark the best entries, as flow.solve does; None where there is no compiler.

    Args:
        tiles: on the CPU, [tiles, a, b] with a, b <= 64.
        n: the limit per row and column.
    """
    library = _library()
    if library is None:
        return None
    narrow = tiles.dtype in _NARROW
    solver = library.sparsefx_exact_f32 if narrow else library.sparsefx_exact_f64
    tiles = tiles.to(torch.float32 if narrow else torch.float64).contiguous()
    mask = torch.empty(tiles.shape, dtype=torch.bool)
    threads = min(torch.get_num_threads(), 1 + tiles.numel() // _PER_THREAD)
    solver(tiles.data_ptr(), *tiles.shape, n, mask.data_ptr(), threads)
    return mask


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = build_cpp(_SOURCE.read_text(encoding="utf-8"))
    except KernelError as error:
        warnings.warn(
            f"the exact mask solver runs as torch operators, to the same masks but more slowly: "
            f"{error}",
            SparsefxWarning,
            stacklevel=2,
        )
        return None
    size, address, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    for solver in (library.sparsefx_exact_f32, library.sparsefx_exact_f64):
        solver.argtypes = [address, count, size, size, size, address, size]
        solver.restype = None
    return library
