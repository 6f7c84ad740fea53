"""Which pairs of a product are used: S, and what scales it (Adelman et al., NeurIPS 2021).

    topk_mm_indices(x, w, k, scores)                the k largest, unscaled; of equals the earlier
    topk_conv_indices(x, w, k, axis, groups, scores)
    topk_indices(scores, k)                         the same from scores
    mass_indices(scores, k, least, mass)            the fewest that hold a share; the others scale 0
    systematic_indices(scores, noise[*, 1], k)                  exactly k
    bernoulli_indices(scores, noise[*, K], k, size)             each on its own
    with_replacement_indices(scores, noise[*, k], k)            k draws, merged

Scores are [*, K]; indices int64 [*, k], ascending and unique, so that gathers read forwards; a
scale is 0 at a place that is not used. Noise is uniform in [0, 1): given it, all of these are
functions. Sizes are fixed and nothing branches on values. A pair whose score is not finite is
taken, so that it shows itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsefx.ops._define import define
from sparsefx.ops.scores import combined, conv_squares, squares_across

Pair = tuple[Tensor, Tensor]

# --- the largest


def _largest(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, ascending; of equals the earlier."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True)[1]
    return torch.sort(order.narrow(-1, 0, k), dim=-1)[0]


def _fake_indices(scores: Tensor, k: int) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], k), dtype=torch.int64)


def _topk_mm(x: Tensor, w: Tensor, k: int, scores: str) -> Tensor:
    return _largest(combined(squares_across(x, -2), squares_across(w, -1), scores), k)


def _fake_topk_mm(x: Tensor, w: Tensor, k: int, scores: str) -> Tensor:
    return x.new_empty((*x.shape[:-2], k), dtype=torch.int64)


def _topk_conv(x: Tensor, w: Tensor, k: int, axis: str, groups: int, scores: str) -> Tensor:
    return _largest(combined(*conv_squares(x, w, axis, groups), scores), k)


def _fake_topk_conv(x: Tensor, w: Tensor, k: int, axis: str, groups: int, scores: str) -> Tensor:
    return x.new_empty((1 if axis == "batch" else groups, k), dtype=torch.int64)


def _mass(scores: Tensor, k: int, least: int, mass: float) -> Pair:
    falling, order = torch.sort(scores, dim=-1, descending=True, stable=True)
    total = falling.double().cumsum(-1)
    before = torch.nn.functional.pad(total, (1, 0)).narrow(-1, 0, scores.shape[-1])
    rank = torch.arange(scores.shape[-1], device=scores.device)
    used = (before < mass * total.narrow(-1, -1, 1)) if scores.shape[-1] else before.bool()
    used = used | (rank < least) | ~torch.isfinite(falling)
    scale = torch.zeros_like(scores).scatter(-1, order, used.to(scores.dtype))
    indices = torch.sort(order.narrow(-1, 0, k), dim=-1)[0]
    return indices, scale.gather(-1, indices)


# --- at random


def _shares(scores: Tensor) -> Tensor:
    """Scores over the largest, in float64: sums neither overflow nor vanish.

    Where some are not finite, these are all alike and the others 0.
    """
    s = scores.double()
    wild = ~torch.isfinite(s)
    s = torch.where(wild.any(-1, keepdim=True), wild.double(), s)
    return torch.where(s > 0, s / s.amax(-1, keepdim=True), 0.0) if s.shape[-1] else s


def inclusion(scores: Tensor, k: int) -> Tensor:
    """Probabilities min(1, c * score) that sum to k: [*, K], float64.

    Water-filling: with scores falling, the first t of them are certain for the smallest t at which
    s_t * (k - t) <= sum of s from t on. Where fewer than k scores are not 0, the others share the
    remaining places evenly: their products are 0, whatever scales them.
    """
    s = _shares(scores)
    falling = torch.sort(s, dim=-1, descending=True)[0]
    tail = falling.flip(-1).cumsum(-1).flip(-1)  # sums of what is not larger
    t = torch.arange(s.shape[-1], device=s.device)
    certain = (falling * (k - t) > tail) & (t < k)
    count = certain.sum(-1, keepdim=True)
    rest = torch.where(t < count, 0.0, falling).sum(-1, keepdim=True)
    p = torch.where(rest > 0, s * ((k - count) / rest), torch.where(s > 0, 1.0, 0.0)).clamp(max=1.0)
    none = p == 0
    spare = (k - p.sum(-1, keepdim=True)) / none.sum(-1, keepdim=True)
    spare = torch.where(spare > 1e-9, spare, 0.0)  # the sum is k up to rounding
    return torch.where(none, spare.clamp(max=1.0), p)


def _inverse(p: Tensor) -> Tensor:
    return torch.where(p > 0, 1 / p, 0.0)


def _systematic(scores: Tensor, noise: Tensor, k: int) -> Pair:
    """Points u, u + 1, ... on the line on which every pair takes its probability's length."""
    p = inclusion(scores, k)
    j = torch.arange(k, device=p.device)
    ends = p.cumsum(-1)
    points = (noise.double() + j) * (ends.narrow(-1, -1, 1) / k if k else 1.0)  # below the last end
    found = torch.searchsorted(ends, points, right=True)
    if k:  # rounding must neither repeat a pair nor leave the line
        found = torch.cummax(found - j, -1)[0] + j
        found = torch.minimum(found, p.shape[-1] - k + j)
    return found, _inverse(p.gather(-1, found)).to(scores.dtype)


def _bernoulli(scores: Tensor, noise: Tensor, k: int, size: int) -> Pair:
    """A pair is drawn where u / p < 1; given that, u / p is uniform: it thins out what overflows.

    With more than ``size`` drawn, the ``size`` smallest u / p stay and are scaled by count / size:
    a uniform subset of what was drawn, so that all is exactly unbiased.
    """
    p = inclusion(scores, k)
    keys = torch.where(p > 0, noise.double() / p, torch.inf)
    count = (keys < 1).sum(-1, keepdim=True)
    indices = _largest(-keys, size)
    room: Any = torch.sym_max(size, 1)  # type: ignore[no-untyped-call]
    thinned = (count / room).clamp(min=1.0)
    scale = thinned * _inverse(p.gather(-1, indices))
    return indices, torch.where(keys.gather(-1, indices) < 1, scale, 0.0).to(scores.dtype)


def _with_replacement(scores: Tensor, noise: Tensor, k: int) -> Pair:
    s = _shares(scores)
    s = torch.where((s > 0).any(-1, keepdim=True), s, 1.0)
    ends = s.cumsum(-1)
    total = ends.narrow(-1, -1, 1) if scores.shape[-1] else ends.sum(-1, keepdim=True)
    drawn = torch.searchsorted(ends, noise.double() * total, right=True)
    counts = torch.zeros_like(s).scatter_add(-1, drawn, torch.ones_like(drawn, dtype=s.dtype))
    indices = _largest((counts > 0).to(torch.uint8), k)
    share = (s / total).gather(-1, indices) * k
    return indices, (counts.gather(-1, indices) * _inverse(share)).to(scores.dtype)


def _fake_pair(scores: Tensor, k: int) -> Pair:
    return _fake_indices(scores, k), scores.new_empty((*scores.shape[:-1], k))


topk_mm_indices = define(
    "topk_mm_indices(Tensor x, Tensor w, SymInt k, str scores) -> Tensor", _topk_mm, _fake_topk_mm
)
topk_conv_indices = define(
    "topk_conv_indices(Tensor x, Tensor w, SymInt k, str axis, SymInt groups, str scores) "
    "-> Tensor",
    _topk_conv,
    _fake_topk_conv,
)
topk_indices = define("topk_indices(Tensor scores, SymInt k) -> Tensor", _largest, _fake_indices)
mass_indices = define(
    "mass_indices(Tensor scores, SymInt k, SymInt least, float mass) -> (Tensor, Tensor)",
    _mass,
    lambda scores, k, least, mass: _fake_pair(scores, k),
)
systematic_indices = define(
    "systematic_indices(Tensor scores, Tensor noise, SymInt k) -> (Tensor, Tensor)",
    _systematic,
    lambda scores, noise, k: _fake_pair(scores, k),
)
bernoulli_indices = define(
    "bernoulli_indices(Tensor scores, Tensor noise, SymInt k, SymInt size) -> (Tensor, Tensor)",
    _bernoulli,
    lambda scores, noise, k, size: _fake_pair(scores, size),
)
with_replacement_indices = define(
    "with_replacement_indices(Tensor scores, Tensor noise, SymInt k) -> (Tensor, Tensor)",
    _with_replacement,
    lambda scores, noise, k: _fake_pair(scores, k),
)
