"""Which convolutions the kernels serve, and how large and in which layout their results are.

``where`` is (stride, padding, dilation, groups), each of the first three of two axes; sizes are
[batch, channels, high, wide], and w is [out, in / groups, KH, KW].
"""

from collections.abc import Sequence
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor

from sparsefx import compat
from sparsefx.kernels import _tiles

GRID = 65535  # programs along the second and third axis of a CUDA grid
_LAYOUTS: dict[Any, torch.memory_format] = {}

Ints = Sequence[int]
Where = tuple[Ints, Ints, Ints, int]


def plain(where: Where) -> bool:
    """Whether it has two axes, and numbers that a convolution can have."""
    stride, padding, dilation, groups = where
    two = len(stride) == len(padding) == len(dilation) == 2
    least = two and min(*stride, *dilation) >= 1 and min(padding) >= 0
    return least and 1 <= groups <= GRID and prod(stride) <= GRID


def result_size(image: Ints, w: Ints, where: Where) -> list[int]:
    """Size of the result; of what isn't plain, or has other than two axes, an empty list."""
    if not plain(where) or len(image) != 4 or len(w) != 4:
        return []
    sides = zip(image[2:], w[2:], *where[:3], strict=True)
    over = [(size + 2 * p - d * (taps - 1) - 1) // s + 1 for size, taps, s, p, d in sides]
    return [image[0], w[0], *over]


def served(image: Ints, w: Ints, result: Ints, where: Where) -> bool:
    """Whether the sizes agree and nothing is empty; filters of one channel aren't served.

    Args:
        image: Size of the convolution's input.
        w: Size of its weight.
        result: Size of its result.
        where: Its geometry.
    """
    if not result or list(result) != result_size(image, w, where):
        return False
    groups = where[3]
    agree = image[1] == w[1] * groups and w[0] % groups == 0
    return agree and w[0] <= GRID and w[1] > 1 and min(*image, *w, *result) >= 1


def adds_up(out: int, bias: Tensor | None, *operands: Tensor) -> bool:
    """Whether the operands' dtype is one, and one that the kernels sum; bias [out] or None."""
    if bias is not None and tuple(bias.shape) != (out,):
        return False
    dtypes = {o.dtype for o in (*operands, bias) if o is not None}
    return len(dtypes) == 1 and dtypes <= set(_tiles.DTYPES)


def spare(image: Ints, w: Ints, result: Ints, where: Where) -> list[int]:
    """Rows and columns of an image that no window reaches: a turned convolution's extra output."""
    sides = zip(image[2:], result[2:], w[2:], *where[:3], strict=True)
    return [
        size - ((out - 1) * s - 2 * p + d * (taps - 1) + 1) for size, out, taps, s, p, d in sides
    ]


def layout(key: Any, x: Tensor, acting: Any, turned: bool, extra: Ints, where: Where) -> Any:
    """Layout of a result by the library, asked for once for each shape.

    Args:
        key: What the acting weight's layout follows from.
        x: Left operand.
        acting: Makes the acting weight.
        turned: Whether it's the gradient by the input.
        extra: From ``spare``.
        where: Geometry.
    """
    stride, padding, dilation, groups = where
    how = *map(tuple, (stride, padding, dilation, extra)), groups, turned
    on = torch.backends.cudnn.enabled
    full = key, x.device, x.dtype, x.shape, x.stride(), how, on
    if full not in _LAYOUTS:
        if len(_LAYOUTS) >= 1 << 12:  # sizes that change at every call
            _LAYOUTS.clear()
        rest = None, stride, padding, dilation, turned, extra, groups
        _LAYOUTS[full] = compat.convolution_format(x, acting(), *rest)
    return _LAYOUTS[full]


def new(x: Tensor, size: Ints, memory: torch.memory_format) -> Tensor:
    """Fresh memory [batch, channels, high, wide] in x's dtype."""
    batch, channels, high, wide = size
    if memory is torch.channels_last:
        return x.new_empty(batch, high, wide, channels).permute(0, 3, 1, 2)
    return x.new_empty(batch, channels, high, wide)


def filter_strides(w: Tensor | None, groups: int, back: bool) -> tuple[int, ...]:
    """Strides of a weight's groups, reduction, columns and taps."""
    if w is None:
        return 0, 0, 0, 0, 0
    out, inner, *taps = w.stride()
    return w.shape[0] // groups * out, *((out, inner) if back else (inner, out)), *taps


def constants(w: Ints, where: Where, steps: Ints) -> dict[str, int]:
    """What a kernel is compiled for: taps, geometry, and how far apart the taps of a row lie."""
    (sh, sw), (ph, pw), (dh, dw), _ = where
    jump = [step // gcd(step, gap) for step, gap in zip(steps, (dh, dw), strict=True)]
    values = *w[2:], sh, sw, ph, pw, dh, dw, *jump
    names = "KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW", "JH", "JW"
    return dict(zip(names, values, strict=True))
