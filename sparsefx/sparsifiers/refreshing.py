"""Masks by magnitude that are made anew from the current weight, with SR-STE's decay."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsefx.config import NM
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer, Sparsifier
from sparsefx.sparsifiers.decay import Decay, check_decay, check_holds, check_optimizer, shrink
from sparsefx.sparsifiers.mask import full
from sparsefx.sparsifiers.schedules import Schedule, as_schedule, whole_number
from sparsefx.sparsifiers.targets import Rules, Target


class Refreshing(Sparsifier):
    """What SRSTE and TransposableNM share.

    Args:
        model: as for :class:`Sparsifier`; so are ``pattern``, ``rules`` and ``straight_through``.
        pattern: likewise.
        rules: likewise.
        straight_through: likewise.
        refresh: masks follow the weights at every step that it divides; a number or a schedule.
        decay: lambda of SR-STE.
        decoupled: shrink the weights after the optimizer's step instead of adding to gradients.
        optimizer: whose learning rates scale the decoupled decay.
        grad_scaler: whose scale the gradients carry, and so the decay has to.
        freeze: from this step on masks follow the weights no more.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: NM,
        rules: Rules = None,
        *,
        straight_through: bool = True,
        refresh: int | Schedule = 1,
        decay: float = 0.0,
        decoupled: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        freeze: int | None = None,
    ) -> None:
        """Check the options, then the model."""
        name = type(self).__name__
        check_decay(name, decay, grad_scaler)
        check_optimizer(name, decoupled, optimizer)
        if not callable(refresh):
            whole_number(name, "refresh", refresh, 1)
        if freeze is not None:
            whole_number(name, "freeze", freeze, 0)
        self.freeze = freeze
        self.refresh = as_schedule(name, "refresh", refresh)
        self.decay = float(decay)
        self.decoupled = decoupled
        self.optimizer = optimizer
        self._decay = Decay(self.decay, grad_scaler)
        super().__init__(model, pattern, rules, straight_through=straight_through)

    def check_targets(self, targets: list[tuple[Target, NM]]) -> None:
        """Check that the optimizer holds what is to be decayed."""
        if self.optimizer is not None:
            weights = {target.name: target.weight for target, _ in targets}
            check_holds(type(self).__name__, self.optimizer, weights)

    @property
    def needs_hooks(self) -> bool:
        """Whether gradients are to be decayed."""
        return self.decay > 0 and not self.decoupled

    def hook(self, layer: Layer, parameter: nn.Parameter) -> list[RemovableHandle]:
        """Let gradients be decayed."""
        return self._decay.hooks(layer, parameter) if self.needs_hooks else []

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the hooks on the parameters that the model holds now.

        Args:
            optimizer: the one built on these parameters, for ``decoupled=True``.

        Raises:
            SparsifierError: after squash(), or for an optimizer that doesn't hold a weight.
        """
        if optimizer is not None:
            check_optimizer(type(self).__name__, self.decoupled, optimizer)
            weights = {name: layer.weight for name, layer in self.layers.items()}
            check_holds(type(self).__name__, optimizer, weights)
            self.optimizer = optimizer
        super().attach()

    def begin(self, step: int) -> None:
        """Decay with the masks that the gradients were computed under."""
        if self.optimizer is not None and self.decay > 0:
            weights = {name: layer.weight for name, layer in self.layers.items()}
            check_holds(type(self).__name__, self.optimizer, weights)
            shrink(self.layers, self.decay, self.optimizer)
        self._decay.reset()

    def advance(self, layer: Layer, step: int) -> None:
        """Make the mask anew where that is due."""
        if self.due(step):
            self.remask(layer, step)

    def due(self, step: int) -> bool:
        """Whether masks follow the weights at this step.

        Raises:
            SparsifierError: the schedule says less than 1.
        """
        if self.freeze is not None and step >= self.freeze:
            return False
        every = round(self.refresh(step))
        if every < 1:
            raise SparsifierError(f"refresh({step}) is {every}; it must be at least 1")
        return step % every == 0

    def remask(self, layer: Layer, step: int) -> None:
        """Make one layer's mask from its current weight.

        Raises:
            SparsifierError: the weight holds NaN; the mask stays as it was.
        """
        weight = full(layer.weight.detach())
        if bool(weight.isnan().any()):  # asked of the whole weight, so every rank says the same
            raise SparsifierError(
                f"layer {layer.target.name!r} holds NaN in its weight at step {step}: training "
                "diverged; go back to an earlier checkpoint, with a lower learning rate"
            )
        layer.mask.replace(self.make_mask(layer.target, layer.pattern, weight, step))
