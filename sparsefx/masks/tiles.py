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
    taps = taps_first(w)  # [*taps, rows, cols]
    strips = [
        torch.cat([_solve_region(part, m, solve) for part in _split(strip, -1, cols)], -1)
        for strip in _split(taps, -2, rows)
    ]
    return taps_last(torch.cat(strips, -2))


def taps_first(w: Tensor) -> Tensor:
    """[rows, cols, *taps] -> [*taps, rows, cols]."""
    return w.permute(*range(2, w.dim()), 0, 1)


def taps_last(w: Tensor) -> Tensor:
    """[*taps, rows, cols] -> [rows, cols, *taps]."""
    return w.permute(-2, -1, *range(w.dim() - 2))


def to_tiles(w: Tensor, a: int, b: int) -> Tensor:
    """[*taps, I * a, J * b] -> [*taps, I, J, a, b]."""
    return torch.unflatten(torch.unflatten(w, -1, (-1, b)), -3, (-1, a)).transpose(-3, -2)


def chunks(tiles: Tensor, entries: int) -> tuple[Tensor, ...]:
    """Split [tiles, a, b]: a chunk stays in a CPU's cache; other devices take 64 times as much."""
    room = entries if tiles.device.type == "cpu" else 64 * entries
    return torch.split(tiles, max(1, room // (tiles.shape[1] * tiles.shape[2])))


def sum_tiles(w: Tensor, height: int, width: int) -> Tensor:
    """Sum [rows, cols, *taps] over blocks, those at the edges cut off: [I, J, *taps]."""
    taps = taps_first(w)
    margin = (0, -taps.shape[-1] % width, 0, -taps.shape[-2] % height)
    padded = torch.nn.functional.pad(taps, margin)
    down, across = padded.shape[-2] // height, padded.shape[-1] // width
    lines = torch.unflatten(padded, -1, (across, width)).sum(-1)
    return taps_last(torch.unflatten(lines, -2, (down, height)).sum(-2))


def tile_sizes(w: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Heights [I, 1, 1...] and widths [1, J, 1...] of the tiles of [rows, cols, *taps]."""
    sizes = [
        (size - torch.arange(0, size, m, device=w.device)).clamp(max=m) for size in w.shape[:2]
    ]
    ones = [1] * (w.dim() - 2)
    return sizes[0].view(-1, 1, *ones), sizes[1].view(1, -1, *ones)


def limits(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the limits of every tile per row, per column, and of all of it: [I, J, 1...]."""
    a, b = tile_sizes(w, m)
    row_limit, col_limit = b.clamp(max=n), a.clamp(max=n)
    return row_limit, col_limit, torch.minimum(a * row_limit, b * col_limit)


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
    tiles = to_tiles(w, a, b)
    solved = solve(tiles.reshape(-1, a, b)).view(tiles.shape)  # [*taps, ., ., a, b]
    return solved.transpose(-3, -2).flatten(-2).flatten(-3, -2)
