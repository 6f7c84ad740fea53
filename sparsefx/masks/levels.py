"""Magnitudes that can be added up: finite, with infinity and NaN above every sum of the rest."""

import torch
from torch import Tensor

# |w| is scaled by a power of two, so exactly, that leaves room for what is built on top below.
_SCALE = 2.0**-48


def finite_levels(w: Tensor) -> Tensor:
    """Map |w| to float64 whose sums compare as they should even with inf and NaN among them.

    In each row an infinity weighs more than all finite entries together, and a NaN more than all
    infinities: totals compare by NaNs first, then infinities, then finite magnitudes.

    Args:
        w: floating [rows, entries], entries <= 4096.

    Returns:
        float64 [rows, entries].
    """
    level = w.abs().to(torch.float64) * _SCALE
    finite = torch.where(level.isfinite(), level, 0.0)
    total = finite.sum(1, keepdim=True)
    infinity = torch.where(total > 0, 2 * total, 1.0)
    nan = 2 * w.shape[1] * infinity
    return torch.where(level.isnan(), nan, torch.where(level.isinf(), infinity, finite))
