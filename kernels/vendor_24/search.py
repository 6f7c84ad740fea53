"""Which of a library's algorithms to run: the fastest of those that are right.

Some algorithms of cuSPARSELt give wrong results on some machines, now and then, and its own search
often misses the fastest one. So every id is held against a float64 product before it is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx import compat
from sparsefx.errors import SparsefxWarning
from sparsefx.kernels.vendor_24 import store
from sparsefx.ops.semi_structured import packed_cols

REPEATS = 3  # of a check: a race shows itself in one run and not in the next
CONFIRMED = 20  # the same, of the one that is chosen
CHECKED = 1024  # rows held against float64, evenly spread: a wrong tile is larger than their step
TIMED = 10  # runs between two events


class Key(NamedTuple):
    """What an algorithm is chosen for; rows are rounded up to a power of two."""

    library: str
    device: str  # name and capability
    dtype: str
    rows: int
    out: int
    depth: int
    bias: bool
    repeatable: bool  # under torch.use_deterministic_algorithms: the first right one, untimed


class Trial(NamedTuple):
    """A product of random numbers, and what its checked rows have to be within."""

    x: Tensor
    packed: Tensor
    bias: Tensor | None
    places: Tensor
    twin: Tensor  # float64
    bound: Tensor


def key_of(library: str, x: Tensor, out: int, bias: bool) -> Key:
    """Return the key of x [M, K] times a compressed weight [out, K]."""
    rows = 1 << max(4, (len(x) - 1).bit_length())
    dtype = "float16" if x.dtype == torch.float16 else "bfloat16"
    device = store.device_name(x.device)
    return Key(library, device, dtype, rows, out, x.shape[1], bias, _repeatable())


def _repeatable() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def algorithm(library: str, x: Tensor, out: int, bias: bool) -> int | None:
    """Return the id to run, None where none is right or none may be looked for now.

    The first product of a key looks for it, which takes some hundred products and waits for the
    device; later ones find it in memory, or in the user's cache.

    Args:
        library: "cusparselt" or "cutlass".
        x: [M, K], as it will be multiplied: M is a multiple of 16.
        out: rows of the weight.
        bias: whether there is one.
    """
    key = key_of(library, x, out, bias)
    found = store.get(key)
    if found is None:
        if compat.recording(x.device):
            return None
        found = _search(key, x)
    return None if found < 0 else found


def _search(key: Key, x: Tensor) -> int:
    """Look for an id and remember it; -1 where none is right, or memory is too short to say."""
    try:
        with torch.no_grad(), torch.cuda.device_of(x):
            found = best(key, [trial(key, rows, x) for rows in sorted({len(x), key.rows})])
        store.put(key, found)
    except torch.OutOfMemoryError as error:
        warnings.warn(
            f"sparsefx: no memory to check algorithms of {key.library} for a 2:4 product of "
            f"{key.rows} x {key.out} x {key.depth}, which runs as a masked dense one: {error}",
            SparsefxWarning,
            stacklevel=4,
        )
        found = -1
        store.note(key, found)  # the next process may have more
    return found


def best(key: Key, trials: list[Trial]) -> int:
    """Return the fastest id that is right in every trial, -1 if none is; the last one is timed."""
    took: dict[int, float] = {}
    for candidate in candidates(key, trials[-1]):
        if all(right(key.library, one, candidate) for one in trials):
            run = _product(key.library, trials[-1], candidate)
            took[candidate] = 0.0 if key.repeatable else milliseconds(run)
    for candidate in sorted(took, key=took.__getitem__):  # stable: of equals the first
        if right(key.library, trials[-1], candidate, CONFIRMED):
            return candidate
    return -1


def candidates(key: Key, last: Trial) -> list[int]:
    """Ids in the order in which they are tried: the library's own suggestion first."""
    if key.library != "cusparselt":
        return [0]
    ids = range(compat.semi_structured_algorithms())
    if key.repeatable:
        return list(ids)
    try:
        suggested = [compat.semi_structured_suggested(last.packed, last.x, last.bias)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it may stumble over an id that this device hasn't
        suggested = []
    return list(dict.fromkeys([*suggested, *ids]))


def right(library: str, one: Trial, candidate: int, repeats: int = REPEATS) -> bool:
    """Whether an id gives a trial's product, within rounding, and the same each time."""
    first: Tensor | None = None
    for _ in range(repeats):
        try:
            y = _product(library, one, candidate)()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what the library says to an id that it hasn't for this shape
            return False
        if first is not None and not torch.equal(y, first):
            return False
        first = y
        off = (y[one.places].double() - one.twin).abs()
        if not bool((off <= one.bound).all()):
            return False
    return True


def _product(library: str, one: Trial, candidate: int) -> Callable[[], Tensor]:
    return lambda: compat.semi_structured_mm(library, one.packed, one.x, one.bias, candidate)


def trial(key: Key, rows: int, like: Tensor) -> Trial:
    """Make a product of ``rows`` rows; the user's random numbers stay as they are."""
    draw = torch.Generator(like.device).manual_seed(rows)
    how = {"generator": draw, "device": like.device, "dtype": torch.float32}
    x = torch.randn(rows, key.depth, **how).to(like.dtype)
    w = torch.randn(key.out, key.depth // 4, 4, **how)
    order = torch.rand(w.shape, **how).argsort(-1)
    w = torch.where(order < 2, w, 0).reshape(key.out, key.depth).to(like.dtype)
    bias = torch.randn(key.out, **how).to(like.dtype) if key.bias else None
    step = max(1, rows // CHECKED)
    places = torch.arange(0, rows, step, device=like.device)
    places = (places + places // step % step).clamp(max=rows - 1)  # of every place in a tile
    return Trial(x, compressed(key, w), bias, places, *expected(x[places], w, bias))


def compressed(key: Key, w: Tensor) -> Tensor:
    """Compress a trial's weight."""
    packed = compat.semi_structured_compress(key.library, w)
    assert packed.shape[1] == packed_cols(key.depth), packed.shape
    return packed


def expected(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x @ w.T + bias in float64, and how far a right product may be from it.

    Rounding to the dtype is eps * |twin|; a float32 sum of K products in any order is off by at
    most (K + 2) * eps32 * (|x| @ |w| + |bias|). A bias that is added to a rounded sum rounds twice.
    """
    info, zero = torch.finfo(x.dtype), x.new_zeros(1)
    added = (zero if bias is None else bias).double()
    sums = x.double() @ w.double().t()
    size = x.double().abs() @ w.double().abs().t() + added.abs()
    twin = sums + added
    rounding = info.eps * (twin.abs() + (0 if bias is None else sums.abs())) + info.tiny
    return twin, rounding + (x.shape[1] + 2) * torch.finfo(torch.float32).eps * size


def milliseconds(run: Callable[[], Tensor]) -> float:
    """Time a call on the current stream, in a row of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(TIMED):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / TIMED
