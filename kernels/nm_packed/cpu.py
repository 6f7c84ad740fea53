"""Launchers of nm_packed.cpp: what they decline goes to the reference."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.kernels import _native
from sparsefx.ops import REFERENCES
from sparsefx.ops import nm_pack as nm_pack_op
from sparsefx.ops import nm_packed_mm as nm_packed_mm_op
from sparsefx.ops import nm_unpack as nm_unpack_op
from sparsefx.ops.packed import code_bits, code_bytes

_SOURCE = Path(__file__).with_name("nm_packed.cpp")
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MOST_RANKED = 32  # m, of which nm_pack compares all pairs
# a batch of M is multiplied packed where n / m <= share + rows / M, else unpacked: README.md
_PACKED = {torch.float32: (0.65, 10), torch.bfloat16: (0.26, 11)}


def _declare(library: ctypes.CDLL) -> None:
    size, address, number = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
    weight = [address, address, size, size, size, number, number, number]
    for name in _NAMES.values():
        product = getattr(library, f"sparsefx_nm_{name}")
        product.argtypes = [address, size, *weight, address, address, number, number]
        product.restype = None
    for bits in (16, 32):
        pack = getattr(library, f"sparsefx_nm_pack_{bits}")
        pack.argtypes = [
            address,
            size,
            size,
            number,
            number,
            number,
            address,
            size,
            address,
            number,
        ]
        pack.restype = None
    _native.declare(library)
    for bits in (16, 32, 64):
        unpack = getattr(library, f"sparsefx_nm_unpack_{bits}")
        unpack.argtypes = [*weight, address, number]
        unpack.restype = None


def nm_packed_mm(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """x[M, K] @ unpacked.T + bias -> [M, R], of values [R, K/m*n] and their codes.

    The first call; then C++ serves few rows itself, and leaves the rest to :func:`multiply`.
    """
    op, args = nm_packed_mm_op, (x, values, codes, bias, n, m)
    found = _native.handed_over(_SOURCE, op, *args, types=_declare, left=multiply)
    return found  # type: ignore[no-any-return]


def multiply(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """The same, of any number of rows.

    float32 and bfloat16 run here where K is what the packed weight says; the rest is declined.
    """
    library = _native.library(_SOURCE, _declare)
    if library is None or not _multiplied(x, values, codes, bias, n, m):
        return REFERENCES[nm_packed_mm_op](x, values, codes, bias, n, m)
    few = x.shape[0] <= _few(n, m)
    share, more = _PACKED[x.dtype]
    if not few and n / m > share + more / x.shape[0]:
        return torch.nn.functional.linear(x, nm_unpack(values, codes, n, m, x.shape[1]), bias)
    x, values, codes = x.contiguous(), values.contiguous(), codes.contiguous()
    bias = bias if bias is None else bias.contiguous()
    out = x.new_empty(x.shape[0], values.shape[0])
    getattr(library, f"sparsefx_nm_{_NAMES[x.dtype]}")(
        x.data_ptr(), x.shape[0], *_weight(values, codes, n, m),
        None if bias is None else bias.data_ptr(), out.data_ptr(), few,
        _native.threads(values.numel()),
    )  # fmt: skip
    return out


def nm_pack(w: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """w[R, K] -> values [R, K/m*n] and codes [R, bytes], of float32 and bfloat16 and m up to 32."""
    library = _native.library(_SOURCE, _declare)
    ranked = w.dtype in _NAMES and 1 <= n < m <= _MOST_RANKED
    if library is None or not ranked or w.numel() == 0 or w.shape[1] % m:
        return REFERENCES[nm_pack_op](w, n, m)
    w, kept = w.contiguous(), w.shape[1] // m * n
    values = w.new_empty(w.shape[0], kept)
    codes = w.new_empty(w.shape[0], code_bytes(kept, m), dtype=torch.uint8)
    getattr(library, f"sparsefx_nm_pack_{8 * w.element_size()}")(
        w.data_ptr(), *w.shape, n, m, code_bits(m), values.data_ptr(), codes.shape[1],
        codes.data_ptr(), _native.threads(w.numel()),
    )  # fmt: skip
    return values, codes


def nm_unpack(values: Tensor, codes: Tensor, n: int, m: int, depth: int) -> Tensor:
    """-> [R, depth], zeros where nothing was kept."""
    library = _native.library(_SOURCE, _declare)
    movable = values.element_size() in (2, 4, 8) and not values.is_complex()
    if library is None or not movable or not _whole(values, codes, n, m, depth):
        return REFERENCES[nm_unpack_op](values, codes, n, m, depth)
    values, codes = values.contiguous(), codes.contiguous()
    out = values.new_empty(values.shape[0], depth)
    unpack = getattr(library, f"sparsefx_nm_unpack_{8 * values.element_size()}")
    unpack(*_weight(values, codes, n, m), out.data_ptr(), _native.threads(out.numel()))
    return out


def _few(n: int, m: int) -> int:
    """Rows of x up to which the weight is streamed: README.md."""
    span = m // n
    shuffled = span * n == m and span in (2, 4, 8) and 16 % n == 0 and (m <= 16 or span == 2)
    return 64 // span if shuffled else 4


def _multiplied(
    x: Tensor, values: Tensor, codes: Tensor, bias: Tensor | None, n: int, m: int
) -> bool:
    """Whether types and sizes are those that the C++ knows."""
    known = x.dtype == values.dtype and x.dtype in _NAMES
    same = bias is None or (bias.dtype == x.dtype and bias.shape == values.shape[:1])
    filled = 0 not in (*x.shape, *values.shape)
    return known and same and filled and _whole(values, codes, n, m, x.shape[1])


def _whole(values: Tensor, codes: Tensor, n: int, m: int, depth: int) -> bool:
    """Whether values, codes and depth belong together: C++ reads what these sizes promise."""
    (rows, kept), groups = values.shape, values.shape[1] // max(n, 1)
    sized = (groups * n, groups * m) == (kept, depth) and 1 <= n <= m <= 256
    return sized and codes.dtype == torch.uint8 and codes.shape == (rows, code_bytes(kept, m))


def _weight(values: Tensor, codes: Tensor, n: int, m: int) -> tuple[int, ...]:
    return (
        values.data_ptr(), codes.data_ptr(), *values.shape, codes.shape[1], n, m, code_bits(m),
    )  # fmt: skip
