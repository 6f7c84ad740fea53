"""Good transposable masks of tiles of any size: heaviest first, then fill what got stuck.

The first phase is the heavy-to-light form of Hubara et al.'s 2-approximation (arXiv 2102.08124).
It can leave a row r and a column c short of their limits while (r, c) itself is kept. The second
phase repairs that: it drops a kept (r2, c2) and keeps (r, c2) and (r2, c), one more in all.

Such an exchange always exists. The limits of an a x b tile are min(n, b) per row and min(n, a) per
column; short means below.
  (*) Where a short row and a short column cross, the entry is kept, or the first phase would have
      taken it.
  Let r and c be short. Row r has a free entry (r, c2). By (*) column c2 is not short, and it isn't
  kept whole, so it holds n. Column c holds n - 1 at most, so at least one of the n rows that c2
  keeps has (r2, c) free.
The exchange leaves the sums of r2 and c2 alone, so nothing becomes short and (*) stays true. Each
one keeps one more: a min(n, b) bound them. It ends when no row is short or no column is; then
a min(n, b) or b min(n, a) are kept, and no mask within the limits keeps more.
"""

import torch
from torch import Tensor

from sparsefx.compat import outside_graphs
from sparsefx.masks.levels import finite_levels
from sparsefx.masks.tiles import chunks

_CHUNK = 1 << 18  # entries solved at once, to stay in the cache


@outside_graphs
def solve(tiles: Tensor, n: int) -> Tensor:
    """Mark heavy entries, at most n per row and column and as many as that allows.

    The number of steps depends on the values, so this can't be traced.

    Args:
        tiles: [tiles, a, b] with a, b <= 64.
        n: the limit per row and column.

    Returns:
        bool [tiles, a, b].
    """
    return torch.cat([_solve_chunk(chunk, n) for chunk in chunks(tiles, _CHUNK)])


def _solve_chunk(tiles: Tensor, n: int) -> Tensor:
    kept = _heaviest_first(tiles, n)
    _fill(kept, tiles, n)
    return kept


def _heaviest_first(tiles: Tensor, n: int) -> Tensor:
    """Visit the entries from heavy to light; keep one if its row and column have room."""
    count, a, b = tiles.shape
    size = a * b
    order = tiles.abs().flatten(1).argsort(dim=1, descending=True, stable=True)  # NaN first
    tile = torch.arange(count, device=tiles.device)
    visits = order.T.contiguous()  # [a * b, tiles]
    rows = (visits // b) * count + tile  # into row_room, flat
    cols = (visits % b) * count + tile
    row_room = torch.full((a * count,), min(n, b), dtype=torch.int8, device=tiles.device)
    col_room = torch.full((b * count,), min(n, a), dtype=torch.int8, device=tiles.device)
    kept = torch.empty(size, count, dtype=torch.bool, device=tiles.device)
    for k in range(size):
        row, col = row_room[rows[k]], col_room[cols[k]]
        keep = torch.minimum(row, col) > 0
        kept[k] = keep
        row_room[rows[k]] = row - keep.to(torch.int8)
        col_room[cols[k]] = col - keep.to(torch.int8)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, kept.T).view(tiles.shape)


def _fill(kept: Tensor, tiles: Tensor, n: int) -> None:
    """Exchange entries in kept, in place, until every tile holds as many as it can."""
    _, a, b = tiles.shape
    rows, cols = _short(kept, n)
    left = (rows.any(1) & cols.any(1)).nonzero().flatten()
    if not left.numel():
        return
    mask, level = kept[left], finite_levels(tiles[left].flatten(1)).view(-1, a, b)
    for _ in range(a * min(n, b)):
        rows, cols = _short(mask, n)
        unfilled = (rows.any(1) & cols.any(1)).nonzero().flatten()
        if not unfilled.numel():
            break
        state = (mask, level, rows, cols)
        mask[unfilled] = _exchange(*(part[unfilled] for part in state))
    kept[left] = mask


def _short(kept: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Which rows, bool [tiles, a], and columns, bool [tiles, b], have room for more."""
    _, a, b = kept.shape
    return kept.sum(2) < min(n, b), kept.sum(1) < min(n, a)


def _exchange(kept: Tensor, level: Tensor, short_row: Tensor, short_col: Tensor) -> Tensor:
    """Make the exchange that gains most, over all short rows r and columns c at once.

    The gain of (r, c, r2, c2) falls apart into the best r for c2 and the best c for r2.
    """
    count, _, b = kept.shape
    tile = torch.arange(count, device=kept.device)
    for_c2, r = level.masked_fill(kept | ~short_row[:, :, None], -torch.inf).max(1)  # [tiles, b]
    for_r2, c = level.masked_fill(kept | ~short_col[:, None, :], -torch.inf).max(2)  # [tiles, a]
    gain = for_c2[:, None, :] + for_r2[:, :, None] - level
    best = gain.masked_fill(~kept, -torch.inf).flatten(1).argmax(1)
    r2, c2 = best // b, best % b
    kept[tile, r2, c2] = False
    kept[tile, r[tile, c2], c2] = True
    kept[tile, r2, c[tile, r2]] = True
    return kept
