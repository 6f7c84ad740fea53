"""SR-STE: N:M training from scratch with a decay on what is pruned."""

from __future__ import annotations

import torch
from torch import nn

from sparsefx.config import NM
from sparsefx.sparsifiers.refreshing import Refreshing
from sparsefx.sparsifiers.schedules import Schedule
from sparsefx.sparsifiers.targets import Rules


class SRSTE(Refreshing):
    """Row-wise N:M masks that follow the weights, straight-through gradients, and a decay.

    Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (ICLR
    2021). After ``backward()`` a parameter's ``.grad`` is exactly G + decay * (1 - mask) * W, G the
    dense gradient with respect to the masked weight: added once per optimizer's step, however many
    backwards are accumulated. ``decay=0`` is the plain straight-through estimator.

    Args:
        model: changed in place; see :class:`Sparsifier`.
        n: weights KEPT of every ``m`` along the reduction axis.
        m: size of a group.
        decay: lambda of eq. 9.
        decoupled: W -= lr * decay * (1 - mask) * W in :meth:`step` instead: right under Adam, whose
            second moment would rescale a decay in the gradient.
        optimizer: for ``decoupled=True``: its groups' learning rates are read at every step.
        refresh: steps from one mask to the next, or a schedule.
        rules: which layers; see :func:`find_targets`.
        grad_scaler: under mixed precision: its scale multiplies the decay, so that it survives
            unscaling.
        transposable: N:M along both axes of every m x m tile.
        freeze: from this step on the masks stay as they are.

    Raises:
        ConfigError: n, m or transposable make no pattern.
        SparsifierError: for any other argument, or a model that can't be sparsified so.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int = 2,
        m: int = 4,
        *,
        decay: float = 2e-4,
        decoupled: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        refresh: int | Schedule = 1,
        rules: Rules = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        transposable: bool = False,
        freeze: int | None = None,
    ) -> None:
        """Put the masks on."""
        super().__init__(
            model,
            NM(n, m, transposable=transposable),
            rules,
            refresh=refresh,
            decay=decay,
            decoupled=decoupled,
            optimizer=optimizer,
            grad_scaler=grad_scaler,
            freeze=freeze,
        )
