"""A proof that a transposable mask is the best, or the bound on what it misses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import MaskError
from sparsefx.masks import exact
from sparsefx.masks.checks import (
    check_mask,
    check_matrix,
    check_pattern,
    check_values,
    check_weight,
)
from sparsefx.masks.levels import finite_levels
from sparsefx.masks.magnitudes import real_magnitudes
from sparsefx.masks.measures import Verdict
from sparsefx.masks.prices import prices
from sparsefx.masks.tiles import limits, map_tiles, sum_tiles, tile_sizes

_UNIT = 2.0**48  # of finite_levels


@dataclass(frozen=True, eq=False)
class Certificate:
    """Prices that bound the total |w| of every mask within the limits, tile by tile.

    By linear programming duality no mask of a tile [a, b] that holds as many ones as the limits
    allow has a larger total than

        sum(min(n, b) * rows) + sum(min(n, a) * cols) + sum(max(0, |w| - rows - cols))

    whatever the prices are, so long as they aren't negative where rows (columns) can't all be full.
    A mask that reaches the bound is the best. ``|w|`` is that of ``levels.finite_levels`` where a
    tile holds infinity or NaN.

    Attributes:
        n: the limit per row and column of a tile.
        m: the side of a tile.
        rows: float64 [rows, J, *taps], the price of each row in each column of tiles.
        cols: float64 [I, cols, *taps], the price of each column in each row of tiles.
        primal: float64 [I, J, *taps], the total |w| that the mask keeps of each tile.
        dual: float64 [I, J, *taps], the bound.
    """

    n: int
    m: int
    rows: Tensor
    cols: Tensor
    primal: Tensor
    dual: Tensor

    @property
    def gap(self) -> Tensor:
        """What each tile misses of its bound, [I, J, *taps]; 0 within rounding where it is best."""
        return self.dual - self.primal

    def holds(self, w: Tensor, mask: Tensor, tolerance: float = 1e-9) -> Verdict:
        """Check in float64, from w, the mask and the prices alone, that no mask is better.

        Args:
            w: the weight.
            mask: bool, the shape of w.
            tolerance: the largest gap, as a share of the bound.

        Returns:
            True, or false with the first tile that breaks a limit, holds fewer than fit, has a
            price that is negative where it may not be, or has a gap.

        Raises:
            MaskError: w, the mask and the prices differ in shape, or hold no values.
        """
        check_arguments(w, mask, self.n, self.m)
        shape = (*w.shape[:1], -(-w.shape[1] // self.m), *w.shape[2:])
        if self.rows.shape != shape:
            raise MaskError(
                f"w is of shape {tuple(w.shape)}, and the certificate has row prices of shape "
                f"{tuple(self.rows.shape)} instead of {shape}; pass the weight it was made for"
            )
        primal, dual = totals(w, mask, self.n, self.m, self.rows, self.cols)
        for bad, what in (
            (_filled(mask, self.n, self.m), "breaks the limits or holds fewer than fit"),
            (_negative(self.rows, self.cols, w, self.n, self.m), "has a negative price"),
            (~(dual - primal <= tolerance * dual), "keeps less than its bound"),
        ):
            if bad.any():
                place = tuple(bad.nonzero()[0].tolist())
                return Verdict(False, f"tile {place} {what}: {_detail(primal, dual, place)}")
        return Verdict(True)


def _detail(primal: Tensor, dual: Tensor, place: tuple[int, ...]) -> str:
    kept, bound = float(primal[place]) * _UNIT, float(dual[place]) * _UNIT
    return f"it keeps {kept:.9g}, the bound is {bound:.9g}"


def certify(w: Tensor, mask: Tensor, n: int, m: int) -> Certificate:
    """Compare a transposable mask, from wherever, with the best one.

    Args:
        w: [rows, cols, *taps], any dtype that ``nm_mask`` takes.
        mask: bool, the shape of w.
        n: the limit per row and column of a tile.
        m: the side of a tile.

    Returns:
        A certificate with the prices of the best mask: its gap is what this mask misses, and it
        holds for this mask if that is nothing.

    Raises:
        MaskError: an argument is none of the above, or on the meta device.
    """
    check_arguments(w, mask, n, m)
    real = real_magnitudes(w)
    best = map_tiles(real, m, lambda tiles: exact.solve(tiles, n))
    return certificate(real, mask, best, n, m)


def certificate(w: Tensor, mask: Tensor, best: Tensor, n: int, m: int) -> Certificate:
    """Return what certify does, given a mask that is the best; w is floating."""
    rows, cols = prices(w, best, n, m)
    primal, dual = totals(w, mask, n, m, rows, cols)
    return Certificate(n, m, rows, cols, primal * _UNIT, dual * _UNIT)


def check_arguments(w: Tensor, mask: Tensor, n: int, m: int) -> None:
    """Raise MaskError unless w, mask, n and m belong together."""
    check_pattern(n, m)
    check_weight(w)
    check_matrix(w)
    check_values(w, "a certificate")
    check_mask(w, mask)


def totals(
    w: Tensor, mask: Tensor, n: int, m: int, rows: Tensor, cols: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the mask keeps and the bound, [I, J, *taps], in the units of finite_levels."""
    real = real_magnitudes(w)
    level = map_tiles(real, m, lambda t: finite_levels(t.flatten(1)).view(t.shape)).double()
    primal = sum_tiles(torch.where(mask, level, 0.0), m, m)
    u, v = rows / _UNIT, cols / _UNIT
    level -= u.repeat_interleave(m, 1)[:, : w.shape[1]]
    level -= v.repeat_interleave(m, 0)[: w.shape[0]]
    row_limit, col_limit, _ = limits(w, n, m)
    dual = sum_tiles(u, m, 1) * row_limit + sum_tiles(v, 1, m) * col_limit
    return primal, dual + sum_tiles(level.clamp_(min=0), m, m)


def _filled(mask: Tensor, n: int, m: int) -> Tensor:
    """Where a tile breaks the limits or holds fewer than fit, [I, J, *taps]."""
    over_row = sum_tiles((sum_tiles(mask.int(), 1, m) > n).int(), m, 1) > 0
    over_col = sum_tiles((sum_tiles(mask.int(), m, 1) > n).int(), 1, m) > 0
    return over_row | over_col | (sum_tiles(mask.int(), m, m) != limits(mask, n, m)[2])


def _negative(rows: Tensor, cols: Tensor, w: Tensor, n: int, m: int) -> Tensor:
    """Where a tile has a negative price that the duality doesn't allow, [I, J, *taps]."""
    row_limit, col_limit, most = limits(w, n, m)
    a, b = tile_sizes(w, m)
    rows_full, cols_full = most == a * row_limit, most == b * col_limit
    row = sum_tiles((rows < 0).int(), m, 1) > 0
    col = sum_tiles((cols < 0).int(), 1, m) > 0
    return (row & ~rows_full) | (col & ~cols_full)
