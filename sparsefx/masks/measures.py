"""Look at a mask: does it hold, and how much of the weight does it keep."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import MaskError
from sparsefx.masks.checks import check_dim, check_matrix, check_pattern, check_values, check_weight


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


def is_valid(mask: Tensor, n: int, m: int, dim: int = -1, transposable: bool = False) -> Verdict:
    """Check that no group of m holds more than n; anything but zero counts as kept.

    So a pruned weight can be asked as well as its mask. Fewer than n is legal: a weight that is
    zero anyhow breaks nothing.

    Args:
        mask: any dtype and shape.
        n: the number kept, at most, of every m.
        m: the size of a group, or the side of a tile.
        dim: the dimension along which groups run; not looked at for transposable masks.
        transposable: check the rows and columns of all m x m tiles of dimensions 0 and 1, for each
            tap apart. Tiles that are cut off at the edge have the same limits.

    Raises:
        MaskError: n, m, dim or the rank makes no sense, or the mask is on the meta device.
    """
    check_pattern(n, m)
    check_values(mask, "is_valid")
    if not transposable:
        axis = check_dim(mask, dim)
        if mask.shape[axis] % m:
            size = f"size {mask.shape[axis]} along dim={dim}"
            return Verdict(False, f"{size} is not a multiple of m={m}")
        return _check_groups(mask != 0, n, m, axis)
    check_matrix(mask)
    across, down = (_check_groups(_pad(mask != 0, m, dim), n, m, dim) for dim in (1, 0))
    return across and down


def _pad(mask: Tensor, m: int, dim: int) -> Tensor:
    """Extend mask with False along dim to a multiple of m."""
    shape = list(mask.shape)
    shape[dim] = -shape[dim] % m
    return torch.cat([mask, mask.new_zeros(shape)], dim)


def _check_groups(mask: Tensor, n: int, m: int, axis: int) -> Verdict:
    counts = torch.unflatten(mask, axis, (-1, m)).sum(axis + 1)
    over = (counts > n).nonzero()
    if not len(over):
        return Verdict(True)
    place = over[0].tolist()
    kept = int(counts[tuple(place)])
    start = place[axis] * m
    where = ", ".join(
        f"{start}:{start + m}" if d == axis else str(at) for d, at in enumerate(place)
    )
    return Verdict(False, f"[{where}] keeps {kept} of m={m} along dim={axis}, over n={n}")


def retained(w: Tensor, mask: Tensor) -> float:
    """Return the share of the total |w| that the mask keeps; 1.0 when there is nothing to lose.

    Args:
        w: floating, any shape. Its NaNs show in the result.
        mask: bool, the shape of w.

    Raises:
        MaskError: w isn't floating, shapes differ, mask isn't bool, or one is on the meta device.
    """
    check_weight(w)
    check_values(w, "retained")
    check_values(mask, "retained")
    if mask.dtype != torch.bool or mask.shape != w.shape:
        raise MaskError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; pass torch.bool of w's shape "
            f"{tuple(w.shape)}"
        )
    level = w.detach().abs()
    total = float(level.sum(dtype=torch.float64))
    return float(torch.where(mask, level, 0.0).sum(dtype=torch.float64)) / total if total else 1.0


def density(mask: Tensor) -> float:
    """Return the share of entries that aren't zero; 1.0 for an empty tensor, which drops nothing.

    Raises:
        MaskError: the mask is on the meta device.
    """
    check_values(mask, "density")
    return int(mask.count_nonzero()) / mask.numel() if mask.numel() else 1.0
