"""The projection onto a budget and the variance-reduced policy gradient, as plain functions."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.errors import SparsifierError

PARTS, ROUNDS = 16, 13  # an interval is cut into parts at once: 16**-13 of it is float64's end
TINY = 1e-20


def project(z: Tensor, budget: float | Tensor, costs: Tensor | None = None) -> Tensor:
    """Return the nearest s to z with 0 <= s <= 1 and ``sum(costs * s) <= budget``.

    ``s = clip(z - v * costs, 0, 1)``, v >= 0 the smallest that meets the budget, by cutting an
    interval in float64; nothing waits for the device. Zhou et al., "Efficient Neural Network
    Training via Forward and Backward Propagation Sparsification" (NeurIPS 2021), theorem 1, has
    equal costs.

    Args:
        z: floating, [n].
        budget: at least 0.
        costs: positive, [n]; None counts every unit as 1.

    Returns:
        [n], in z's dtype.

    Raises:
        SparsifierError: z is no vector, or the costs have another shape.
    """
    if z.dim() != 1 or (costs is not None and costs.shape != z.shape):
        shapes = tuple(z.shape), None if costs is None else tuple(costs.shape)
        raise SparsifierError(f"project: z and costs are {shapes}; pass vectors of one length")
    wide = z.double()
    cost = torch.ones_like(wide) if costs is None else costs.double()
    low, width = torch.zeros_like(wide[0]), (wide / cost).amax().clamp(min=0) * (1 + 1e-12)
    cuts = torch.linspace(0, 1, PARTS + 1, dtype=wide.dtype, device=wide.device)
    for _ in range(ROUNDS):
        tried = low + width * cuts  # [PARTS + 1]
        spent = ((wide - tried[:, None] * cost).clamp(0, 1) * cost).sum(1)
        first = (spent <= budget).to(torch.uint8).argmax()  # 0 only if nothing is to be taken off
        low, width = tried[(first - 1).clamp(min=0)], torch.where(first > 0, width / PARTS, 0)
    return (wide - (low + width) * cost).clamp(0, 1).to(z.dtype)


def policy_gradient(losses: Tensor, draws: Tensor, probabilities: Tensor) -> Tensor:
    """Return ``1/(K-1) sum_k (L_k - mean L) (m_k - s) / sqrt(s (1 - s))``.

    Its mean is ``sqrt(s (1 - s)) dE[L]/ds``: the gradient, scaled so that its variance stays
    bounded where s nears 0 or 1. For K = 2 it is
    ``(L_0 - L_1) (m_0 - m_1) / (2 sqrt(s (1 - s)))``. Zhou et al. (NeurIPS 2021), eq. 8.

    Args:
        losses: [K], K >= 2.
        draws: bool [K, n], independent, each entry 1 with its probability.
        probabilities: s, [n] in [0, 1]; where it is 0 or 1 the result is 0.

    Raises:
        SparsifierError: fewer than two draws, or shapes that don't match.
    """
    n = len(probabilities)
    if losses.dim() != 1 or len(losses) < 2 or draws.shape != (len(losses), n):
        raise SparsifierError(
            f"policy_gradient: losses {tuple(losses.shape)} and draws {tuple(draws.shape)} must be "
            f"[K] and [K, {n}] with K >= 2"
        )
    s = probabilities.double()
    scores = (draws.double() - s) / ((s + TINY) * (1 - s + TINY)).sqrt()
    centred = losses.double() - losses.double().mean()
    return (centred @ scores / (len(losses) - 1)).to(probabilities.dtype)


def adam(moments: Tensor, gradient: Tensor, count: int) -> Tensor:
    """Return Adam's direction (betas .9 and .999, eps 1e-8) and update its moments in place.

    Args:
        moments: [2, n], of first and second order.
        gradient: [n].
        count: steps, this one included.
    """
    moments[0].lerp_(gradient, 0.1)
    moments[1].lerp_(gradient.square(), 0.001)
    second = (moments[1] / (1 - 0.999**count)).sqrt()
    return moments[0] / (1 - 0.9**count) / (second + 1e-8)
