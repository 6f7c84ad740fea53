"""Which channels are kept, and how those that were drawn are reweighted."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.sparsifiers.pfp.allocation import Allocation, Demand, draws_for

VARIANTS = ("deterministic", "random", "hybrid")
_MOST_DRAWS = 1 << 50  # counts are exact in float64; beyond, every weight is 1 anyway


def select(
    demand: Demand, allocation: Allocation, variant: str, generator: torch.Generator
) -> Tensor:
    """Return the weight of every channel, float64 [channels]: 0 where it is dropped.

    Args:
        demand: sensitivities, not all of them 0 unless one channel suffices.
        allocation: how many are drawn and kept.
        variant: "deterministic": the largest, with weight 1. "random": those that are drawn,
            weighted count / (draws p), so that the layer's output is unbiased. "hybrid": those
            that are expected once or more with weight 1, and the rest drawn.
        generator: on the CPU.
    """
    p = demand.probabilities
    if variant == "deterministic" or not bool(p.any()):
        return largest(demand.sensitivity, allocation.kept)
    if variant == "random":
        return drawn(p, allocation.draws, generator)
    return _hybrid(demand, p, allocation.kept, generator)


def largest(s: Tensor, k: int) -> Tensor:
    """Return 1 for the k largest, of equals the earlier, and 0 for the rest."""
    order = torch.argsort(s, descending=True, stable=True)
    return torch.zeros_like(s).index_fill_(0, order[:k], 1)


def drawn(p: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return count / (draws p) for so many draws with replacement: 1 in the mean where p > 0."""
    draws = min(draws, _MOST_DRAWS)
    counts = multinomial(p, draws, generator)
    return torch.where(p > 0, counts / (draws * p.clamp(min=torch.finfo(p.dtype).tiny)), 0)


def multinomial(p: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return how often each of n things is drawn: exact for any number of draws, log n calls.

    Draws are split between two halves by a binomial, each half's between its halves, and so on.

    Args:
        p: not negative, float64 [n], with a positive sum.
        draws: with replacement.
        generator: on the CPU.
    """
    depth = max(0, len(p) - 1).bit_length()
    padded = torch.cat([p, p.new_zeros((1 << depth) - len(p))])
    counts = torch.full((1,), float(draws), dtype=torch.float64)
    for level in range(depth):
        halves = padded.view(2 << level, -1).sum(1).view(-1, 2)
        total = halves.sum(1)
        share = torch.where(total > 0, halves[:, 0] / total.clamp(min=1e-300), 0).clamp(max=1)
        left = torch.binomial(counts, share, generator=generator)
        left = torch.where(halves[:, 1] > 0, left, counts)  # all of it, not all but rounding
        counts = torch.stack([left, counts - left], 1).flatten()
    return counts[: len(p)]


def _hybrid(demand: Demand, p: Tensor, k: int, generator: torch.Generator) -> Tensor:
    sure = p * draws_for(p, k) >= 1
    wanted = k - int(sure.sum())
    rest = torch.where(sure, 0, p)
    if wanted <= 0 or not bool(rest.any()):
        return largest(demand.sensitivity, min(k, int(p.count_nonzero())))
    rest = rest / rest.sum()
    draws = draws_for(rest, min(wanted, int(rest.count_nonzero()) - 0.5))
    return sure.double() + drawn(rest, max(1, round(draws)), generator)
