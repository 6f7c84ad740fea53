"""How much each pair of a product matters: norms, of both sides or of one.

    mm_scores(x, w, scores)                 pairs of x[*, M, K] @ w[*, K, N] -> [*, K]
    conv_scores(x, w, axis, groups, ...)    channels or examples of a convolution -> [groups, K]

``scores`` is "left" |x_i|, "right" |w_i|, "product" of both, "estimated", or "uniform"; 2-norms in
at least float32, where those below 1e-22 count as 0 and those above 1e19 as infinite. ``centred``
takes norms of x_i - mean(x) and w_i - mean(w), means over the pairs.

"estimated" (Adelman et al., 2021, section 3) takes the product of norms over 32 rows and columns,
spread by the golden ratio: evenly, and out of step with any period such as a sequence's length. A
tenth of the mean is added, since a norm that is estimated as 0 may not be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.ops._define import define
from sparsefx.ops.moves import sum_over_rows

ROWS = 32
_GOLDEN = 0.6180339887498949


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


def _squares(x: Tensor, dims: Sequence[int]) -> Tensor:
    """Sum of squares over ``dims``; ``norm(dim=0)`` is 30 times slower on CPU."""
    x = wide(x)
    return torch.sum(x * x, list(dims))


def squares_across(x: Tensor, dim: int) -> Tensor:
    """Sum of squares over axis -2 or -1 of a matrix, or of each of a batch."""
    if x.stride(-1) > x.stride(-2):
        x, dim = x.transpose(-2, -1), -3 - dim
    found = sum_over_rows(x, True) if x.dim() == 2 and dim == -2 else None
    return _squares(x, [dim]) if found is None else found


def combined(left: Tensor, right: Tensor, scores: str) -> Tensor:
    """Squared norms whose order is that of the scores: roots are monotonic."""
    if scores == "left":
        return left
    return right if scores == "right" else left.sqrt() * right.sqrt()


def _norms(left: Tensor, right: Tensor, scores: str) -> Tensor:
    found = combined(left, right, scores)
    if scores in ("left", "right"):
        return found.sqrt()
    return found + 0.1 * found.mean(-1, keepdim=True) if scores == "estimated" else found


def _places(size: Any, device: torch.device) -> Tensor | None:
    """Where to look for an estimate: [32] places below ``size``; None is everywhere."""
    if isinstance(size, int) and size <= ROWS:
        return None
    count = torch.sym_min(size, ROWS)  # type: ignore[no-untyped-call]
    order = torch.arange(count, dtype=torch.float64, device=device)
    turns = order * _GOLDEN
    spread = (turns - turns.floor()) * size
    # a size not known yet may turn out to be small: then everywhere, without a branch
    places: Tensor = torch.where(torch.full_like(order, size) <= ROWS, order, spread)
    return places.to(torch.int64)


def _some(x: Tensor, dim: int) -> Tensor:
    places = _places(x.shape[dim], x.device)
    return x if places is None else x.index_select(dim, places)


# --- matrix products


def _mm_scores(
    x: Tensor, w: Tensor, scores: str, centred: bool = False, shared: bool = False
) -> Tensor:
    if scores == "uniform":
        found = _mm_ones(x)
    else:
        if scores == "estimated":
            x, w = _some(x, -2), _some(w, -1)
        if centred:
            x = wide(x) - wide(x).mean(-1, keepdim=True)
            w = wide(w) - wide(w).mean(-2, keepdim=True)
        found = _norms(squares_across(x, -2), squares_across(w, -1), scores)
    if shared and found.dim() == 2:
        found = found.square().sum(0, keepdim=True).sqrt()
    return found


def _mm_ones(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_ones((*x.shape[:-2], x.shape[-1]), dtype=dtype)


def _fake_mm_scores(
    x: Tensor, w: Tensor, scores: str, centred: bool = False, shared: bool = False
) -> Tensor:
    batch = [1] if shared and x.dim() == 3 else x.shape[:-2]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty([*batch, x.shape[-1]], dtype=dtype)


mm_scores = define(
    "mm_scores(Tensor x, Tensor w, str scores, bool centred=False, bool shared=False) -> Tensor",
    _mm_scores,
    _fake_mm_scores,
)

# --- convolutions


def conv_squares(
    x: Tensor, w: Tensor, axis: str, groups: int, centred: bool = False, estimated: bool = False
) -> tuple[Tensor, Tensor]:
    """Squared norms [groups, K] of the two sides.

    ``axis`` is what the product sums over: "in" (x, w), "out" (grad, w) or "batch" (x, grad).
    """
    if axis == "batch":
        if estimated:
            x, w = _somewhere(x, 0), _somewhere(w, 0)
        return _within(x.unsqueeze(0), 0, 1, centred), _within(w.unsqueeze(0), 0, 1, centred)
    if estimated:
        x = _somewhere(x, 1)
    filters = torch.unflatten(w, 0, (groups, -1))  # [groups, out, in, *taps]
    kept = 2 if axis == "in" else 1
    if estimated:
        filters = _some(filters, 3 - kept)
    left = _within(torch.unflatten(x, 1, (groups, -1)), 1, 2, centred)
    return left, _within(filters, 0, kept, centred)


def _somewhere(x: Tensor, kept: int) -> Tensor:
    """Look at 32 lines of [batch, channels, *spatial], across all of axis ``kept`` (0 or 1)."""
    across, height = x.shape[1 - kept], x.shape[2]
    places = _places(across * height, x.device)
    if places is None:
        return x
    other, line = places // height, places % height
    return x[other, :, line] if kept else x[:, other, line]


def _within(x: Tensor, group: int, kept: int, centred: bool) -> Tensor:
    """Squared norms over all axes but two, centred over the kept one within every group."""
    if centred:
        x = wide(x) - wide(x).mean(kept, keepdim=True)
    return _squares(x, [d for d in range(x.dim()) if d not in (group, kept)])


def _conv_scores(
    x: Tensor, w: Tensor, axis: str, groups: int, scores: str, centred: bool = False
) -> Tensor:
    if scores == "uniform":
        depth = {"in": w.shape[1], "out": w.shape[0] // groups, "batch": x.shape[0]}[axis]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_ones((groups, depth), dtype=dtype)
    return _norms(*conv_squares(x, w, axis, groups, centred, scores == "estimated"), scores)


conv_scores = define(
    "conv_scores(Tensor x, Tensor w, str axis, SymInt groups, str scores, bool centred=False) "
    "-> Tensor",
    _conv_scores,
    _conv_scores,
)
