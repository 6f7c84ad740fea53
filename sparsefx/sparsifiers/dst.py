"""DST: a trainable threshold per output unit decides which weights a layer keeps."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers import base
from sparsefx.sparsifiers.base import Layer, Sparsifier
from sparsefx.sparsifiers.budget import excess, shifts
from sparsefx.sparsifiers.guard import (
    check_groups,
    check_target,
    note_faults,
    number,
    tell_fault,
)
from sparsefx.sparsifiers.mask import check_checkpoint, full, local, shard_like
from sparsefx.sparsifiers.recurrent import free_after_forward, recurrent_targets
from sparsefx.sparsifiers.schedules import Cubic, whole_number
from sparsefx.sparsifiers.targets import Rules, Target, find_targets
from sparsefx.sparsifiers.thresholds import ThresholdMask
from sparsefx.sparsifiers.unstructured import Unstructured

_GAIN = 100.0  # over all steps: an excess of 1 % held throughout multiplies alpha by e
_LIMIT = 9.0  # the controller moves alpha by no more than e**9 either way


class DST(Sparsifier[Unstructured]):
    """Weights with |w| > t are kept; t, one number per output unit, is trained with them.

    Liu et al., "Dynamic sparse training: find efficient sparse network from scratch with trainable
    masked layers" (ICLR 2020). The forward pass uses W * [|W| > t]. With G the gradient with
    respect to the masked weight, Q = |W| - t and H of :func:`long_tailed`, W gets
    G * mask + G * W * H(Q) * sign(W), and t gets minus the sum of G * W * H(Q) over its unit.
    :meth:`loss` pushes thresholds up; add it to the training loss. A unit is a row of a linear
    layer, a filter, or one hidden unit in one gate of nn.LSTM, nn.GRU, nn.RNN and their cells,
    whose matrices are masked too.

    Masks are made in :meth:`step`: called after every ``optimizer.step()``, it gives what making
    them anew in every forward pass would. Thresholds are parameters of the model: construct first,
    then build the optimizer, on :meth:`parameter_groups` where it decays weights. Given to
    :meth:`attach`, it is refused when it decays a threshold, then and at every step().

    How much is kept is an outcome of ``alpha``, unless ``density`` says it: then alpha is turned up
    while more is kept than a cubic ramp from 1 to ``density`` over ``steps`` wishes, and down while
    less is (integral control of log alpha), and from step ``steps`` on all thresholds move by one
    number at every step, after which the share ``density`` of all masked layers' weights together
    is above them, ties and rounding apart.

    Args:
        model: changed in place; see :class:`Sparsifier`.
        alpha: strength of the regulariser alpha * sum of exp(-t) (eq. 6); where it starts, with
            ``density``.
        density: share of all masked layers' weights that is kept in the end; None leaves it open.
        steps: optimizer steps until ``density`` is to be met; best well before the training's end.
        rules: which layers; see :func:`find_targets`. Recurrent weights are called
            "lstm.weight_ih_l0", and so on.
        reset: a layer that keeps no more than this share has its thresholds set back to 0; once
            ``density`` is met, each layer is left more than this share instead. 0 turns both off.
        check_every: steps from one look at the flag of non-finite numbers to the next; each look
            waits for the device. From the first such number on no mask or threshold is changed.
        check_gradients: look at gradients too, where ``.grad`` is still there in step(). Turn it
            off under a GradScaler, which skips the steps of infinite gradients by itself.

    Raises:
        SparsifierError: for a value out of range, or a model that can't be sparsified so.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 5e-4,
        *,
        density: float | None = None,
        steps: int | None = None,
        rules: Rules = None,
        reset: float = 0.01,
        check_every: int = 100,
        check_gradients: bool = True,
    ) -> None:
        """Check everything, then put the thresholds on."""
        self.alpha = number("alpha", alpha, 0, math.inf)
        self.reset = number("reset", reset, 0, 1)
        self.target = check_target(density, steps, self.reset)
        self.span = 0 if steps is None else steps
        self.check_every = whole_number("DST", "check_every", check_every, 1)
        self.check_gradients = check_gradients
        self.optimizer: torch.optim.Optimizer | None = None
        if not isinstance(model, nn.Module):
            raise SparsifierError(f"model is {type(model).__name__}; pass an nn.Module")
        pattern, recurrent = Unstructured(density), recurrent_targets(model)
        targets, self.skipped = find_targets(model, rules, pattern, recurrent)
        self._place(model, targets)
        self._held: Tensor | None = None
        self._settled = False

    def _place(self, model: nn.Module, targets: list[tuple[Target, Unstructured]]) -> None:
        """Do what the constructor of :class:`Sparsifier` does, with masks that have thresholds."""
        self.model = model
        self.layers: dict[str, Layer[Unstructured]] = {}
        for target, pattern in targets:
            weight = target.weight.detach()
            mask = ThresholdMask(weight, weight != 0, pattern, 1 - target.axis)
            self.layers[target.name] = base._register(target, mask, pattern)
        self._squashed = False
        self._attached: dict[str, nn.Parameter] = {}
        self._handles: dict[str, list[Any]] = {}
        after = base._attach_after_load(weakref.ref(self))
        self._model_handles = [
            model.register_load_state_dict_pre_hook(check_checkpoint),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(after),  # type: ignore[no-untyped-call]
            *free_after_forward(targets),
        ]
        super().attach()

    def thresholds(self) -> dict[str, nn.Parameter]:
        """Return name -> threshold, [out] each, at least float32."""
        return {name: mask.threshold for name, mask in self._masks().items()}

    def kept(self) -> dict[str, int]:
        """Return name -> number of weights inside the mask. Waits for the device."""
        return {name: int(mask.sum()) for name, mask in self.masks().items()}

    def densities(self) -> dict[str, float]:
        """Return name -> share of the weights inside the mask. Waits for the device."""
        masks = self.masks()
        return {name: n / max(masks[name].numel(), 1) for name, n in self.kept().items()}

    def parameter_groups(
        self, weight_decay: float = 0.0, *, threshold_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return all parameters of the model as an optimizer's groups: thresholds don't decay.

        Args:
            weight_decay: of the first group, all but the thresholds.
            threshold_lr: learning rate of the second group; None takes the optimizer's.
        """
        ours = list(self.thresholds().values())
        known = {id(t) for t in ours}
        rest = [p for p in self.model.parameters() if id(p) not in known]
        rate = {} if threshold_lr is None else {"lr": threshold_lr}
        return [
            {"params": rest, "weight_decay": weight_decay},
            {"params": ours, "weight_decay": 0.0, **rate},
        ]

    def loss(self) -> Tensor:
        """Return alpha * sum over layers and units of exp(-t): a scalar, at least float32."""
        parts = [
            self.strength(layer) * full(_mask(layer).threshold).neg().exp().sum()
            for layer in self.layers.values()
        ]
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def strength(self, layer: Layer[Unstructured]) -> Tensor | float:
        """Return alpha as it is now; a scalar tensor where the controller moves it."""
        if self.target is None:
            return self.alpha
        return self.alpha * (_mask(layer).drive * (_GAIN / (self.span * self.size))).exp()

    @property
    def size(self) -> int:
        """Number of weights of all masked layers."""
        return sum(mask.numel() for mask in self.masks().values())

    # --- the life

    def attach(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Take the optimizer whose groups step() looks at; call it after ``fully_shard``, too.

        Raises:
            SparsifierError: after squash(), or for an optimizer that decays or lacks a threshold.
        """
        if optimizer is not None:
            check_groups(optimizer, self.thresholds())
            self.optimizer = optimizer
        super().attach()

    def begin(self, step: int) -> None:
        """Look for non-finite numbers, then steer alpha or move all thresholds."""
        if self.optimizer is not None:
            check_groups(self.optimizer, self.thresholds())
        self._settled = False
        pairs = {name: (layer.weight, _mask(layer)) for name, layer in self.layers.items()}
        self._held = note_faults(pairs, step, self.check_gradients)
        if step % self.check_every == 0:
            self.check()
        if self.target is not None:
            if step < self.span:
                self._steer(step)
            else:
                self._project(self.target)

    def advance(self, layer: Layer[Unstructured], step: int) -> None:
        """Make the mask anew; a layer that keeps next to nothing gets its thresholds set to 0."""
        mask = _mask(layer)
        if self.reset > 0 and (self.target is None or step < self.span):
            threshold = full(mask.threshold.detach())
            above = mask.above(full(layer.weight.detach()), threshold)
            low = above.count_nonzero() <= self.reset * above.numel()
            self._set(mask, torch.where(low, 0, threshold))
        self._remask(layer)

    def _remask(self, layer: Layer[Unstructured]) -> None:
        mask = _mask(layer)
        above = mask.above(full(layer.weight.detach()), full(mask.threshold.detach()))
        turned = (above ^ mask.mask) & ~self._stopped(mask)  # far faster than where() on the CPU
        mask.replace(mask.mask ^ turned)

    @torch.no_grad()
    def settle(self) -> None:
        """Meet ``density`` now, in a training that ends before step ``steps``.

        Raises:
            SparsifierError: no density was asked for; after squash(); or as :meth:`check`.
        """
        self._check_alive()
        if self.target is None:
            raise SparsifierError("DST: settle() is for density=..., and none was asked for")
        compat.reshard(self.model)
        self.check()
        self._held = torch.zeros((), dtype=torch.bool)
        self._project(self.target)
        for layer in self.layers.values():
            self._remask(layer)
        self._settled = True

    def squash(self) -> nn.Module:
        """Leave plain masked weights and no thresholds; see :meth:`Sparsifier.squash`.

        Raises:
            SparsifierError: as there; for a non-finite number that step() has noted; or before
                the ``density`` that was asked for is met.
        """
        if not self._squashed:
            self._check_alive()
            self.check()
            if self.steps < self.span and not self._settled:
                raise SparsifierError(
                    f"DST: density={self.target!r} is met from step {self.span} on, and this is "
                    f"step {self.steps}: call settle() before squash(), or train on"
                )
        return super().squash()

    def check(self) -> None:
        """Look whether a step met a number that is not finite. Waits for the device.

        Raises:
            SparsifierError: naming the layer and the step; no mask was moved from that step on.
        """
        tell_fault(self._masks(), self.alpha)

    def _masks(self) -> dict[str, ThresholdMask]:
        return {name: _mask(layer) for name, layer in self.layers.items()}

    def _stopped(self, mask: ThresholdMask) -> Tensor:
        assert self._held is not None  # begin() set it
        return self._held.to(mask.mask.device)

    def _set(self, mask: ThresholdMask, threshold: Tensor) -> None:
        here = local(mask.threshold)
        there = shard_like(threshold, mask.threshold)
        here.copy_(torch.where(self._stopped(mask), here, there))

    def _steer(self, step: int) -> None:
        assert self.target is not None
        wish = round(Cubic(1.0, self.target, self.span)(step) * self.size)
        limit = int(_LIMIT / _GAIN * self.span * self.size)
        masks = self._masks().values()
        over = excess([mask.mask for mask in masks], wish)
        for mask in masks:
            moved = (mask.drive + over.to(mask.drive.device)).clamp(-limit, limit)
            mask.drive.copy_(torch.where(self._stopped(mask), mask.drive, moved))

    def _project(self, density: float) -> None:
        layers = [layer for layer in self.layers.values() if layer.mask.mask.numel()]
        whole = [full(_mask(layer).threshold.detach()) for layer in layers]
        margins = [
            _mask(layer).margins(full(layer.weight.detach()), threshold)
            for layer, threshold in zip(layers, whole, strict=True)
        ]
        moves = shifts([m.to(margins[0].device) for m in margins], density, self.reset)
        for layer, threshold, move in zip(layers, whole, moves, strict=True):
            self._set(_mask(layer), threshold + move.to(threshold.device))


def _mask(layer: Layer[Unstructured]) -> ThresholdMask:
    assert isinstance(layer.mask, ThresholdMask)
    return layer.mask
