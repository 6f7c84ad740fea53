"""What a product can become: the patterns of a rule. Frozen, checked when built, plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsefx import checks
from sparsefx.errors import ConfigError
from sparsefx.schedules import RatioSchedule

MAX_M = 32


@dataclass(frozen=True)
class Dense:
    """The full product of the unmodified operands: a pattern like any other."""

    def __str__(self) -> str:
        """Return the short form that reports show."""
        return "dense"


@dataclass(frozen=True)
class NM:
    """Of every ``m`` consecutive weights along the reduction axis, the ``n`` largest |w| act.

    ``n`` is the number KEPT (some papers count the zeros). The mask follows the current weight at
    every forward; of equal magnitudes the earlier is kept.

    Args:
        n: weights kept per group, ``1 <= n < m``.
        m: group size, ``2 <= m <= 32``.
        transposable: at most ``n`` per row AND per column of every ``m x m`` tile, so that the
            same mask is N:M for the forward and for grad_input (Hubara et al., NeurIPS 2021).
        weight_grad: ``"dense"`` is the straight-through gradient, reaching every weight;
            ``"masked"`` zeroes it outside the mask.
        decay: lambda of SR-STE (Zhou et al., ICLR 2021, eq. 9): adds ``decay * (1 - mask) * w`` to
            the weight's gradient; 2e-4 in the paper.

    Raises:
        ConfigError: for values outside these ranges.
    """

    n: int
    m: int
    transposable: bool = False
    weight_grad: str = "dense"
    decay: float = 0.0

    def __post_init__(self) -> None:
        """Check every value."""
        checks.integer("NM", "n", self.n)
        checks.integer("NM", "m", self.m)
        if not 2 <= self.m <= MAX_M:
            raise ConfigError(f"NM: m={self.m} must be between 2 and {MAX_M}")
        if not 1 <= self.n < self.m:
            raise ConfigError(
                f"NM: n={self.n} must be between 1 and m-1={self.m - 1} (n is the number KEPT)"
            )
        checks.flag("NM", "transposable", self.transposable)
        checks.one_of("NM", "weight_grad", self.weight_grad, ("dense", "masked"))
        if checks.number("NM", "decay", self.decay) < 0:
            raise ConfigError(f"NM: decay={self.decay!r} must be >= 0")
        object.__setattr__(self, "decay", float(self.decay))

    def __str__(self) -> str:
        """Return the short form that reports show."""
        return f"{self.n}:{self.m}" + (" transposable" if self.transposable else "")


ESTIMATORS = ("topk", "topk_mean", "systematic", "bernoulli", "with_replacement")
SCORES = ("product", "weight", "input", "estimated", "uniform")


@dataclass(frozen=True)
class Sampled:
    """Column-row sampling: ``x[M, K] @ w[K, N] ~= x[:, S] @ w[S, :]`` (Adelman et al., 2021).

    ``k = min(K, max(min_k, int(ratio * K)))`` pairs are used; ``k == K`` is exactly dense.

    An unbiased estimator scales what it draws by the inverse of its inclusion probability. Use it
    for gradients: in a forward, noise through nonlinearities trains badly, and top-k is better.

    Args:
        ratio: share of the reduction axis that is used, ``0 < ratio <= 1``. Needed unless ``mass``
            is given, beside which it is the largest share. A ``RatioSchedule`` is the ratio that
            it stands at: a compiled model changes with it, see there.
        min_k: fewest pairs used, so that narrow layers stay exact.
        estimator: how pairs are chosen from their scores:

            - ``"topk"``: the k largest, unscaled; deterministic, biased.
            - ``"topk_mean"``: mean-corrected. The k largest deviations from the mean pair are
              exact; one pair more, the mean of the others, stands for these. For data that is not
              zero-mean (behind a ReLU), where plain top-k is at its worst. Deterministic, biased.
            - ``"systematic"``: exactly k, with probabilities ``min(1, c * score)`` that sum to k,
              from one random number; scaled, unbiased.
            - ``"bernoulli"``: independently, with the same probabilities; scaled, unbiased. The
              count is random: room is made for three standard deviations more than k, and what
              overflows is thinned out, which keeps it unbiased.
            - ``"with_replacement"``: k draws with probabilities proportional to the scores; scaled,
              unbiased. Repeated draws are merged.
        scores: what makes a pair probable: ``"product"`` is ``|x_k| * |w_k|`` (2-norms);
            ``"weight"`` is the norm of the product's right operand alone (the weight in forward and
            grad_input, the output's gradient in grad_weight), the same on every data-parallel
            worker for a forward; ``"input"`` is that of the left operand (in grad_weight the
            layer's input, so that rows are chosen in the forward and only these are saved);
            ``"estimated"`` is the product of norms over 32 rows and columns spread evenly;
            ``"uniform"`` is the same for all (under ``"topk"`` the first k, which is good for
            timing alone).
        inference: also sample in graphs without a backward, which are exact otherwise.
        mass: use the fewest pairs whose scores hold this share of the sum, ``0 < mass <= 1``
            (``"topk"`` alone). Shapes stay static: ``size`` pairs are computed, those not used
            scaled by 0.
        shared: a batched product draws one set of indices for all its batches, instead of one for
            each.

    Raises:
        ConfigError: for values outside these ranges.
    """

    ratio: float | RatioSchedule | None = None
    min_k: int = 1
    estimator: str = "topk"
    scores: str = "product"
    inference: bool = False
    mass: float | None = None
    shared: bool = False

    def __post_init__(self) -> None:
        """Check every value."""
        if self.ratio is None and self.mass is None:
            raise ConfigError("Sampled: ratio=None and mass=None: give one of them")
        for key in ("ratio", "mass"):
            self._share(key)
        checks.integer("Sampled", "min_k", self.min_k)
        if self.min_k < 1:
            raise ConfigError(f"Sampled: min_k={self.min_k} must be at least 1")
        checks.one_of("Sampled", "estimator", self.estimator, ESTIMATORS)
        checks.one_of("Sampled", "scores", self.scores, SCORES)
        checks.flag("Sampled", "inference", self.inference)
        checks.flag("Sampled", "shared", self.shared)
        if self.mass is not None and self.estimator != "topk":
            raise ConfigError(
                f"Sampled: mass={self.mass!r} goes with estimator='topk' alone, not with "
                f"estimator={self.estimator!r}; give a ratio"
            )
        if self.estimator == "topk_mean" and self.scores == "uniform":
            raise ConfigError(
                "Sampled: scores='uniform' tells no pair from another, so estimator='topk_mean' "
                "can't rank by deviation; use another of either"
            )

    def _share(self, key: str) -> None:
        """Check a share and make it a float."""
        value = getattr(self, key)
        if value is None or (key == "ratio" and isinstance(value, RatioSchedule)):
            return
        if not 0 < checks.number("Sampled", key, value) <= 1:
            raise ConfigError(f"Sampled: {key}={value!r} must be in (0, 1]")
        object.__setattr__(self, key, float(value))

    @property
    def random(self) -> bool:
        """Whether indices are drawn at random, and scaled."""
        return self.estimator in ("systematic", "bernoulli", "with_replacement")

    def k(self, depth: int) -> int:
        """Return how many of ``depth`` pairs are used: at most, of a mass; expected, of Bernoulli.

        The largest scores that hold a share of the sum are never more than that share of the
        pairs, so ``mass`` alone has a bound too.
        """
        ratio = self.ratio.ratio if isinstance(self.ratio, RatioSchedule) else self.ratio
        if ratio is None:
            assert self.mass is not None
            return min(depth, max(self.min_k, math.ceil(self.mass * depth)))
        return min(depth, max(self.min_k, int(ratio * depth)))

    def size(self, depth: int) -> int:
        """Return how many pairs are computed.

        ``k``, with room for what Bernoulli draws beyond it, or one pair that stands for the others.
        """
        k = self.k(depth)
        if self.estimator == "bernoulli" and k < depth:
            return min(depth, k + k // 8 + 32)  # >= k + 3 * sqrt(k)
        return k + (self.estimator == "topk_mean" and k < depth)

    def __str__(self) -> str:
        """Return the short form that reports show."""
        ratio = self.ratio.ratio if isinstance(self.ratio, RatioSchedule) else self.ratio
        share = f"mass {self.mass:g}" if self.mass is not None else f"{ratio:g}"
        if self.mass is not None and ratio is not None:
            share += f" up to {ratio:g}"
        words = ["sampled", share]
        if self.estimator != "topk":
            words.append(self.estimator.replace("_", " "))
        if self.scores == "uniform":
            words.append("uniformly")
        elif self.scores != "product":
            words.append("by estimate" if self.scores == "estimated" else f"by {self.scores}")
        return " ".join(words)


@dataclass(frozen=True)
class Masked:
    """The mask that the model itself holds beside the weight: ``where(mask, w, 0)``, ``w * mask``.

    Every layer with such a mask takes this pattern, whatever rule matches it (one that samples its
    forward apart): it changes no value. As a rule's ``forward`` it leaves layers without a mask
    dense, and their rows say so.
    """

    def __str__(self) -> str:
        """Return the short form that reports show."""
        return "stored mask"


Pattern = Dense | NM | Sampled | Masked
