"""What surrounds a sampled product on CPU: memory that is walked once.

    take_columns(x, S)                x[:, S]
    scattered_mm(a, b, S, K, rest)    a @ b at the columns S of [M, K]; 0 or rest[M, 1] elsewhere
    sum_rows(x, squared)              the sum over rows of x or of x * x, [M, K] -> [K]

References of sampled ops are made of them where matrices are large; a graph keeps them as calls.
What Inductor writes instead fills memory with zeros before it puts values into it, and sums over
rows a cache line of each at a time: 2.4 ms for 2048 x 2048 in float32, against 0.3 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsefx.ops._define import define

LARGE = 1 << 19  # elements from which a call of its own beats what Inductor fuses


def background(values: Tensor, size: Any, dim: int, rest: Tensor | None) -> Tensor:
    """What values are put into: as they are but of ``size`` along ``dim``; zeros, or ``rest``."""
    shape = [*values.shape[:dim], size, *values.shape[dim + 1 :]]
    return values.new_zeros(shape) if rest is None else rest.expand(shape).contiguous()


def spread(
    values: Tensor, indices: Tensor, size: Any, dim: int, rest: Tensor | None = None
) -> Tensor:
    """``values`` at the indices along ``dim``, which are unique; zeros, or ``rest``, elsewhere."""
    out = background(values, size, dim, rest)
    # not index_copy: Inductor's takes half as long again, for indices that may be negative
    place = [1] * values.dim()
    place[dim] = -1
    return out.scatter(dim, indices.view(place).expand(values.shape), values)


def _large(x: Tensor, rows: Any, columns: Any) -> bool:
    """Whether a call pays: on CPU, where the size is large or will be known later."""
    known = isinstance(rows, int) and isinstance(columns, int)
    return x.device.type == "cpu" and not (known and rows * columns < LARGE)


def columns_of(x: Tensor, indices: Tensor) -> Tensor:
    """x[:, S] of a matrix that lies row by row in memory."""
    if _large(x, *x.shape):
        return take_columns(x, indices)  # type: ignore[no-any-return]
    return x.index_select(1, indices)


def product_at(
    a: Tensor, b: Tensor, indices: Tensor, size: Any, rest: Tensor | None = None
) -> Tensor:
    """A @ b at the unique columns S of [M, size]; zeros, or ``rest`` [M, 1], elsewhere."""
    if _large(a, a.shape[0], size):
        return scattered_mm(a, b, indices, size, rest)  # type: ignore[no-any-return]
    return spread(a @ b, indices, size, 1, rest)


def sum_over_rows(x: Tensor, squared: bool) -> Tensor | None:
    """What ``sum_rows`` gives, where that pays: x[M, K] of floats, row by row in memory."""
    fit = x.dtype in (torch.float32, torch.float64) and x.stride(0) >= x.stride(1)
    return sum_rows(x, squared) if fit and _large(x, *x.shape) else None


def _take_columns(x: Tensor, indices: Tensor) -> Tensor:
    return x.index_select(1, indices)


def _fake_take_columns(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], indices.shape[0]))


def _scattered_mm(
    a: Tensor, b: Tensor, indices: Tensor, size: int, rest: Tensor | None = None
) -> Tensor:
    return spread(a @ b, indices, size, 1, rest)


def _fake_scattered_mm(a: Tensor, b: Tensor, indices: Tensor, size: int, *_: Any) -> Tensor:
    return a.new_empty((a.shape[0], size))


def _scattered_mm_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]  # type: ignore[no-any-return]


def _sum_rows(x: Tensor, squared: bool) -> Tensor:
    return (x * x if squared else x).sum(0)


def _fake_sum_rows(x: Tensor, squared: bool) -> Tensor:
    return x.new_empty(x.shape[1])


sum_rows = define("sum_rows(Tensor x, bool squared) -> Tensor", _sum_rows, _fake_sum_rows)
take_columns = define(
    "take_columns(Tensor x, Tensor indices) -> Tensor", _take_columns, _fake_take_columns
)
scattered_mm = define(
    "scattered_mm(Tensor a, Tensor b, Tensor indices, SymInt size, Tensor? rest=None) -> Tensor",
    _scattered_mm,
    _fake_scattered_mm,
    _scattered_mm_flops,
)
