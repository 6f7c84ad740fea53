"""Transposable N:M: in every m x m tile at most n per row AND per column, for W and W^T alike.

Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient Method to Find N:M
Transposable Masks" (arXiv 2102.08124). The tiles here are tiles of the matrix; the code released
with the paper cuts them out of single rows, so its columns break the limit.
"""

from functools import partial
from typing import Literal

from torch import Tensor

from sparsefx.errors import MaskError
from sparsefx.masks import exact, greedy
from sparsefx.masks.checks import check_matrix, check_pattern, check_values, check_weight
from sparsefx.masks.tiles import map_tiles

Solver = Literal["auto", "exact", "greedy"]


def transposable_mask(w: Tensor, n: int, m: int, solver: Solver = "auto") -> Tensor:
    """Mark weights of large total |w| with n per row and column of every m x m tile.

    Tiles lie on dimensions 0 and 1, for each tap of a conv weight apart. A full tile gets exactly
    n per row and column. Where m doesn't divide a size, the last tiles are cut off there: an a x b
    tile gets at most n per row and column and as many as that allows, min(a min(n, b),
    b min(n, a)). (One cut side only: as if it were padded with zeros that are kept last.)

    NaN counts as the largest magnitude, infinity as the next: more of them beat any finite sum.

    Args:
        w: [rows, cols] or [out, in, *taps]; float64, float32, float16 or bfloat16.
        n: how many to keep per row and column of a tile, 1 <= n < m.
        m: the side of a tile, at most 64.
        solver: "exact" finds the largest total, for m <= 4; "greedy" comes within about 1 % of it
            for any m; "auto" is "exact" where that works.

    Returns:
        bool, the shape of w.

    Raises:
        MaskError: an argument is none of the above, or w is on the meta device.
    """
    check_pattern(n, m)
    check_weight(w)
    check_matrix(w)
    if solver not in ("auto", "exact", "greedy"):
        raise MaskError(f"solver={solver!r} is unknown; pass 'auto', 'exact' or 'greedy'")
    check_values(w, "transposable_mask")
    solve = greedy.solve if solver == "greedy" else exact.solve
    return map_tiles(w.detach(), m, partial(solve, n=n))
