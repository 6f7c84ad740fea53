"""Transposable N:M: in every m x m tile at most n per row AND per column, for W and W^T alike.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M
Transposable Masks" (arXiv 2102.08124). The tiles here are tiles of the matrix; the code released
with the paper cuts them out of single rows, so its columns break the limit.
"""

from functools import partial
from typing import Literal, get_args, overload

from torch import Tensor

from sparsefx.compat import holds_values
from sparsefx.errors import MaskError
from sparsefx.masks import devices, entropic, exact, greedy, patterns
from sparsefx.masks.certificate import Certificate, certificate
from sparsefx.masks.checks import check_matrix, check_pattern, check_values, check_weight
from sparsefx.masks.magnitudes import FLOATS, real_magnitudes
from sparsefx.masks.tiles import map_tiles

Solver = Literal["auto", "exact", "greedy", "entropic"]
_SOLVE = {
    "auto": exact.solve,
    "exact": exact.solve,
    "greedy": greedy.solve,
    "entropic": entropic.solve,
}


@overload
def transposable_mask(
    w: Tensor, n: int, m: int, solver: Solver = "auto", return_certificate: Literal[False] = False
) -> Tensor: ...


@overload
def transposable_mask(
    w: Tensor, n: int, m: int, solver: Solver = "auto", *, return_certificate: Literal[True]
) -> tuple[Tensor, Certificate]: ...


def transposable_mask(
    w: Tensor, n: int, m: int, solver: Solver = "auto", return_certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Mark weights of large total |w| with n per row and column of every m x m tile.

    Tiles lie on dimensions 0 and 1, for each tap of a conv weight apart. A full tile gets exactly
    n per row and column. Where m doesn't divide a size, the last tiles are cut off there: an a x b
    tile gets at most n per row and column and as many as that allows, min(a min(n, b),
    b min(n, a)); among those masks the solver looks for the largest total. (One cut side only: as
    if it were padded with zeros that are kept last.)

    NaN counts as the largest magnitude, infinity as the next: more of them beat any finite sum.
    Magnitudes are rounded to 2**-46 of the largest of their tile, or coarser beside NaN and
    infinity (levels.py).

    Args:
        w: [rows, cols] or [out, in, *taps]; any dtype that ``nm_mask`` takes.
        n: how many to keep per row and column of a tile, 1 <= n < m.
        m: the side of a tile, at most 64.
        solver: "exact" finds the largest total. "greedy" takes the heaviest first and comes within
            about 1 % of it, "entropic" within about 0.1 %, by transport and exchanges; both are
            tensor operations alone. "auto" is "exact", for every n and m and on every machine:
            what a mask means may not depend on where it is made.
        return_certificate: also return the proof. For a mask that isn't the best, its gap is what
            the mask misses.

    Returns:
        bool, the shape of w; with the certificate behind it if that is asked for.

    Raises:
        MaskError: an argument is none of the above, or w is on the meta device. Up to m = 4,
            "exact" can be traced; beyond, the steps depend on the values, and a fake tensor is
            refused: inside a graph, call the op ``sparsefx::nm_mask``.
    """
    check_pattern(n, m)
    check_weight(w)
    check_matrix(w)
    if solver not in get_args(Solver):
        raise MaskError(
            f"solver={solver!r} is unknown; pass 'auto', 'exact', 'greedy' or 'entropic'"
        )
    check_values(w, "transposable_mask")
    traceable = m <= patterns.LARGEST and solver in ("auto", "exact") and not return_certificate
    if not traceable and not holds_values(w):
        raise MaskError(
            f"transposable_mask(n={n}, m={m}, solver={solver!r}) can't be traced, its steps depend "
            "on the values; call torch.ops.sparsefx.nm_mask, or use m <= 4 with solver='exact'"
        )
    real = w.detach() if w.dtype in FLOATS else real_magnitudes(w)
    mask = _mask(real, n, m, solver)
    if not return_certificate:
        return mask
    best = mask
    if solver not in ("auto", "exact"):
        best = _mask(real, n, m, "exact")
    return mask, certificate(real, mask, best, n, m)


def _mask(real: Tensor, n: int, m: int, solver: Solver) -> Tensor:
    mask = devices.solve(real, n, m, "exact" if solver == "auto" else solver)
    return map_tiles(real, m, partial(_SOLVE[solver], n=n)) if mask is None else mask
