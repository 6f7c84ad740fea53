"""Magnitudes that can be added up: finite, with infinity and NaN above every sum of the rest.

    infinity = 2**room       of the tile's scale,  2**room > entries
    NaN      = 2**(2 * room)                       the scale: the power of two above each finite |w|

So infinity weighs more than all finite entries together, and a NaN more than all infinities: totals
compare by NaNs first, then infinities, then finite magnitudes.
"""

import torch
from torch import Tensor

BITS = 46  # a path through 64 rows and 64 columns stays below 2**(46 + 7) = 2**53
_BIAS = 1023  # of float64's exponent
# Room for NaN above the largest float64. Exact, but below 1e-290 bits are lost.
_DOWN = 2.0**-48


def finite_levels(w: Tensor) -> Tensor:
    """Map |w| to float64 whose sums compare as they should, in units of 2**48.

    Args:
        w: floating [tiles, entries], entries <= 4096.

    Returns:
        float64 [tiles, entries].
    """
    level = w.abs().to(torch.float64)
    top, room = _exponent(level), int(w.shape[1]).bit_length()
    scale = _power_of_two(top.clamp(min=-900) - 48)
    level = torch.where(level.isinf(), scale * 2.0**room, level * _DOWN)
    return torch.where(level.isnan(), scale * 4.0**room, level)


def integer_levels(w: Tensor) -> tuple[Tensor, Tensor]:
    """Map |w| to integers up to 2**46 in float64, whose sums are exact in any order.

    The scale of a tile becomes 2**46, less what infinity or NaN need above it: so magnitudes are
    rounded to 2**-46 of the largest, and nothing is when all of them lie within that range, as
    float32 within a factor of 2**22 does.

    Args:
        w: floating [tiles, entries], entries <= 4096.

    Returns:
        float64 [tiles, entries], and what 1 stands for, float64 [tiles, 1].
    """
    level = w.abs().to(torch.float64)
    top, room = _exponent(level), int(w.shape[1]).bit_length()
    infinite, nan = level.isinf(), level.isnan()
    above = torch.where(nan.any(1, True), 2 * room, torch.where(infinite.any(1, True), room, 0))
    finite = BITS - above
    half = torch.div(finite - top, 2, rounding_mode="floor")  # in two steps: 2**1068 overflows
    rest = finite - top - half
    level = (level * _power_of_two(half) * _power_of_two(rest)).round()
    level = torch.where(infinite, _power_of_two(finite + room), level)
    level = torch.where(nan, _power_of_two(finite + 2 * room), level)
    return level, _power_of_two(-half) * _power_of_two(-rest)


def _exponent(level: Tensor) -> Tensor:
    """Return int64 [tiles, 1], the least e with 2**e above each finite level (at least -1022)."""
    finite = torch.where(level.isfinite(), level, 0.0)
    return (finite.amax(1, keepdim=True).view(torch.int64) >> 52) - (_BIAS - 1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2.0**exponent exactly, for -1022 <= exponent <= 1023."""
    return ((exponent + _BIAS) << 52).view(torch.float64)
