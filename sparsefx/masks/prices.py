"""Dual values of the best transposable masks: what a place in each row and column is worth.

A mask is the best exactly when no closed path of giving up and taking entries gains anything, and
exactly then Bellman-Ford over these paths comes to an end (Ahuja, Magnanti and Orlin, "Network
Flows", section 5.2): its lengths are the prices, and the proof, however the mask was found.
"""

import torch
from torch import Tensor

from sparsefx.masks.flow import rows_can_be_full
from sparsefx.masks.levels import integer_levels
from sparsefx.masks.tiles import taps_first, taps_last, to_tiles


def prices(w: Tensor, best: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Return what a place is worth, in units of |w|, for a mask that is the best.

    Args:
        w: floating [rows, cols, *taps].
        best: bool, the shape of w: a mask of the largest total.
        n: the limit per row and column of a tile.
        m: the side of a tile.

    Returns:
        float64 [rows, J, *taps] for each row in each column of tiles, and float64 [I, cols, *taps]
        for each column in each row of tiles; I = ceil(rows / m), J = ceil(cols / m).
    """
    taps, kept = taps_first(w), taps_first(best)
    *outer, height, width = taps.shape
    of_rows = taps.new_zeros(*outer, height, -(-width // m), dtype=torch.float64)
    of_cols = taps.new_zeros(*outer, -(-height // m), width, dtype=torch.float64)
    if w.numel() == 0:
        return taps_last(of_rows), taps_last(of_cols)
    for top, bottom in _spans(height, m):
        for left, right in _spans(width, m):
            a, b = min(m, bottom - top), min(m, right - left)
            region = (..., slice(top, bottom), slice(left, right))
            u, v = _region_prices(to_tiles(taps[region], a, b), to_tiles(kept[region], a, b), n)
            of_rows[..., top:bottom, left // m : -(-right // m)] = u
            of_cols[..., top // m : -(-bottom // m), left:right] = v
    return taps_last(of_rows), taps_last(of_cols)


def _spans(size: int, m: int) -> list[tuple[int, int]]:
    """Where the full tiles and the cut one begin and end."""
    full = size - size % m
    return [span for span in ((0, full), (full, size)) if span[0] < span[1]]


def _region_prices(tiles: Tensor, kept: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """[*taps, I, J, a, b] -> [*taps, I * a, J] and [*taps, I, J * b]."""
    *grid, a, b = tiles.shape
    level, unit = integer_levels(tiles.reshape(-1, a * b))
    u, v = tile_prices(level.view(-1, a, b), kept.reshape(-1, a, b), n)
    u, v = (u * unit).view(*grid, a), (v * unit).view(*grid, b)
    return u.transpose(-1, -2).flatten(-3, -2), v.flatten(-2)


def tile_prices(level: Tensor, kept: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return prices of rows [tiles, a] and columns [tiles, b] of integer levels [tiles, a, b]."""
    if rows_can_be_full(int(level.shape[1]), int(level.shape[2]), n):
        return _prices(level, kept)
    of_cols, of_rows = _prices(level.transpose(1, 2), kept.transpose(1, 2))
    return of_rows, of_cols


def _prices(level: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Raise the columns' prices from 0 until no row would rather have what it doesn't keep.

    That takes at most as many rounds as there are columns; of a mask that isn't the best it takes
    for ever, and what is returned then certifies nothing.
    """
    of_cols = torch.zeros_like(level[:, 0, :])
    for _ in range(level.shape[2] + 1):
        profit = level - of_cols[:, None, :]
        of_rows = profit.masked_fill(~kept, torch.inf).amin(2)
        asked = (level - of_rows[:, :, None]).masked_fill(kept, -torch.inf).amax(1)
        raised = torch.maximum(asked, of_cols)
        if torch.equal(raised, of_cols):
            break
        of_cols = raised
    return of_rows, of_cols
