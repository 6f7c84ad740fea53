"""The best transposable mask of small tiles: score every legal pattern, take the best."""

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from sparsefx.masks.levels import integer_levels

LARGEST = 4  # 90 patterns at 2:4; 2040 at 2:5 would be the next
_CHUNK = 4096  # tiles scored at once: 3 MB of scores at 2:4


def solve(tiles: Tensor, n: int) -> Tensor:
    """Mark the entries of largest total |w|; of equal totals, the first of legal_patterns.

    Scores are sums of integers in float64, so that neither autocast, torch's setting of the matmul
    precision nor the order of a library's additions decides between two patterns.

    Args:
        tiles: [tiles, a, b] with a, b <= 4.
        n: the limit per row and column.

    Returns:
        bool [tiles, a, b].
    """
    a, b = int(tiles.shape[1]), int(tiles.shape[2])  # numbers even where sizes are symbolic
    legal = torch.tensor(legal_patterns(a, b, n), dtype=torch.float64, device=tiles.device)
    keep = legal.bool()  # [patterns, a * b]
    best = [
        (integer_levels(chunk)[0] @ legal.T).argmax(1)  # argmax: the first of equals
        for chunk in torch.split(tiles.flatten(1), _CHUNK)
    ]
    return keep[torch.cat(best)].view(tiles.shape)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def legal_patterns(a: int, b: int, n: int) -> tuple[tuple[int, ...], ...]:
    """All 0/1 matrices [a, b] with at most n per row and column and as many ones as that allows.

    Flattened, earlier ones first. Exactly n per row and column where a = b >= n.
    """
    return _enumerate(a, b, n)


@lru_cache  # of plain numbers: a cached tensor could be a fake one
def _enumerate(a: int, b: int, n: int) -> tuple[tuple[int, ...], ...]:
    lines = [line for line in product((1, 0), repeat=b) if sum(line) <= n]
    legal = [
        pattern
        for pattern in product(lines, repeat=a)
        if all(sum(column) <= n for column in zip(*pattern, strict=True))
    ]
    most = min(a * min(n, b), b * min(n, a))
    return tuple(sum(p, ()) for p in legal if sum(map(sum, p)) == most)
