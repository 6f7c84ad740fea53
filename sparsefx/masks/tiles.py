"""Cut a matrix, or each tap of a conv weight, into m x m tiles; put solved tiles back together."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx.masks.checks import check_matrix


def map_tiles(w: Tensor, m: int, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Replace each tile of dimensions 0 and 1 by what solve makes of it.

    What m doesn't divide leaves one strip of shorter tiles at the bottom and one of narrower tiles
    at the right, which solve receives apart: all tiles of one call are of one size.

    Args:
        w: [rows, cols, *taps].
        m: the side of a full tile.
        solve: from [tiles, a, b] to bool [tiles, a, b], with a, b <= m.

    Returns:
        bool, the shape of w, contiguous but for the taps, which lie outermost.
    """
    check_matrix(w)
    rows, cols = w.shape[0] - w.shape[0] % m, w.shape[1] - w.shape[1] % m
    taps = w.permute(*range(2, w.dim()), 0, 1)  # [*taps, rows, cols]
    strips = [
        torch.cat([_solve_region(part, m, solve) for part in _split(strip, -1, cols)], -1)
        for strip in _split(taps, -2, rows)
    ]
    return torch.cat(strips, -2).permute(-2, -1, *range(w.dim() - 2))


def _split(w: Tensor, dim: int, at: int) -> list[Tensor]:
    """Full tiles first, then the rest; neither when it is empty, unless both are."""
    if at in (0, w.shape[dim]):
        return [w]
    return [w.narrow(dim, 0, at), w.narrow(dim, at, w.shape[dim] - at)]


def _solve_region(w: Tensor, m: int, solve: Callable[[Tensor], Tensor]) -> Tensor:
    """Solve a region [*taps, R, C] of equal tiles."""
    if w.numel() == 0:
        return torch.zeros_like(w, dtype=torch.bool)
    a, b = min(m, w.shape[-2]), min(m, w.shape[-1])
    tiles = torch.unflatten(torch.unflatten(w, -1, (-1, b)), -3, (-1, a)).transpose(-3, -2)
    solved = solve(tiles.reshape(-1, a, b)).view(tiles.shape)  # [*taps, ., ., a, b]
    return solved.transpose(-3, -2).flatten(-2).flatten(-3, -2)
