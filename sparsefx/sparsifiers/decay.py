"""SR-STE's decay of the weights outside the mask, in the gradient or apart from it.

Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (ICLR 2021),
eq. 9: the gradient of the dense weight is G + decay * (1 - mask) * W.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.mask import Mask, is_sharded, local, shard_like

if TYPE_CHECKING:
    from sparsefx.sparsifiers.base import Layer

_MARK = "_sparsefx_decayed"


class Decay:
    """Adds the decay to a gradient, once between two calls of :meth:`reset`.

    The hooks run where a gradient is accumulated into ``.grad``: outside compiled graphs, in the
    parameter's own precision, and under FSDP2 on the reduced shard. A ``.grad`` that was None
    before gets its decay again.

    Args:
        strength: lambda of the paper.
        scaler: whose scale the gradients carry.
    """

    def __init__(self, strength: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """Start with no gradient decayed."""
        self.strength = strength
        self.scaler = scaler
        self._added: set[str] = set()
        self._scale: float | None = None

    def reset(self) -> None:
        """Let the next gradients be decayed anew."""
        self._added.clear()
        self._scale = None

    def hooks(self, layer: Layer, parameter: nn.Parameter) -> list[RemovableHandle]:
        """Put the hooks on a parameter; they hold neither it nor its module."""
        name, mask, owner = layer.target.name, layer.mask, weakref.ref(parameter)

        def before(grad: Tensor) -> None:
            there = owner()
            if there is not None and there.grad is None:
                self._added.discard(name)

        def after(there: Tensor) -> None:
            if there.grad is not None:
                self._add(name, mask, there, there.grad)

        return [
            parameter.register_hook(before),  # type: ignore[no-untyped-call]
            parameter.register_post_accumulate_grad_hook(after),  # type: ignore[no-untyped-call]
        ]

    @torch.no_grad()
    def _add(self, name: str, mask: Mask, parameter: Tensor, grad: Tensor) -> None:
        # FSDP2 calls no hook before it sets .grad, but keeps the tensor when it adds to it
        if is_sharded(grad) and not getattr(grad, _MARK, False):
            self._added.discard(name)
            setattr(grad, _MARK, True)
        if name in self._added:
            return
        self._added.add(name)
        local(grad).add_(outside(parameter, mask, self.strength * self._current_scale()))

    def _current_scale(self) -> float:
        if self._scale is None:  # asking waits for the device, so once per step
            self._scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return self._scale


@torch.no_grad()
def shrink(layers: Mapping[str, Layer], strength: float, optimizer: torch.optim.Optimizer) -> None:
    """W -= lr * strength * (1 - mask) * W, lr of the group that holds W: AdamW's kind of decay.

    Added to the gradient, Adam would divide the decay by the root of its second moment (Loshchilov
    and Hutter, ICLR 2019).
    """
    rates = learning_rates(optimizer)
    for layer in layers.values():
        if layer.weight.requires_grad:
            lr = rates[id(layer.weight)]
            local(layer.weight).sub_(outside(layer.weight, layer.mask, lr * strength))


def outside(parameter: Tensor, mask: Mask, factor: Any) -> Tensor:
    """Return factor * (1 - mask) * W for the part of W that lives here."""
    here = shard_like(mask.mask, parameter)
    return local(parameter.detach()).mul(factor).masked_fill_(here, 0)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[int, Any]:
    """Return id of parameter -> learning rate now."""
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def check_decay(owner: str, decay: object, scaler: object) -> None:
    """Raise SparsifierError for a decay that is no number of at least 0, or a strange scaler."""
    if (
        isinstance(decay, bool)
        or not isinstance(decay, int | float)
        or not (math.isfinite(decay) and decay >= 0)
    ):
        raise SparsifierError(f"{owner}: decay={decay!r} must be a finite number of at least 0")
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise SparsifierError(
            f"{owner}: grad_scaler is {type(scaler).__name__}; pass a torch.amp.GradScaler"
        )


def check_optimizer(owner: str, decoupled: bool, optimizer: object) -> None:
    """Raise SparsifierError unless an optimizer is there exactly where one is needed."""
    if decoupled and optimizer is None:
        raise SparsifierError(
            f"{owner}: decoupled=True needs optimizer=..., whose learning rate scales the decay"
        )
    if optimizer is not None and not decoupled:
        raise SparsifierError(f"{owner}: optimizer is read with decoupled=True only; leave it out")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise SparsifierError(
            f"{owner}: optimizer is {type(optimizer).__name__}; pass a torch.optim.Optimizer"
        )


def check_holds(
    owner: str, optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor]
) -> None:
    """Raise SparsifierError unless the optimizer holds every weight that is trained."""
    rates = learning_rates(optimizer)
    for name, weight in weights.items():
        if weight.requires_grad and id(weight) not in rates:
            raise SparsifierError(
                f"{owner}: the optimizer doesn't hold the weight of layer {name!r}: build it on "
                "the model's current parameters (after fully_shard: attach(optimizer=...))"
            )
