"""How far approximations are from what they approximate: sums over draws, and figures from these.

Sums of several tensors add up, so that a model's figures follow from its parameters'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """Figures of what is approximate, g, against what is exact, e, over entries and draws.

    Attributes:
        norm: |e| (2-norm), the scale of the others.
        mean: of the entries of g - e, over all draws.
        std: of these entries.
        max: largest |g - e| of an entry.
        relative: root mean square over draws of |g - e| / |e|. Its square is the sum of the squares
            of bias and noise.
        cosine: mean over draws of the cosine between g and e.
        bias: |mean over draws of g, less e| / |e|; for an unbiased estimator it is about
            noise / sqrt(draws).
        noise: root mean square over draws of |g - mean g| / |e|; 0 where nothing is random.

    Relative to an exact 0, no difference is 0 and any other infinite.
    """

    norm: float
    mean: float
    std: float
    max: float
    relative: float
    cosine: float
    bias: float
    noise: float


@dataclass(frozen=True)
class Draw:
    """Sums over the entries of one draw's difference, and of the approximation itself."""

    total: float
    squares: float
    largest: float
    dot: float
    length: float


@dataclass(frozen=True)
class Sums:
    """All that figures need of one tensor, or of several together.

    Attributes:
        count: entries.
        exact: sum of squares of the exact entries.
        draws: sums of each draw.
        mean: sum of squares of the difference that is averaged over draws.
    """

    count: int
    exact: float
    draws: tuple[Draw, ...]
    mean: float

    def __add__(self, other: Sums) -> Sums:
        """Return the sums of both, which have equally many draws."""
        draws = [
            Draw(
                a.total + b.total,
                a.squares + b.squares,
                _larger(a.largest, b.largest),
                a.dot + b.dot,
                a.length + b.length,
            )
            for a, b in zip(self.draws, other.draws, strict=True)
        ]
        return Sums(
            self.count + other.count, self.exact + other.exact, tuple(draws), self.mean + other.mean
        )

    @property
    def squared(self) -> float:
        """Mean square norm of the difference over the squared norm of what is exact."""
        return _over(sum(d.squares for d in self.draws) / len(self.draws), self.exact)

    def error(self) -> Error:
        """Return the figures."""
        many = len(self.draws)
        entries = max(self.count, 1) * many
        squares = sum(draw.squares for draw in self.draws)
        mean = sum(draw.total for draw in self.draws) / entries
        spread = _positive(squares / many - self.mean) if many > 1 else 0.0
        return Error(
            norm=math.sqrt(self.exact),
            mean=mean,
            std=math.sqrt(_positive(squares / entries - mean * mean)),
            max=functools.reduce(_larger, (draw.largest for draw in self.draws)),
            relative=math.sqrt(self.squared),
            cosine=sum(_cosine(draw, self.exact) for draw in self.draws) / many,
            bias=math.sqrt(_over(self.mean, self.exact)),
            noise=math.sqrt(_over(spread, self.exact)),
        )


def _larger(a: float, b: float) -> float:
    return b if b > a or math.isnan(b) else a  # NaN shows itself


def _positive(number: float) -> float:
    return 0.0 if number < 0 else number  # NaN stays


def _over(part: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if part == 0 else math.nan if math.isnan(part) else math.inf
    return part / whole


def _cosine(draw: Draw, exact: float) -> float:
    if draw.squares == 0:
        return 1.0
    if draw.length == 0 or exact == 0:
        return 0.0
    found = draw.dot / math.sqrt(draw.length) / math.sqrt(exact)
    return found if math.isnan(found) else min(1.0, max(-1.0, found))


class Comparison:
    """Compares draws with one exact tensor; every sum is in float64."""

    def __init__(self, exact: Tensor) -> None:
        """Keep the exact tensor; nothing is copied."""
        self._exact = exact.detach()
        self._draws: list[Draw] = []
        self._sum: Tensor | None = None

    def add(self, approximate: Tensor) -> None:
        """Take in one draw, of the exact tensor's shape."""
        exact, found = _wide(self._exact), _wide(approximate)
        difference = found - exact
        largest = difference.abs().max() if difference.numel() else difference.sum()
        facts = [
            difference.sum(),
            difference.square().sum(),
            largest,
            (found * exact).sum(),
            found.square().sum(),
        ]
        self._draws.append(Draw(*torch.stack(facts).tolist()))
        self._sum = difference if self._sum is None else self._sum.add_(difference)

    def sums(self) -> Sums:
        """Return the sums over all draws so far, of which there is one at least."""
        assert self._sum is not None
        mean = float((self._sum / len(self._draws)).square().sum())
        exact = float(_wide(self._exact).square().sum())
        return Sums(self._exact.numel(), exact, tuple(self._draws), mean)


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return (torch.view_as_real(x) if x.is_complex() else x).double()


def together(parts: Sequence[Sums]) -> Sums:
    """Add up sums; there is one at least."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole
