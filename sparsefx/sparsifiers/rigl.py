"""RigL: masks that move to where the dense gradient is largest."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsefx.sparsifiers.base import Layer
from sparsefx.sparsifiers.evolving import Evolving
from sparsefx.sparsifiers.regrow import check_share, largest
from sparsefx.sparsifiers.schedules import whole_number
from sparsefx.sparsifiers.targets import Rules
from sparsefx.sparsifiers.unstructured import Unstructured


@dataclass(frozen=True)
class Cosine:
    """``start / 2 * (1 + cos(pi * t / steps))``, 0 from ``steps`` on (Evci et al., section 3)."""

    start: float
    steps: float

    def __call__(self, step: int) -> float:
        """Return the value at a step."""
        return self.start / 2 * (1 + math.cos(math.pi * min(step / self.steps, 1.0)))


class RigL(Evolving):
    """Drop what is nearest to zero, grow where the dense gradient is largest.

    Evci et al., "Rigging the lottery: making all tickets winners" (ICML 2020), algorithm 1. At a
    round's step the gradient is dense until the optimizer's step begins: added up over backwards,
    averaged by DDP and unscaled like any other, and clipping sees it whole. Then, and after every
    backward of the other steps, what lies outside the mask is set to 0. The weight's gradient is
    computed as a dense product at every step, so that one compilation serves all of them.

    Other than the paper: a round never grows what it has just dropped, the optimizer steps at a
    round's step too, and by ``init="erdos_renyi"`` kernels share like matrices; pass "erk". Where
    an optimizer's step was skipped, as by a GradScaler, or a layer had no gradient, its round is
    left out. Gradients that are not finite count as 0.

    Args:
        model: changed in place; see :class:`Sparsifier`.
        steps: of the whole training.
        optimizer: which holds the weights, built before.
        every: steps from one round to the next.
        stop: no round after this share of the steps, in [0, 1].
        zeta: share of a layer's weights that the first rounds drop; it falls to 0 as a cosine.
        signs: as for :class:`Evolving`; so are ``std`` and the others.
        std: likewise.
        density: likewise.
        epsilon: likewise.
        init: likewise.
        seed: likewise, of the first masks and of ``std``.
        rules: likewise.

    Raises:
        SparsifierError: for an argument out of range, or a model that can't be sparsified so.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        optimizer: torch.optim.Optimizer,
        every: int = 100,
        stop: float = 0.75,
        zeta: float = 0.3,
        signs: str = "together",
        std: float = 0.0,
        density: float | None = None,
        epsilon: float | None = None,
        init: str = "erdos_renyi",
        seed: int = 0,
        rules: Rules = None,
    ) -> None:
        """Check the options, then the model."""
        name = type(self).__name__
        end = check_share(name, "stop", stop) * whole_number(name, "steps", steps, 1)
        first = check_share(name, "zeta", zeta)
        self._dense: dict[str, Tensor] = {}
        self._round: bool | None = None  # whether the step under way is a round's; None: ask
        self._watched: torch.optim.Optimizer | None = None
        super().__init__(
            model,
            every=every,
            optimizer=optimizer,
            until=math.ceil(end),
            zeta=Cosine(first, end),
            signs=signs,
            std=std,
            density=density,
            epsilon=epsilon,
            init=init,
            seed=seed,
            rules=rules,
            straight_through=True,
        )

    def grow(
        self, layer: Layer[Unstructured], empty: Tensor, count: int, generator: torch.Generator
    ) -> Tensor:
        """Take the largest gradients, ties in the order of the stored weight."""
        dense = self._dense.pop(layer.target.name, None)
        if dense is None:
            return empty.new_empty(0)
        return largest(dense.flatten()[empty].nan_to_num(nan=0, posinf=0), count)

    # --- the dense gradient

    def hook(self, layer: Layer[Unstructured], parameter: nn.Parameter) -> list[RemovableHandle]:
        """Keep gradients inside the mask, but for a round's."""
        mask, owner = layer.mask, weakref.ref(self)

        def after(there: Tensor) -> None:
            sparsifier = owner()
            if there.grad is not None and (sparsifier is None or not sparsifier.in_round()):
                there.grad.masked_fill_(~mask.mask, 0)

        return [parameter.register_post_accumulate_grad_hook(after)]  # type: ignore[no-untyped-call]

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the hooks on the parameters and the optimizer; see :meth:`Evolving.attach`."""
        super().attach(optimizer)
        self._round = None
        if self._watched is not self.optimizer:
            self._watched = self.optimizer
            handle = self.optimizer.register_step_pre_hook(_take_from(weakref.ref(self)))
            self._model_handles.append(handle)

    def in_round(self) -> bool:
        """Whether the next :meth:`step` has a round. Waits for the device, once a step."""
        if self._round is None:
            self._round = self.due(self.steps + 1)
        return self._round

    def begin(self, step: int) -> None:
        """Check all that a round needs."""
        super().begin(step)
        self._round = None

    @torch.no_grad()
    def take(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the dense gradients of a round, and leave the optimizer those inside the masks."""
        if optimizer is not self.optimizer:
            return
        for name, layer in self.layers.items():
            if layer.weight.grad is None:
                continue
            if self.in_round():
                self._dense[name] = layer.weight.grad.abs()
            if self.in_round() or self._attached.get(name) is not layer.weight:
                layer.weight.grad.masked_fill_(~layer.mask.mask, 0)


def _take_from(owner: weakref.ref[RigL]) -> Callable[..., None]:
    """Make an optimizer's pre-hook that holds no sparsifier."""

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        sparsifier = owner()
        if sparsifier is not None:
            sparsifier.take(optimizer)

    return before
