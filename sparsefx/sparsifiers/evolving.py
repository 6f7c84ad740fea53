"""Sparse training whose masks move: SET, and what it shares with RigL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer
from sparsefx.sparsifiers.decay import check_holds
from sparsefx.sparsifiers.mask import is_sharded
from sparsefx.sparsifiers.regrow import (
    check_share,
    check_signs,
    check_std,
    clear_state,
    drawn,
    generator_for,
    smallest,
)
from sparsefx.sparsifiers.schedules import Schedule, as_schedule, whole_number
from sparsefx.sparsifiers.static import Static
from sparsefx.sparsifiers.targets import Rules, Target
from sparsefx.sparsifiers.unstructured import Unstructured


class Evolving(Static, ABC):
    """Masks that move: every round some weights of a layer are dropped, as many grow elsewhere.

    A round never grows what it has just dropped, nor more than there is room for, so the number of
    a layer's weights stays as it is. At places that are dropped or grown the optimizer's state is
    set to zero; Adam's bias correction counts the whole parameter's steps, so a new weight's first
    ones are up to about 3 times as long. A subclass says what grows; the draws follow from (seed,
    step, layer), so ranks whose weights are equal keep equal masks.

    Args:
        model: changed in place; see :class:`Sparsifier`.
        every: steps from one round to the next.
        optimizer: which holds the weights, built before; its state is cleared.
        until: no round at this step or later: SET has none after the last epoch.
        zeta: share of a layer's weights that a round drops, in [0, 1], or a schedule.
        signs: "separate" drops that share of positive and of negative weights each, "together" of
            all by magnitude.
        std: new weights are 0, or normal with this standard deviation.
        density: as for :class:`Static`; so are ``epsilon``, ``init``, ``seed`` and ``rules``.
        epsilon: likewise.
        init: likewise.
        seed: likewise.
        rules: likewise.
        straight_through: likewise.

    Raises:
        SparsifierError: for an argument out of range, or a model that can't be sparsified so.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int,
        optimizer: torch.optim.Optimizer,
        until: int | None = None,
        zeta: float | Schedule = 0.3,
        signs: str = "separate",
        std: float = 0.0,
        density: float | None = None,
        epsilon: float | None = None,
        init: str = "erdos_renyi",
        seed: int = 0,
        rules: Rules = None,
        straight_through: bool = False,
    ) -> None:
        """Check the options, then the model."""
        name = type(self).__name__
        self.every = whole_number(name, "every", every, 1)
        self.until = None if until is None else whole_number(name, "until", until, 0)
        self.zeta = as_schedule(name, "zeta", zeta)
        if not callable(zeta):
            check_share(name, "zeta", zeta)
        self.signs, self.std = check_signs(name, signs), check_std(name, std)
        self.optimizer = _checked_optimizer(name, optimizer)
        super().__init__(
            model,
            density=density,
            epsilon=epsilon,
            init=init,
            seed=seed,
            rules=rules,
            straight_through=straight_through,
        )

    # --- what a method of its own says

    def drop(self, layer: Layer[Unstructured], values: Tensor, zeta: float) -> Tensor:
        """Return places in ``values`` (float [n], the kept weights) to drop, the first ones first.

        Here those nearest to zero, ties in the order of the stored weight.
        """
        return smallest(values, zeta, self.signs)

    @abstractmethod
    def grow(
        self, layer: Layer[Unstructured], empty: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Return up to ``count`` places in ``empty``, int64 places of the flat stored weight.

        As many are dropped as this returns.
        """

    # --- a round

    def due(self, step: int) -> bool:
        """Whether masks move at this step."""
        return step % self.every == 0 and (self.until is None or step < self.until)

    def check_targets(self, targets: list[tuple[Target, Unstructured]]) -> None:
        """Check that the optimizer holds the weights, too."""
        super().check_targets(targets)
        weights = {target.name: target.weight for target, _ in targets}
        check_holds(type(self).__name__, self.optimizer, weights)

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Go on with the parameters that the model holds now.

        Args:
            optimizer: the one built on these parameters, where they were replaced.

        Raises:
            SparsifierError: after squash(), under FSDP2, or for an optimizer that doesn't hold a
                weight.
        """
        weights = {name: layer.weight for name, layer in self.layers.items()}
        _check_not_sharded(type(self).__name__, weights)
        if optimizer is not None:
            name = type(self).__name__
            check_holds(name, _checked_optimizer(name, optimizer), weights)
            self.optimizer = optimizer
        super().attach()

    def begin(self, step: int) -> None:
        """Check all that a round needs, before it changes a first layer."""
        owner = type(self).__name__
        weights = {name: layer.weight for name, layer in self.layers.items()}
        _check_not_sharded(owner, weights)
        if not self.due(step):
            return
        check_holds(owner, self.optimizer, weights)
        check_share(owner, "zeta", self.zeta(step))
        for name, weight in weights.items():
            if bool(weight.isnan().any()):
                raise SparsifierError(
                    f"layer {name!r} holds NaN in its weight at step {step}: training diverged; "
                    "go back to an earlier checkpoint, with a lower learning rate"
                )

    def advance(self, layer: Layer[Unstructured], step: int) -> None:
        """Move one layer's mask where that is due; frozen layers stay."""
        if self.due(step) and layer.weight.requires_grad:
            self._move(layer, step)
        super().advance(layer, step)

    def _move(self, layer: Layer[Unstructured], step: int) -> None:
        mask, weight = layer.mask.mask.flatten(), layer.weight.detach().flatten()
        kept, empty = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        generator = generator_for(int(layer.mask.get_buffer("seed")), step, layer.target.name)
        dropped = kept[self.drop(layer, weight[kept], float(self.zeta(step)))]
        count = min(len(dropped), len(empty))
        grown = empty[self.grow(layer, empty, count, generator).to(empty.device)]
        mask = mask.clone()  # flatten() may have been a view
        mask[dropped[: len(grown)]] = False
        mask[grown] = True
        self._write(layer, mask.view(layer.weight.shape), grown, generator)

    def _write(
        self, layer: Layer[Unstructured], mask: Tensor, grown: Tensor, generator: torch.Generator
    ) -> None:
        turned = mask != layer.mask.mask
        clear_state(self.optimizer, layer.weight, turned)
        new = torch.zeros(mask.numel(), dtype=layer.weight.dtype, device=mask.device)
        if self.std:
            drawn_values = torch.randn(len(grown), generator=generator, dtype=torch.float64)
            new[grown] = (self.std * drawn_values).to(new)
        layer.weight.copy_(torch.where(turned, new.view(mask.shape), layer.weight))
        layer.mask.replace(mask)


class SET(Evolving):
    """Sparse evolutionary training: drop what is nearest to zero, grow at random places.

    Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity inspired by network science" (Nature Communications 2018), algorithm 1. The paper
    has a round after every epoch but the last, ``zeta=0.3`` and ``epsilon=20``. Gradients stay
    inside the mask.

    ``SET(model, every=..., optimizer=..., density= or epsilon=, ...)``; see :class:`Evolving`.
    """

    def grow(
        self, layer: Layer[Unstructured], empty: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Draw among the empty places."""
        return drawn(len(empty), count, generator)


def _checked_optimizer(owner: str, optimizer: object) -> torch.optim.Optimizer:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise SparsifierError(
            f"{owner}: optimizer is {type(optimizer).__name__}; pass the torch.optim.Optimizer "
            "that trains the model: its state is cleared where weights are dropped or grown"
        )
    return optimizer


def _check_not_sharded(owner: str, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        if is_sharded(weight):
            raise SparsifierError(
                f"{owner}: the weight of layer {name!r} is sharded (FSDP2), and masks that move "
                "need whole weights: train with DDP, or use Static"
            )
