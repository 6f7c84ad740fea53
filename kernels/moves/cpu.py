"""moves.cpp is built by the first call of an op, registers itself, and declines by itself."""

from pathlib import Path

from torch import Tensor

from sparsefx.kernels import _native
from sparsefx.ops import scattered_mm as scattered_mm_op
from sparsefx.ops import sum_rows as sum_rows_op
from sparsefx.ops import take_columns as take_columns_op

_SOURCE = Path(__file__).with_name("moves.cpp")


def take_columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[:, S], of x[M, K] -> [M, k].

    Raises:
        IndexError: an index is outside 0 .. K - 1.
    """
    return _native.handed_over(_SOURCE, take_columns_op, x, indices)  # type: ignore[no-any-return]


def scattered_mm(
    a: Tensor, b: Tensor, indices: Tensor, size: int, rest: Tensor | None = None
) -> Tensor:
    """A @ b, [M, J] @ [J, k], at the columns S of [M, size]; zeros, or ``rest`` [M, 1], elsewhere.

    Raises:
        IndexError: an index is outside 0 .. size - 1.
    """
    args = a, b, indices, size, rest
    return _native.handed_over(_SOURCE, scattered_mm_op, *args)  # type: ignore[no-any-return]


def sum_rows(x: Tensor, squared: bool) -> Tensor:
    """The sum over the rows of x[M, K], or of their squares, -> [K]."""
    return _native.handed_over(_SOURCE, sum_rows_op, x, squared)  # type: ignore[no-any-return]
