"""Which pairs of a product are used: their scores, and what draws from them.

    mm_scores(x, w, scores)            norms of the pairs of x[*, M, K] @ w[*, K, N]
    conv_scores(x, w, axis, ...)       those of a convolution's channels or examples
    topk_indices, mass_indices         the largest
    systematic_indices, bernoulli_indices, with_replacement_indices      at random, with a scale

Indices are int64, ascending and unique; a scale of 0 marks a place that is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsefx.ops._define import define
from sparsefx.ops.sampled import _largest, _squares, _squares_across

ROWS = 32


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


def _combine(left, right, scores):
    if scores == "left":
        return left.sqrt()
    if scores == "right":
        return right.sqrt()
    return left.sqrt() * right.sqrt()


def _mm_scores(x, w, scores, centred=False, shared=False):
    if scores == "uniform":
        out = torch.ones(
            [*x.shape[:-2], x.shape[-1]], dtype=_wide(x.new_empty(())).dtype, device=x.device
        )
    else:
        if scores == "estimated":
            x, w = x[..., :ROWS, :], w[..., :ROWS]
        if centred:
            x, w = (
                _wide(x) - _wide(x).mean(-1, keepdim=True),
                _wide(w) - _wide(w).mean(-2, keepdim=True),
            )
        out = _combine(_squares_across(x, -2), _squares_across(w, -1), scores)
        if scores == "estimated":
            out = out + 0.1 * out.mean(-1, keepdim=True)
    if shared and out.dim() == 2:
        out = out.square().sum(0, keepdim=True).sqrt()
    return out


def _conv_scores(x, w, axis, groups, scores, centred=False):
    if axis == "batch":
        lx, rx = x.unsqueeze(0), w.unsqueeze(0)
        lx, rx = lx.flatten(2), rx.flatten(2)
    else:
        lx = x.unflatten(1, (groups, -1)).movedim((1, 2), (0, 1)).flatten(2)
        ww = w.unflatten(0, (groups, -1))
        rx = (ww.movedim(2, 1) if axis == "in" else ww).flatten(2)
    if scores == "uniform":
        return torch.ones(lx.shape[:2], dtype=_wide(x.new_empty(())).dtype, device=x.device)
    if scores == "estimated":
        lx, rx = lx[..., :ROWS], rx[..., :ROWS]
    lx, rx = _wide(lx), _wide(rx)
    if centred:
        lx, rx = lx - lx.mean(1, keepdim=True), rx - rx.mean(1, keepdim=True)
    out = _combine(_squares(lx, [-1]), _squares(rx, [-1]), scores)
    if scores == "estimated":
        out = out + 0.1 * out.mean(-1, keepdim=True)
    return out


def inclusion(scores, k):
    s = scores.double()
    bad = ~torch.isfinite(s)
    s = torch.where(bad.any(-1, keepdim=True), bad.double(), s)
    s = torch.where((s > 0).any(-1, keepdim=True), s, 1.0)
    s = s / s.amax(-1, keepdim=True).clamp_min(1e-300) if s.shape[-1] else s
    order = torch.sort(s, dim=-1, descending=True)[0]
    tails = order.flip(-1).cumsum(-1).flip(-1)
    t = torch.arange(s.shape[-1], device=s.device)
    free = (order * (k - t) <= tails) | (t >= k)
    clipped = (~free).sum(-1, keepdim=True)
    tail = torch.where(t >= clipped, order, 0.0).sum(-1, keepdim=True)
    c = torch.where(tail > 0, (k - clipped) / tail, 1e300)
    return torch.clamp(s * c, max=1.0)


def _scale(values, scores):
    return values.to(scores.dtype)


def _systematic(scores, noise, k):
    p = inclusion(scores, k)
    depth = p.shape[-1]
    total = p.cumsum(-1)
    j = torch.arange(k, device=p.device)
    at = torch.searchsorted(total, noise.double() + j, right=True)
    at = torch.cummax(at - j, -1)[0] + j if k else at
    at = torch.minimum(at, depth - k + j)
    chosen = p.gather(-1, at)
    return at, _scale(torch.where(chosen > 0, 1 / chosen, 0.0), scores)


def _fake_pair(scores, noise, k, size=None):
    shape = [*scores.shape[:-1], k if size is None else size]
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


def _bernoulli(scores, noise, k, size):
    p = inclusion(scores, k)
    keys = torch.where(p > 0, noise.double() / p, torch.inf)
    count = (keys < 1).sum(-1, keepdim=True)
    order = torch.sort(keys, dim=-1, stable=True)[1].narrow(-1, 0, size)
    at = torch.sort(order, dim=-1)[0]
    thin = torch.clamp(count / max(size, 1), min=1.0)
    used = keys.gather(-1, at) < 1
    return at, _scale(torch.where(used, thin / p.gather(-1, at), 0.0), scores)


def _with_replacement(scores, noise, k):
    s = inclusion(scores, 1) * 0 + scores.double()
    s = torch.where((s > 0).any(-1, keepdim=True), s, 1.0)
    p = s / s.sum(-1, keepdim=True)
    at = torch.searchsorted(p.cumsum(-1), noise.double(), right=True).clamp(max=p.shape[-1] - 1)
    counts = torch.zeros_like(p).scatter_add(-1, at, torch.ones_like(at, dtype=p.dtype))
    drawn = _largest((counts > 0).to(torch.int8), k)
    return drawn, _scale(counts.gather(-1, drawn) / (k * p.gather(-1, drawn)), scores)


def _mass(scores, k, least, mass):
    order = torch.sort(scores, dim=-1, descending=True, stable=True)[1]
    s = scores.gather(-1, order).double()
    before = s.cumsum(-1) - s
    rank = torch.arange(s.shape[-1], device=s.device)
    used = (before < mass * s.sum(-1, keepdim=True)) | (rank < least)
    full = torch.zeros_like(s).scatter(-1, order, used.double())
    at = torch.sort(order.narrow(-1, 0, k), dim=-1)[0]
    return at, _scale(full.gather(-1, at), scores)


def _fake_mm_scores(x, w, scores, centred=False, shared=False):
    lead = [1] if shared and x.dim() == 3 else x.shape[:-2]
    return x.new_empty([*lead, x.shape[-1]], dtype=_wide(x.new_empty(())).dtype)


mm_scores = define(
    "mm_scores(Tensor x, Tensor w, str scores, bool centred=False, bool shared=False) -> Tensor",
    _mm_scores,
    _fake_mm_scores,
)
conv_scores = define(
    "conv_scores(Tensor x, Tensor w, str axis, SymInt groups, str scores, bool centred=False) -> Tensor",
    _conv_scores,
    _conv_scores,
)
topk_indices = define(
    "topk_indices(Tensor scores, SymInt k) -> Tensor",
    _largest,
    lambda s, k: s.new_empty([*s.shape[:-1], k], dtype=torch.int64),
)
mass_indices = define(
    "mass_indices(Tensor scores, SymInt k, SymInt least, float mass) -> (Tensor, Tensor)",
    _mass,
    lambda s, k, least, mass: _fake_pair(s, None, k),
)
systematic_indices = define(
    "systematic_indices(Tensor scores, Tensor noise, SymInt k) -> (Tensor, Tensor)",
    _systematic,
    _fake_pair,
)
bernoulli_indices = define(
    "bernoulli_indices(Tensor scores, Tensor noise, SymInt k, SymInt size) -> (Tensor, Tensor)",
    _bernoulli,
    _fake_pair,
)
with_replacement_indices = define(
    "with_replacement_indices(Tensor scores, Tensor noise, SymInt k) -> (Tensor, Tensor)",
    _with_replacement,
    _fake_pair,
)
