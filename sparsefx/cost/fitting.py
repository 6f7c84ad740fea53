"""Paces from measured times: least squares, none negative."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from sparsefx.cost.paces import Pace
from sparsefx.cost.work import Work
from sparsefx.errors import ConfigError

_DIFFERENCE = 3.0  # what an error in sparse - dense weighs, which decides, beside one in a time
_SORTED = 0.01  # microseconds: a sweep of narrow layers can't tell a sort from nothing


@dataclass(frozen=True)
class Sample:
    """A whole step, dense and sparse: what is done, and the microseconds that it took."""

    dense: Work
    sparse: Work
    dense_us: float
    sparse_us: float


@dataclass(frozen=True)
class Fit:
    """A pace, and the microseconds that any step takes beside it."""

    pace: Pace
    overhead: float

    def time(self, work: Work) -> float:
        """Microseconds of a whole step."""
        return float(self.pace.time(work)) + self.overhead


def fit(samples: Sequence[Sample]) -> Fit:
    """Fit a pace to steps of one kind of product on one device in one dtype.

    Errors count in proportion to the dense time, those of the difference 3 times.

    Raises:
        ConfigError: for fewer than 3 samples.
    """
    if len(samples) < 3:
        raise ConfigError(f"fit: {len(samples)} samples are too few, give at least 3")
    lines, times = [], []
    for one in samples:
        dense, sparse = _features(one.dense), _features(one.sparse)
        difference = [b - a for a, b in zip(dense, sparse, strict=True)]
        for features, time, weight in (
            (dense, one.dense_us, 1 / one.dense_us),
            (sparse, one.sparse_us, 1 / one.sparse_us),
            (difference, one.sparse_us - one.dense_us, _DIFFERENCE / one.dense_us),
        ):
            lines.append([weight * value for value in features])
            times.append(weight * time)
    table = torch.tensor(lines, dtype=torch.float64)
    flops, moved, ranked, calls, overhead = _nonnegative(table, torch.tensor(times).double())
    return Fit(Pace(flops, moved, max(ranked, _SORTED), calls), overhead)


def _features(work: Work) -> list[float]:
    flops, moved, ranked, calls = map(float, work)
    return [flops / 1e6, moved / 1e6, ranked, calls, 1.0]


def _nonnegative(table: Tensor, target: Tensor) -> list[float]:
    """Least squares with no negative coefficient: the best of those that drop some columns."""
    width = table.shape[1]
    best, least = [0.0] * width, float(target.square().sum())
    for count in range(1, width + 1):
        for kept in map(list, combinations(range(width), count)):
            found = torch.linalg.lstsq(table[:, kept], target[:, None], driver="gelsd").solution
            error = float((table[:, kept] @ found - target[:, None]).square().sum())
            if error < least and bool((found >= 0).all()):
                least = error
                best = [0.0] * width
                for place, value in zip(kept, found[:, 0].tolist(), strict=True):
                    best[place] = value
    return best
