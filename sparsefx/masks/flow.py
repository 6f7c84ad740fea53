"""The best transposable masks of tiles of any size: rows first, then the shortest paths to balance.

A mask is a flow from rows to columns. Keeping the largest of each row is the best there is when the
columns have no limit. From there, one entry at a time moves from a column over its limit to one
below: along the path, over as many rows as it takes, that loses least. Each mask on the way is the
best for the counts that its columns have (successive shortest paths; Ahuja, Magnanti and Orlin,
"Network Flows", section 9.7), so the last one is the best there is. At 4:8 that is about four moves
a tile where building the flow from nothing takes 32.

Lengths are sums of integer levels, so nothing is rounded, and ties are settled by place: exact.cpp,
which does the same tile by tile, finds the same mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx.compat import outside_graphs
from sparsefx.masks.levels import integer_levels
from sparsefx.masks.magnitude import nm_mask
from sparsefx.masks.tiles import chunks

_CHUNK = 1 << 18  # entries solved at once, to stay in the cache
_FAR = torch.inf


@outside_graphs
def solve(tiles: Tensor, n: int) -> Tensor:
    """Mark the entries of largest total |w| within the limits, as many as these allow.

    The number of steps depends on the values, so this can't be traced.

    Args:
        tiles: [tiles, a, b] with a, b <= 64.
        n: the limit per row and column.

    Returns:
        bool [tiles, a, b].
    """
    return torch.cat([by_full_rows(chunk, n, _balance) for chunk in chunks(tiles, _CHUNK)])


def by_full_rows(tiles: Tensor, n: int, solve: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """Let ``solve`` see tiles turned so that every row can be full.

    Args:
        tiles: [tiles, a, b].
        n: the limit per row and column.
        solve: from (integer levels, what each row keeps, what each column keeps at most) to a mask.
    """
    _, a, b = tiles.shape
    level = integer_levels(tiles.flatten(1))[0].view(-1, a, b)
    if rows_can_be_full(a, b, n):
        return solve(level, min(n, b), min(n, a))
    return solve(level.transpose(1, 2).contiguous(), min(n, a), min(n, b)).transpose(1, 2)


def rows_can_be_full(a: int, b: int, n: int) -> bool:
    """Whether min(n, b) of every row fit in an a x b tile; else min(n, a) of every column do."""
    return a * min(n, b) <= b * min(n, a)


def _balance(level: Tensor, row_limit: int, col_limit: int) -> Tensor:
    """Keep row_limit in each row of [tiles, a, b] and at most col_limit in each column."""
    b = level.shape[2]
    full = row_limit == b
    kept = torch.ones_like(level, dtype=torch.bool) if full else nm_mask(level, row_limit, b)
    over = (kept.sum(1) > col_limit).any(1).nonzero().flatten()
    while over.numel():
        moved = _move(kept[over], level[over], col_limit)
        kept[over] = moved
        over = over[(moved.sum(1) > col_limit).any(1)]
    return kept


def _move(kept: Tensor, level: Tensor, limit: int) -> Tensor:
    """Move one entry of each tile along the shortest path, in place."""
    count = kept.sum(1)
    to_col, from_row, from_col = _shortest_paths(kept, level, count > limit)
    end = to_col.masked_fill(count >= limit, _FAR).argmin(1)  # [tiles]
    tile = torch.arange(len(kept), device=kept.device)
    while tile.numel():
        row = from_row[tile, end]
        tile, end, row = (part[row >= 0] for part in (tile, end, row))
        kept[tile, row, end] = True
        end = from_col[tile, row]
        kept[tile, row, end] = False
    return kept


def _shortest_paths(kept: Tensor, level: Tensor, sources: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bellman-Ford from all sources at once; no cycle is negative, for kept is a best mask.

    Returns:
        The lengths of the paths to the columns, and the node before each column and each row.
    """
    give, take = level.masked_fill(~kept, _FAR), (-level).masked_fill(kept, _FAR)
    to_col = torch.where(sources, 0.0, _FAR).to(level.dtype)  # [tiles, b]
    to_row = torch.full_like(level[:, :, 0], _FAR)  # [tiles, a]
    from_row = torch.full_like(to_col, -1, dtype=torch.int64)
    from_col = torch.full_like(to_row, -1, dtype=torch.int64)
    while True:
        way, before = (to_col[:, None, :] + give).min(2)
        from_col = torch.where(way < to_row, before, from_col)
        to_row = torch.minimum(way, to_row)
        way, before = (to_row[:, :, None] + take).min(1)
        shorter = way < to_col
        if not shorter.any():
            return to_col, from_row, from_col
        from_row = torch.where(shorter, before, from_row)
        to_col = torch.minimum(way, to_col)
