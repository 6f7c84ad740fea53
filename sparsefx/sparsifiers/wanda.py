"""Wanda: keep weights by magnitude times the norm of the input that they multiply.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (arXiv 2306.11695),
equation (1). No weight changes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefx.config import NM
from sparsefx.sparsifiers.base import Layer
from sparsefx.sparsifiers.calibration import Calibrated, by_group
from sparsefx.sparsifiers.gram import Gram
from sparsefx.sparsifiers.targets import Rules


def wanda_scores(w: Tensor, gram: Tensor) -> Tensor:
    """Return |w_ij| |x_j|_2, float64 [out, K].

    Args:
        w: [out, K].
        gram: X X^T, [K, K], whose diagonal holds the squared norms.
    """
    return w.to(torch.float64).abs() * gram.diagonal().to(torch.float64).sqrt()


class Wanda(Calibrated):
    """One-shot N:M masks by |w| |x|, weights as they are.

    Args:
        model: changed in place, once every check has passed.
        n: weights kept of every m.
        m: group size.
        transposable: at most n per row and column of every m x m tile.
        rules: which layers, with which patterns.
        sequential: each layer on the inputs of the net pruned up to there.
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
        progress: bool = False,
    ) -> None:
        """Check everything, then put magnitude masks on the model."""
        pattern = NM(n, m, transposable=transposable)
        super().__init__(model, pattern, rules, sequential=sequential, progress=progress)

    def solve(self, layer: Layer, w: Tensor, mask: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
        """Return the weights, masked by the scores."""
        scores = torch.cat(
            [wanda_scores(rows, gram.sum[i]) for i, (rows,) in enumerate(by_group(gram, w))]
        )
        mask = self.mask_of(layer, scores)
        return torch.where(mask, w, 0.0), mask
