"""Look at a mask: does it hold, and how much of the weight does it keep."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx.errors import MaskError
from sparsefx.masks.checks import (
    check_dim,
    check_mask,
    check_matrix,
    check_pattern,
    check_values,
    check_weight,
)
from sparsefx.masks.magnitudes import real_magnitudes
from sparsefx.masks.tiles import limits, sum_tiles


@dataclass(frozen=True)
class Verdict:
    """What is_valid found: true or false in a condition, and why when false.

    Attributes:
        ok: whether the mask holds.
        reason: the first group, row or column over the limit; "" when there is none.
    """

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        """Return ok."""
        return self.ok


def is_valid(
    mask: Tensor,
    n: int,
    m: int,
    dim: int = -1,
    transposable: bool = False,
    exact: bool = False,
) -> Verdict:
    """Check that no group of m holds more than n; anything but zero counts as kept.

    So a pruned weight can be asked as well as its mask. Fewer than n is legal unless ``exact``: a
    weight that is zero anyhow breaks nothing.

    Args:
        mask: any dtype and shape.
        n: the number kept, at most, of every m.
        m: the size of a group, or the side of a tile.
        dim: the dimension along which groups run; not looked at for transposable masks.
        transposable: check the rows (for W) and the columns (for its transpose) of all m x m tiles
            of dimensions 0 and 1, for each tap apart. Tiles that are cut off at the edge have the
            same limits.
        exact: ask for exactly n; of a tile that is cut off, for as many as the limits allow.

    Returns:
        True, or false with the first group over (or under) n. For transposable masks that is one of
        the first bad tile, row by row of tiles, which the reason names with its (i, j).

    Raises:
        MaskError: n, m, dim or the rank makes no sense, or the mask is on the meta device.
    """
    check_pattern(n, m)
    check_values(mask, "is_valid")
    if transposable:
        check_matrix(mask)
        return _check_tiles(mask != 0, n, m, exact)
    axis = check_dim(mask, dim)
    if mask.shape[axis] % m:
        size = f"size {mask.shape[axis]} along dim={dim}"
        return Verdict(False, f"{size} is not a multiple of m={m}")
    counts = torch.unflatten((mask != 0), axis, (mask.shape[axis] // m, m)).sum(axis + 1)
    bad = ((counts != n) if exact else (counts > n)).nonzero()
    return (
        Verdict(False, _broken(counts, bad[0].tolist(), n, m, axis)) if len(bad) else Verdict(True)
    )


def _broken(counts: Tensor, place: list[int], n: int, m: int, axis: int) -> str:
    """Name a group and what is wrong with it."""
    kept, start = int(counts[tuple(place)]), place[axis] * m
    where = ", ".join(
        f"{start}:{start + m}" if d == axis else str(at) for d, at in enumerate(place)
    )
    side = "over" if kept > n else "under"
    return f"[{where}] keeps {kept} of m={m} along dim={axis}, {side} n={n}"


def _check_tiles(kept: Tensor, n: int, m: int, exact: bool) -> Verdict:
    """Find the first bad tile; in it, a row before a column before too few in all."""
    in_rows, in_cols = sum_tiles(kept.int(), 1, m), sum_tiles(kept.int(), m, 1)
    rows = sum_tiles((in_rows > n).int(), m, 1) > 0  # [I, J, *taps]
    cols = sum_tiles((in_cols > n).int(), 1, m) > 0
    counts, most = sum_tiles(kept.int(), m, m), limits(kept, n, m)[2].expand(rows.shape)
    bad = (rows | cols | (counts < most) if exact else rows | cols).nonzero()
    if not len(bad):
        return Verdict(True)
    place = tuple(bad[0].tolist())
    tile = f"tile {place[:2]}"
    if rows[place]:
        group = _first_over(in_rows, place, n, m, 1)
        return Verdict(False, f"{group}: W breaks the pattern in {tile}")
    if cols[place]:
        group = _first_over(in_cols, place, n, m, 0)
        return Verdict(False, f"{group}: W^T breaks the pattern in {tile}")
    few = f"{tile} holds {int(counts[place])} of the {int(most[place])} that n={n} of m={m} allow"
    return Verdict(False, few)


def _first_over(counts: Tensor, place: tuple[int, ...], n: int, m: int, axis: int) -> str:
    """Name the first line of a tile that is over n; the lines run along axis."""
    start = place[1 - axis] * m
    index: list[Any] = list(place)
    index[1 - axis] = slice(start, start + m)
    found = list(place)
    found[1 - axis] = start + int((counts[tuple(index)] > n).nonzero()[0])
    return _broken(counts, found, n, m, axis)


def retained(w: Tensor, mask: Tensor) -> float:
    """Return the share of the total |w| that the mask keeps; 1.0 when there is nothing to lose.

    Args:
        w: any dtype that ``nm_mask`` takes, any shape. Its NaNs show in the result.
        mask: bool, the shape of w.

    Raises:
        MaskError: w's dtype has no magnitudes, shapes differ, mask isn't bool, or one is on the
            meta device.
    """
    check_weight(w)
    check_values(w, "retained")
    check_mask(w, mask)
    level = real_magnitudes(w)
    total = float(level.sum(dtype=torch.float64))
    return float(torch.where(mask, level, 0.0).sum(dtype=torch.float64)) / total if total else 1.0


def sad(mask_a: Tensor, mask_b: Tensor) -> int:
    """Return in how many places two masks differ.

    The sparse architecture divergence of Zhou et al. (arXiv 2102.04010), section 3.2: the L1
    distance of two masks of one weight, at two steps say.

    Args:
        mask_a: any dtype and shape; anything but zero counts as kept.
        mask_b: the same shape.

    Raises:
        MaskError: shapes or devices differ, or one is on the meta device.
    """
    if mask_a.shape != mask_b.shape or mask_a.device != mask_b.device:
        one, other = (f"{tuple(mask.shape)} on {mask.device}" for mask in (mask_a, mask_b))
        raise MaskError(
            f"masks of shape {one} and {other} can't be compared; pass two of one weight"
        )
    check_values(mask_a, "sad")
    return int(((mask_a != 0) ^ (mask_b != 0)).sum())


def density(mask: Tensor) -> float:
    """Return the share of entries that aren't zero; 1.0 for an empty tensor, which drops nothing.

    Raises:
        MaskError: the mask is on the meta device.
    """
    check_values(mask, "density")
    return int((mask != 0).sum()) / mask.numel() if mask.numel() else 1.0
