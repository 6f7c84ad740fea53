"""What |w| is for each dtype: as integers to rank by, and as floating numbers to add up."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATS8 = (
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
COMPLEX = (torch.complex128, torch.complex64, torch.complex32)
ALL = (*FLOATS, *FLOATS8, *SIGNED, *UNSIGNED, *COMPLEX)

# An integer as wide as the float, and the bits of the float's infinity.
BITS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
}
_WIDER = {torch.bool: torch.int8, torch.uint8: torch.int16, torch.uint16: torch.int32}
_LEAST = -(2**63)


def rank_keys(w: Tensor) -> Tensor:
    """Return integers that order as |w| does; every NaN has the same, the largest.

    Floats that are not negative order as their bits do. The most negative integer has no positive
    counterpart, so integers are ranked by -|w|, which all of them have, turned around.
    """
    if w.dtype in SIGNED:
        return torch.where(w > 0, -w, w).bitwise_not()
    if w.dtype == torch.uint64:
        return w.view(torch.int64) ^ _LEAST
    if w.dtype in UNSIGNED:
        return w.to(_WIDER.get(w.dtype, torch.int64))
    real = real_magnitudes(w)
    integer, infinity = BITS[real.dtype]
    return real.view(integer).clamp(max=infinity + 1)


def real_magnitudes(w: Tensor) -> Tensor:
    """Return |w| in one of FLOATS: exactly, but for integers above 2**53 and moduli.

    A complex number with a part that is NaN counts as NaN.
    """
    if w.dtype in FLOATS:
        return w.detach().abs()
    if w.dtype in FLOATS8:
        return w.detach().to(torch.float32).abs()
    if w.dtype in COMPLEX:
        wide = w.detach().to(torch.complex128)  # the modulus of finite complex64 stays finite
        return torch.where(wide.isnan(), torch.nan, wide.abs())
    if w.dtype == torch.uint64:  # torch has few operators for it
        high = (w.view(torch.int64) >> 32).bitwise_and(0xFFFFFFFF).to(torch.float64)
        return high * 2.0**32 + w.view(torch.int64).bitwise_and(0xFFFFFFFF).to(torch.float64)
    return w.to(torch.float64).abs()
