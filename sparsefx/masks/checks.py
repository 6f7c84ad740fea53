"""What every mask function asks of its arguments, and what it says when they don't fit."""

import torch
from torch import Tensor

from sparsefx.errors import MaskError
from sparsefx.masks.magnitudes import ALL

LARGEST_GROUP = 64


def check_pattern(n: int, m: int) -> None:
    """Raise MaskError unless n and m are integers with 1 <= n < m <= 64."""
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise MaskError(
                f"{name}={value!r} is of type {type(value).__name__}; pass an int: "
                "n is the number kept of every m"
            )
    if n < 1:
        raise MaskError(f"n={n} keeps nothing of every m={m}; pass n >= 1 (n is the number KEPT)")
    if n >= m:
        raise MaskError(
            f"n={n} of every m={m} prunes nothing; pass n < m (n is the number KEPT of every m)"
        )
    if m > LARGEST_GROUP:
        raise MaskError(f"m={m} is too large; pass m <= {LARGEST_GROUP}")


def check_weight(w: Tensor) -> None:
    """Raise MaskError unless w is of a dtype that has magnitudes."""
    if w.dtype not in ALL:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in ALL)
        raise MaskError(
            f"a mask of a {w.dtype} tensor is not defined; convert it to one of {names} first"
        )


def check_dim(w: Tensor, dim: int) -> int:
    """Return dim counted from the front; raise MaskError when w has no such dimension."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise MaskError(f"dim={dim!r} is of type {type(dim).__name__}; pass an int")
    if w.dim() == 0:
        raise MaskError("a tensor of shape () has no dimension to group; pass rank 1 or more")
    if not -w.dim() <= dim < w.dim():
        raise MaskError(
            f"dim={dim} is not a dimension of shape {tuple(w.shape)}; "
            f"pass one from {-w.dim()} to {w.dim() - 1}"
        )
    return dim % w.dim()


def check_matrix(w: Tensor) -> None:
    """Raise MaskError unless w is a matrix, or a conv weight: tiles need dimensions 0 and 1."""
    if w.dim() < 2:
        raise MaskError(
            f"m x m tiles need dimensions 0 and 1, and shape {tuple(w.shape)} has {w.dim()}; "
            "pass a matrix [rows, cols] or a conv weight [out, in, *taps]"
        )


def check_values(w: Tensor, what: str) -> None:
    """Raise MaskError when w is on the meta device, so that it holds no values to look at."""
    if w.device.type == "meta":
        raise MaskError(
            f"{what} needs values, and a tensor of shape {tuple(w.shape)} on the meta device has "
            "none; move it to a real device first"
        )


def check_mask(w: Tensor, mask: Tensor) -> None:
    """Raise MaskError unless the mask is bool, of w's shape, and holds values."""
    if mask.dtype != torch.bool or mask.shape != w.shape:
        raise MaskError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; pass torch.bool of w's shape "
            f"{tuple(w.shape)}"
        )
    check_values(mask, "a mask")
