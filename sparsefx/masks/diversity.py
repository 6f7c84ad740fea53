"""Mask diversity: how many legal masks there are, after Hubara et al. (arXiv 2102.08124)."""

from collections import Counter
from dataclasses import dataclass
from math import comb, factorial, prod

from sparsefx.errors import MaskError
from sparsefx.masks.checks import check_pattern

LARGEST_TILE = 14  # 7:14 takes about 3 s


@dataclass(frozen=True)
class Diversity:
    """The number of masks, counted and as published.

    Attributes:
        exact: the count.
        formula: the paper's expression. The same for rows; for transposable masks it is larger,
            (m! (m-1)! .. (m-n+1)!) per tile: an upper estimate, equal only at n = 1.
    """

    exact: int
    formula: int

    def __str__(self) -> str:
        """Label both: "90 counted, 144 by the published formula"."""
        return f"{self.exact} counted, {self.formula} by the published formula"


def mask_diversity(
    n: int, m: int, transposable: bool = False, elements: int | None = None
) -> Diversity:
    """Count the N:M masks of so many weights.

    With the true count of transposable masks the paper's comparison at 64 weights turns around:
    4:8 transposable has 1.17e11, fewer than the 2.82e12 of row-wise 2:4, where its formula says
    1.76e13.

    Args:
        n: the number kept of every m.
        m: the size of a group or the side of a tile; at most 14 for transposable masks.
        transposable: count masks with n per row and column of each m x m tile.
        elements: the number of weights, a multiple of m (transposable: of m * m); one group or
            tile by default.

    Raises:
        MaskError: an argument is none of the above.
    """
    check_pattern(n, m)
    if transposable and m > LARGEST_TILE:
        raise MaskError(
            f"m={m} is too large to count tiles of: pass m <= {LARGEST_TILE} with transposable=True"
        )
    block = m * m if transposable else m
    elements = block if elements is None else elements
    if isinstance(elements, bool) or not isinstance(elements, int):
        raise MaskError(f"elements={elements!r} is of type {type(elements).__name__}; pass an int")
    if elements < 0 or elements % block:
        raise MaskError(f"elements={elements} is not a multiple of {block}, one block of m={m}")
    blocks = elements // block
    if not transposable:
        return Diversity(comb(m, n) ** blocks, comb(m, n) ** blocks)
    published = prod(factorial(m - i) for i in range(n))
    return Diversity(regular_tiles(n, m) ** blocks, published**blocks)


def regular_tiles(n: int, m: int) -> int:
    """Count the 0/1 matrices [m, m] whose rows and columns all sum to n.

    Row by row: all that matters of the rows above is how many columns still need how many ones.
    """
    n = min(n, m - n)  # the complement of a mask is one, too
    states = Counter({(0,) * n + (m,): 1})  # states[needs]: needs[i] columns still need i
    for _ in range(m):
        after: Counter[tuple[int, ...]] = Counter()
        for needs, ways in states.items():
            for then, choices in _rows(needs, n):
                after[then] += ways * choices
        states = after
    return states[(m,) + (0,) * n]


def _rows(needs: tuple[int, ...], n: int) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Place n ones in one row: what each way leaves, with the number of rows that do it."""
    partial: list[tuple[tuple[int, ...], int, int]] = [((), n, 1)]  # ones per need, left, rows
    for count in needs[1:]:
        partial = [
            ((*taken, k), left - k, rows * comb(count, k))
            for taken, left, rows in partial
            for k in range(min(count, left) + 1)
        ]
    return tuple(
        (
            tuple(
                count - (taken[i - 1] if i else 0) + (taken[i] if i < len(taken) else 0)
                for i, count in enumerate(needs)
            ),
            rows,
        )
        for taken, left, rows in partial
        if not left
    )
