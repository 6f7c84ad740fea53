"""Which N:M pattern the zeros of a weight follow, wherever they came from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.masks.checks import check_dim, check_values
from sparsefx.masks.measures import is_valid

SIZES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class FoundPattern:
    """The pattern that a weight holds: at most n of every m are not zero.

    Attributes:
        n: the largest number kept of a group.
        m: the size of a group.
        transposable: whether m divides dimensions 0 and 1, and every m x m tile of them holds the
            pattern along both.
    """

    n: int
    m: int
    transposable: bool

    def __str__(self) -> str:
        """Return "2:4" or "2:4 transposable"."""
        return f"{self.n}:{self.m} transposable" if self.transposable else f"{self.n}:{self.m}"


def find_pattern(w_or_mask: Tensor, dim: int = 1) -> FoundPattern | None:
    """Return the tightest N:M pattern that the zeros hold, for m of 2, 4, 8, 16 and 32.

    The tightest has the smallest n / m; of equals the smallest m is taken, of which the others
    follow. A weight that is all zero holds the pattern of n = 1, like every sparser one.

    Args:
        w_or_mask: any dtype and rank from 1; anything but zero counts as kept, NaN too.
        dim: the dimension along which groups run: 1 for a linear or conv weight [out, in, *taps].

    Returns:
        The pattern; None when each m either doesn't divide the size or has a group without a zero.

    Raises:
        MaskError: dim isn't a dimension, or the tensor is on the meta device.
    """
    check_values(w_or_mask, "find_pattern")
    axis = check_dim(w_or_mask, dim)
    kept = w_or_mask.detach() != 0
    best: tuple[int, int] | None = None
    if kept.all():  # dense, or empty
        return None
    counts = kept.movedim(axis, -1).to(torch.int8)
    for m in SIZES:
        if counts.shape[-1] % 2:
            break  # no larger power of two divides the size
        counts = counts[..., ::2] + counts[..., 1::2]
        n = max(1, int(counts.max()))
        if n < m and (best is None or n * best[1] < best[0] * m):
            best = (n, m)
    if best is None:
        return None
    return FoundPattern(*best, transposable=axis < 2 and _both_ways(kept, *best))


def _both_ways(kept: Tensor, n: int, m: int) -> bool:
    whole = kept.dim() > 1 and not (kept.shape[0] % m or kept.shape[1] % m)
    return whole and bool(is_valid(kept, n, m, transposable=True))
