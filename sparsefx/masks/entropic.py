"""Near-optimal transposable masks by tensor operations alone: transport, rounding, exchange.

1. The plan: fractions s in [0, 1] of every entry, within the limits, that maximise
   sum(s |w|) + entropy(s) / sharpness. Dykstra's alternating projections in the Kullback-Leibler
   divergence (Benamou et al., SIAM J. Sci. Comput. 37, 2015), as TSENOR uses them for these masks
   (arXiv 2505.23949): scale the rows, scale the columns, cut at 1 and remember what was cut. As
   many rounds for every weight, so that this part can be traced.
2. Rounding: the largest fractions of each row; then entries move, the cheapest first, from columns
   over their limit to columns below it. Such a move exists: a column that is kept in more rows than
   another is kept in one where the other isn't.
3. Exchange: every pair of rows, in the rounds of a tournament, swaps the two kept entries that gain
   most. That keeps all counts.
"""

import torch
from torch import Tensor

from sparsefx.compat import outside_graphs
from sparsefx.masks.flow import by_full_rows
from sparsefx.masks.magnitude import nm_mask
from sparsefx.masks.tiles import chunks

_CHUNK = 1 << 20  # entries solved at once
_ROUNDS = 60
_SHARPNESS = 30.0  # of a tile's largest |w|: exp(-_SHARPNESS) is the least fraction to start from
_TOURNAMENTS = 1


@outside_graphs
def solve(tiles: Tensor, n: int) -> Tensor:
    """Mark entries of nearly the largest total |w| within the limits, as many as these allow.

    Args:
        tiles: [tiles, a, b] with a, b <= 64.
        n: the limit per row and column.

    Returns:
        bool [tiles, a, b].
    """
    return torch.cat([by_full_rows(chunk, n, _solve_rows) for chunk in chunks(tiles, _CHUNK)])


def _solve_rows(level: Tensor, row_limit: int, col_limit: int) -> Tensor:
    plan = transport(level, row_limit, col_limit)
    full = row_limit == level.shape[2]
    kept = torch.ones_like(level, dtype=torch.bool)
    kept = kept if full else nm_mask(plan, row_limit, level.shape[2])
    _balance(kept, level, col_limit)
    return _exchange(kept, level)


def transport(level: Tensor, row_limit: int, col_limit: int) -> Tensor:
    """Return the plan: fractions of nearly row_limit per row, at most col_limit per column.

    What columns may leave free is a row of its own, whose entries weigh nothing.

    Args:
        level: [tiles, a, b], not negative, with a * row_limit <= b * col_limit.
        row_limit: the sum of every row.
        col_limit: the largest sum of a column.

    Returns:
        float32 [tiles, a, b].
    """
    count, a, b = level.shape
    free = b * col_limit - a * row_limit
    top = level.amax((1, 2), keepdim=True).clamp(min=1)
    plan = torch.exp((level / top - 1) * _SHARPNESS).float()
    sums, most = [float(row_limit)] * a, [1.0] * a
    if free:
        least = plan.new_full((count, 1, b), float(torch.tensor(-_SHARPNESS).exp()))
        plan = torch.cat([plan, least], 1)
        sums, most = [*sums, float(free)], [*most, float(col_limit)]
    row_sum = torch.tensor(sums, device=plan.device)[:, None]
    cap = torch.tensor(most, device=plan.device)[:, None]
    cut = torch.ones_like(plan)
    for _ in range(_ROUNDS):
        plan = plan * (row_sum / plan.sum(2, keepdim=True))
        plan = plan * (col_limit / plan.sum(1, keepdim=True))
        plan = plan * cut
        cut = (plan / cap).clamp(min=1)
        plan = torch.minimum(plan, cap)
    return (plan * cut)[:, :a]  # ordered above 1, too


def _balance(kept: Tensor, level: Tensor, limit: int) -> None:
    """Move entries, in place, from the fullest columns until none is over the limit."""
    over = (kept.sum(1) > limit).any(1).nonzero().flatten()
    while over.numel():
        kept[over] = moved = _move(kept[over], level[over], limit)
        over = over[(moved.sum(1) > limit).any(1)]


def _move(kept: Tensor, level: Tensor, limit: int) -> Tensor:
    tile = torch.arange(len(kept), device=kept.device)
    count = kept.sum(1)
    source = count.argmax(1)
    give = level[tile, :, source].masked_fill(~kept[tile, :, source], torch.inf)  # [tiles, a]
    closed = kept | (count >= limit)[:, None, :]
    loss = give[:, :, None] - level.masked_fill(closed, -torch.inf)
    loss = loss.masked_fill(closed, torch.inf)
    best = loss.flatten(1).argmin(1)
    row, target = best // kept.shape[2], best % kept.shape[2]
    kept[tile, row, source] = False
    kept[tile, row, target] = True
    return kept


def _exchange(kept: Tensor, level: Tensor) -> Tensor:
    """Let every pair of rows make its best swap, _TOURNAMENTS times."""
    a = kept.shape[1]
    seats = list(range(a + a % 2))  # a row of its own at the end sits out when a is odd
    for _ in range(_TOURNAMENTS * (len(seats) - 1) if a > 1 else 0):
        pairs = [(i, j) for i, j in zip(seats, reversed(seats), strict=True) if i < j < a]
        one, two = (torch.tensor(side, device=kept.device) for side in zip(*pairs, strict=True))
        seats = [seats[0], seats[-1], *seats[1:-1]]
        kept = _swap(kept, level, one, two)
    return kept


def _swap(kept: Tensor, level: Tensor, one: Tensor, two: Tensor) -> Tensor:
    mine, other = kept[:, one], kept[:, two]
    lead = level[:, one] - level[:, two]  # [tiles, pairs, b]
    least, give = lead.masked_fill(~(mine & ~other), torch.inf).min(2, keepdim=True)
    most, take = lead.masked_fill(~(other & ~mine), -torch.inf).max(2, keepdim=True)
    gains = (most > least).expand_as(mine)
    place = torch.arange(kept.shape[2], device=kept.device)
    flip = gains & ((place == give) | (place == take))
    kept = kept.index_copy(1, one, mine ^ flip)
    return kept.index_copy(1, two, other ^ flip)
