"""SparseGPT: prune in one sweep over the inputs, each pruned weight's error moved to later ones.

Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot"
(arXiv 2301.00774), algorithm 1. Inputs are taken in order; pruning w_j costs
w_j^2 / [H_j^-1]_jj, H_j^-1 being the inverse Hessian of the inputs not yet taken, whose rows are
those of the upper Cholesky factor of H^-1. All in float64: the factor of an inverse loses digits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefx.config import NM
from sparsefx.errors import SparsifierError
from sparsefx.masks import nm_mask
from sparsefx.sparsifiers.base import Layer
from sparsefx.sparsifiers.calibration import Calibrated, by_group
from sparsefx.sparsifiers.gram import Gram
from sparsefx.sparsifiers.least_squares import check_damping
from sparsefx.sparsifiers.targets import Rules

DEAD = 1e-9  # of lambda: what an input that never acts counts for
BLOCK = 128  # columns whose updates are gathered before they touch the rest: algorithm 1's B


def inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U = (H + lambda)^-1, float64 [K, K].

    lambda is damping times the mean of H's diagonal. An input that was always zero gets next to
    nothing instead, so that its weights are the cheapest to prune, the smallest first; they take
    part in no update. Where all inputs were zero, H + lambda is taken as the unit matrix.

    Raises:
        SparsifierError: damping isn't > 0, or a value isn't finite.
    """
    check_positive(damping)
    if not bool(gram.isfinite().all()):
        raise SparsifierError("gram holds NaN or infinity")
    hessian = gram.to(torch.float64, copy=True)
    shift = damping * float(hessian.diagonal().mean()) if len(hessian) else 0.0
    dead = hessian.diagonal() == 0
    hessian.diagonal().add_(torch.where(dead, shift * DEAD, shift) if shift else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def check_positive(damping: float) -> None:
    """Raise SparsifierError unless damping is a finite number > 0."""
    check_damping(damping)
    if damping == 0:
        raise SparsifierError("damping=0 leaves a singular Hessian without an inverse; pass > 0")


def sweep(w: Tensor, factor: Tensor, pattern: tuple[int, int] | Tensor) -> tuple[Tensor, Tensor]:
    """Prune the columns of w from left to right, making up for each in the columns behind it.

    Args:
        w: [out, K].
        factor: what inverse_factor gives, [K, K].
        pattern: (n, m) chooses the n of each m consecutive columns that cost most when the sweep
            arrives there; a bool mask [out, K] says which weights stay.

    Returns:
        The new weights, dtype of w and zero off the mask, and the mask.
    """
    new, fixed = w.to(torch.float64, copy=True), isinstance(pattern, Tensor)
    mask = pattern.clone() if isinstance(pattern, Tensor) else torch.ones_like(w, dtype=torch.bool)
    block = BLOCK
    if not isinstance(pattern, Tensor):
        block = max(pattern[1], BLOCK - BLOCK % pattern[1])  # a group never straddles two blocks
    for start in range(0, w.shape[1], block):
        columns = slice(start, min(start + block, w.shape[1]))
        own = factor[columns, columns]
        errors = torch.empty_like(new[:, columns])
        for i, j in enumerate(range(columns.start, columns.stop)):
            if not fixed and i % pattern[1] == 0:
                mask[:, j : j + pattern[1]] = _cheapest_off(new[:, columns], own, i, *pattern)
            left = torch.where(mask[:, j], 0.0, new[:, j]) / own[i, i]
            new[:, j : columns.stop] -= left[:, None] * own[i, i:]
            errors[:, i] = left
        new[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
    return torch.where(mask, new, 0.0).to(w.dtype), mask


def _cheapest_off(block: Tensor, own: Tensor, i: int, n: int, m: int) -> Tensor:
    """Which of the columns i..i+m stay: those with the n largest w^2 / [H^-1]_jj."""
    cost = (block[:, i : i + m] / own.diagonal()[i : i + m]).abs()  # its square orders alike
    return nm_mask(cost, n, m)


def obs_scores(w: Tensor, factor: Tensor) -> Tensor:
    """Return w_j^2 / [H^-1]_jj, what pruning each weight alone would cost, float64 [out, K]."""
    return w.to(torch.float64).square() / factor.square().sum(0)


class SparseGPT(Calibrated):
    """One-shot N:M masks chosen while pruning, with what is left updated for each pruned weight.

    Row-wise masks are chosen group by group inside the sweep. Transposable ones are made first, of
    each weight's own cost w^2 / [H^-1]_jj, and the sweep follows them. A convolution's inputs are
    taken tap by tap, so that a group's channels are neighbours.

    Args:
        model: changed in place, once every check has passed.
        n: weights kept of every m.
        m: group size.
        transposable: at most n per row and column of every m x m tile.
        rules: which layers, with which patterns.
        sequential: each layer on the inputs of the net pruned up to there, with the dense weights'
            outputs on them as its targets (the paper goes block by block); otherwise on the dense
            net's inputs.
        damping: what is added to the Hessian's diagonal, over its mean; the paper's is 0.01.
        progress: show a progress bar on the terminal.

    Raises:
        ConfigError: n or m makes no sense.
        SparsifierError: the model can't be sparsified so; it is then untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int = 2,
        m: int = 4,
        *,
        transposable: bool = False,
        rules: Rules = None,
        sequential: bool = True,
        damping: float = 0.01,
        progress: bool = False,
    ) -> None:
        """Check everything, then put magnitude masks on the model."""
        check_positive(damping)
        self.damping = damping
        pattern = NM(n, m, transposable=transposable)
        super().__init__(model, pattern, rules, sequential=sequential, progress=progress)

    def solve(self, layer: Layer, w: Tensor, mask: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
        """Return the weights after the sweep, and its mask."""
        order = self._order(layer, w)
        hessians = [matrix[order][:, order] for matrix in gram.sum]
        factors = [inverse_factor(hessian, self.damping) for hessian in hessians]
        w, back = w[:, order], order.argsort()
        masks: list[Tensor] | None = None
        if layer.pattern.transposable:
            costs = [obs_scores(v, f) for (v,), f in zip(by_group(gram, w), factors, strict=True)]
            chosen = self.mask_of(layer, torch.cat(costs)[:, back])
            masks = [kept for (kept,) in by_group(gram, chosen[:, order])]
        row_wise = layer.pattern.n, layer.pattern.m
        done = [
            sweep(v, factors[i], row_wise if masks is None else masks[i])
            for i, (v,) in enumerate(by_group(gram, w))
        ]
        return tuple(torch.cat(part)[:, back] for part in zip(*done, strict=True))  # type: ignore[return-value]

    @staticmethod
    def _order(layer: Layer, w: Tensor) -> Tensor:
        """Columns [in, taps] taken tap by tap."""
        channels = layer.target.matrix(layer.weight).shape[1]
        return torch.arange(w.shape[1], device=w.device).view(channels, -1).t().flatten()
