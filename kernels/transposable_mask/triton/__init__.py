"""N:M masks on a GPU: which kernel makes which; what none serves is left to the operators.

Meaning: sparsefx/masks/transposable.py, magnitude.py.  Derivations: README.md.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.kernels import _tiles
from sparsefx.kernels.transposable_mask.triton import entropic, exact, rows, small

SIDES = (4, 8, 16, 32)
SOLVERS = ("exact", "entropic")
LARGEST_GROUP = 32


def nm_mask(w: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    """Mark n of every m weights: row-wise in one pass, transposable as ``solve`` does.

    float64, integers, m > 32, empty weights and what is refused take the reference.

    Args:
        w: of any rank and strides; [rows, cols, *taps] where transposable.
        n: kept of every m.
        m: group size, or the side of a tile.
        dim: along which the groups run.
        transposable: keep n of m along dimensions 0 and 1 alike.

    Returns:
        bool, the shape of w, contiguous.

    Raises:
        MaskError: as ``masks.nm_mask`` and ``masks.transposable_mask``.
    """
    if transposable or not _has_rows(w, n, m, dim):
        return ops.REFERENCES[ops.nm_mask](w, n, m, dim, transposable)
    return rows.solve(w, n, m, dim % w.dim())


def _has_rows(w: Tensor, n: int, m: int, dim: int) -> bool:
    """Whether the row-wise kernel serves."""
    grouped = -w.dim() <= dim < w.dim() and 1 <= n < m <= LARGEST_GROUP and w.shape[dim] % m == 0
    return grouped and w.dtype in _tiles.DTYPES and w.numel() > 0


def solve(w: Tensor, n: int, m: int, solver: str) -> Tensor | None:
    """Make a transposable mask, as ``masks.transposable_mask`` does.

    Served: m of 4, 8, 16 and 32 that divides both sizes, in float32, float16 and bfloat16, by
    the solvers "exact", with the operators' own mask, and "entropic".

    Args:
        w: [rows, cols, *taps], any strides.
        n: kept per row and column of a tile, 1 <= n < m.
        m: the side of a tile.
        solver: "exact", "greedy" or "entropic".

    Returns:
        bool, the shape of w, the taps outermost in memory; None for what isn't served.
    """
    whole = not (w.shape[0] % m or w.shape[1] % m)
    if solver not in SOLVERS or m not in SIDES or w.dtype not in _tiles.DTYPES or not whole:
        return None
    taps = w.permute(*range(2, w.dim()), 0, 1)  # [*taps, rows, cols]
    mask = torch.empty(taps.shape, dtype=torch.bool, device=w.device)
    if w.numel():
        _solver(m, solver)(_as_matrices(taps), _as_matrices(mask.view(torch.uint8)), n, m)
    return mask.permute(-2, -1, *range(w.dim() - 2))


def _solver(m: int, solver: str) -> Callable[[Tensor, Tensor, int, int], None]:
    if solver == "entropic":
        return entropic.solve
    return small.solve if m == small.SIDE else exact.solve


def _as_matrices(w: Tensor) -> Tensor:
    return w.reshape(-1, *w.shape[-2:])
