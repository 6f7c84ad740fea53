"""Regression without a ridge on given features, and how far two kernels are from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """What functions linear in some features can be on the samples.

    Args:
        basis: float64 [samples, rank], orthonormal; its span is that of the kernel, too.
        kernel: float64 [samples, samples], K = J J^T.
        norm: Frobenius norm of J.
    """

    basis: Tensor
    kernel: Tensor
    norm: float

    @property
    def rank(self) -> int:
        """Singular values of J that count."""
        return self.basis.shape[1]

    def fit(self, y: Tensor) -> Tensor:
        """Return K K^+ y [samples]: ridgeless regression of y, on the samples themselves."""
        return self.basis @ (self.basis.T @ y)


def span(jacobian: Tensor, cutoff: float) -> Span:
    """Find the span of features.

    From singular values of J and not from K, whose rounding hides what is below 1e-8 of the
    largest.

    Args:
        jacobian: J, float64 [samples, features].
        cutoff: singular values below this share of the largest count as 0.
    """
    left, values, _ = torch.linalg.svd(jacobian, full_matrices=False)
    kept = values > cutoff * values[:1]
    return Span(left[:, kept], jacobian @ jacobian.T, float(values.square().sum().sqrt()))


def drift(one: Tensor, other: Tensor) -> float:
    """Return |K/|K| - L/|L||, Frobenius norms: 0 where equal up to a factor, sqrt 2 at most.

    (At most sqrt 2, as both are positive semidefinite: their inner product isn't negative.)
    """
    return float(torch.linalg.norm(_unit(one) - _unit(other)))


def relative(difference: Tensor, whole: Tensor) -> float:
    """Return |difference| / |whole|, 0 for 0 / 0 and infinity for others over 0."""
    part, size = float(torch.linalg.norm(difference)), float(torch.linalg.norm(whole))
    if size == 0:
        return 0.0 if part == 0 else float("inf")
    return part / size


def _unit(kernel: Tensor) -> Tensor:
    size = torch.linalg.norm(kernel)
    return kernel / size if bool(size > 0) else kernel
