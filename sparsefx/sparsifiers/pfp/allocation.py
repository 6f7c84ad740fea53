"""How many channels each layer keeps: one error bound eps for all, found under a budget.

Liebenwein et al., "Provable Filter Pruning for Efficient Neural Networks" (ICLR 2020), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import SparsifierError

_K, _C = 3.0, 3.0  # constants of the published proof and code
_LOWEST, _HIGHEST = math.log(1e-120), math.log(1e120)


@dataclass(frozen=True)
class Allocation:
    """What one set of channels keeps.

    Args:
        eps: the bound on the relative error of every output that reads them.
        draws: how often it is drawn.
        kept: channels that are kept.
    """

    eps: float
    draws: int
    kept: int


@dataclass(frozen=True, eq=False)
class Demand:
    """A set of channels of which some are kept.

    Args:
        sensitivity: float64 [channels], on the CPU.
        outputs: (patches + 1) * taps, of the layer that has most.
    """

    sensitivity: Tensor
    outputs: int

    @property
    def probabilities(self) -> Tensor:
        """s_j / sum s, float64; all 0 where nothing was ever seen."""
        total = self.sensitivity.sum()
        return self.sensitivity / total if total > 0 else self.sensitivity

    def allocate(self, eps: float, delta: float) -> Allocation:
        """Return what an error bound asks for; at least one channel."""
        draws = sample_complexity(eps, float(self.sensitivity.sum()), self.outputs, delta)
        unique = expected_unique(self.probabilities, draws)
        kept = math.ceil(unique - 1e-9)  # not one more for rounding
        return Allocation(eps, draws, min(max(1, kept), len(self.sensitivity)))


def sample_complexity(eps: float, total: float, outputs: int, delta: float) -> int:
    """Return m(eps) = ceil(3 (6 + 2 eps) total * 2 * 3 ln(8 outputs / delta) / eps^2), at least 1.

    With so many draws of input channels, by probabilities s_j / total and reweighted, every output
    stays within relative error eps with a chance of 1 - delta.

    Args:
        eps: at least 1e-120.
        total: sum of the sensitivities.
        outputs: (patches + 1) * taps.
        delta: chance of failure.
    """
    bound = _K * (6 + 2 * eps) * total * 2 * _C * math.log(8 * outputs / delta) / eps**2
    return max(1, math.ceil(bound))


def expected_unique(p: Tensor, draws: float) -> float:
    """Return E[number of different channels] = sum of 1 - (1 - p_j)^draws.

    Args:
        p: probabilities, float64 [n].
        draws: with replacement.
    """
    return float(-torch.expm1(float(draws) * torch.log1p(-p.clamp(max=1))).sum())


def draws_for(p: Tensor, unique: float) -> float:
    """Return the number of draws, not rounded, that :func:`expected_unique` needs for ``unique``.

    Args:
        p: probabilities, float64 [n].
        unique: wanted; from the number of positive p on, the answer is infinite.
    """
    n = int(p.count_nonzero())
    if unique >= n:
        return math.inf
    low = math.log(n / (n - unique)) / -math.log1p(-1 / n) if n > 1 else 1.0  # Jensen: equal p
    high = max(low, 1e-9)
    while expected_unique(p, high) < unique and high < 1e300:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if expected_unique(p, middle) < unique else (low, middle)
    return high


def allocate(
    demands: Sequence[Demand], cost: Callable[[list[int]], float], budget: float, delta: float
) -> list[Allocation]:
    """Find the smallest eps, the same for all, whose channels cost no more than the budget.

    Args:
        demands: the sets of channels.
        cost: of keeping so many of each; it grows with every number.
        budget: of all together, in the unit of ``cost``.
        delta: chance that the bound fails.

    Raises:
        SparsifierError: even one channel of each costs more.
    """
    least = cost([1] * len(demands))
    if least > budget:
        raise SparsifierError(
            f"one channel for each layer takes {least:.4g} of the budget of {budget:.4g}: raise "
            "keep, or leave layers out with rules"
        )

    def at(exponent: float) -> list[Allocation]:
        return [demand.allocate(math.exp(exponent), delta) for demand in demands]

    low, high = _LOWEST, _HIGHEST
    if cost([one.kept for one in at(low)]) <= budget:
        return at(low)
    while high - low > 1e-9:
        middle = (low + high) / 2
        fits = cost([one.kept for one in at(middle)]) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return at(high)
