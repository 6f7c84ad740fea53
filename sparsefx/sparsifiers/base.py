"""The life that all sparsifiers share: construct, step(), report(), squash()."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from sparsefx import compat
from sparsefx.config import NM
from sparsefx.errors import SparsifierError
from sparsefx.masks import nm_mask, transposable_mask
from sparsefx.sparsifiers.mask import Mask, check_checkpoint, local, shard_like
from sparsefx.sparsifiers.report import Report, make_report
from sparsefx.sparsifiers.targets import Rules, Target, find_targets
from sparsefx.sparsifiers.unstructured import P


@dataclass(frozen=True, eq=False)
class Layer(Generic[P]):
    """A weight and the mask on it.

    Args:
        target: where the weight is.
        mask: the parametrization.
        pattern: what its mask holds.
        order: the module's parameter names as they were, which squash() restores.
    """

    target: Target
    mask: Mask
    pattern: P
    order: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the optimizer moves, unmasked; a DTensor under FSDP2."""
        return self.target.weight  # type: ignore[return-value]


class Sparsifier(Generic[P]):
    """Masks on a model's weights, from construction until squash().

    Construct it on the plain model, before torch.compile, DDP and ``fully_shard``; parameters keep
    their identity, so an optimizer may be built before or after. (Masked weights come behind their
    module's other parameters, and optimizers save by position: build yours on the same side of the
    sparsifier in a run and its resume.) Call :meth:`step` after every ``optimizer.step()``.
    Everything that a resume needs is in ``model.state_dict()`` and the optimizer's: build all anew,
    then load. This class itself keeps its masks as they are.

    Args:
        model: changed in place, once every check has passed.
        pattern: for each layer that a rule doesn't give another.
        rules: which layers; see :func:`sparsefx.sparsifiers.targets.find_targets`.
        straight_through: whether gradients reach weights outside the mask.
        masks: layer name -> bool mask in the stored weight's layout, for layers whose mask is
            known; the others get :meth:`make_mask`'s.

    Attributes:
        model: the model.
        layers: name -> :class:`Layer`.
        skipped: name -> why a layer is left dense.

    Raises:
        SparsifierError: the model can't be sparsified so; it is then untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: P,
        rules: Rules = None,
        *,
        straight_through: bool = True,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Check everything, make every mask, then register them."""
        if not isinstance(model, nn.Module):
            raise SparsifierError(f"model is {type(model).__name__}; pass an nn.Module")
        targets, self.skipped = find_targets(model, rules, pattern)
        self.check_targets(targets)
        known = masks or {}
        made = [
            self._checked(target, known[target.name])
            if target.name in known
            else self.make_mask(target, wanted, target.weight.detach(), 0)
            for target, wanted in targets
        ]
        self.model = model
        self.layers: dict[str, Layer[P]] = {}
        for (target, wanted), values in zip(targets, made, strict=True):
            placed = torch.empty_like(target.weight, dtype=torch.bool).copy_(values)  # its strides
            mask = Mask(placed, wanted, straight_through=straight_through)
            self.layers[target.name] = _register(target, mask, wanted)
        self._squashed = False
        self._attached: dict[str, nn.Parameter] = {}
        self._handles: dict[str, list[RemovableHandle]] = {}
        self._model_handles = [
            model.register_load_state_dict_pre_hook(check_checkpoint),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(  # type: ignore[no-untyped-call]
                _attach_after_load(weakref.ref(self))
            ),
        ]
        self.attach()

    # --- what a method of its own may override

    def check_targets(self, targets: list[tuple[Target, P]]) -> None:
        """Raise SparsifierError for targets that this sparsifier can't take."""

    def make_mask(self, target: Target, pattern: P, weight: Tensor, step: int) -> Tensor:
        """Return a mask for the whole stored weight, in its layout: here by magnitude.

        Raises:
            SparsifierError: the pattern has no groups, and the method makes no mask of its own.
        """
        if not isinstance(pattern, NM):
            raise SparsifierError(
                f"{type(self).__name__} makes no mask for {pattern}: pass masks={{layer: mask}} "
                f"for layer {target.name!r} too"
            )
        matrix = target.matrix(weight)
        if pattern.transposable:
            return target.unmatrix(transposable_mask(matrix, pattern.n, pattern.m))
        return target.unmatrix(nm_mask(matrix, pattern.n, pattern.m, dim=1))

    def begin(self, step: int) -> None:
        """Do what comes before any layer advances to a step, without gradients: here nothing."""

    def advance(self, layer: Layer[P], step: int) -> None:
        """Bring one layer to a step, without gradients: here nothing changes."""

    @property
    def needs_hooks(self) -> bool:
        """Whether a parameter without :meth:`hook`'s hooks would be trained wrongly."""
        return False

    def hook(self, layer: Layer[P], parameter: nn.Parameter) -> list[RemovableHandle]:
        """Put what this sparsifier needs on a parameter: here nothing."""
        return []

    def loss(self) -> Tensor:
        """Return what to add to the training loss: 0 where there is no regulariser."""
        return torch.zeros((), device=next(iter(self.layers.values())).mask.mask.device)

    # --- the common life

    @property
    def steps(self) -> int:
        """The number of step() calls so far, a resumed run's included. Waits for the device."""
        return int(next(iter(self.layers.values())).mask.step)

    def attach(self) -> None:
        """Put the hooks on the parameters that the model holds now.

        Call it after ``fully_shard``, which replaces parameters. (``load_state_dict`` does it.)
        """
        self._check_alive()
        compat.reshard(self.model)
        for name, layer in self.layers.items():
            parameter = layer.weight
            if self._attached.get(name) is parameter or not parameter.requires_grad:
                continue
            for handle in self._handles.get(name, []):
                handle.remove()
            self._handles[name] = self.hook(layer, parameter)
            self._attached[name] = parameter

    @torch.no_grad()
    def step(self) -> None:
        """Do what is due after an optimizer's step; every rank has to call it.

        Raises:
            SparsifierError: after squash(), or when parameters were replaced without attach().
        """
        self._check_alive()
        compat.reshard(self.model)
        self._check_attached()
        step = self.steps + 1
        self.begin(step)
        for layer in self.layers.values():
            self.advance(layer, step)
            layer.mask.step.fill_(step)

    @torch.no_grad()
    def squash(self) -> nn.Module:
        """Write the masked weights into the parameters, and take masks and hooks off the model.

        Parameters keep their identity and place, outputs their bits.

        Returns:
            The model, plain again.

        Raises:
            SparsifierError: another parametrization was put on a masked weight; nothing changed.
        """
        if self._squashed:
            return self.model
        self._check_alive()
        compat.reshard(self.model)
        for name, layer in self.layers.items():
            if len(layer.target.parametrizations) != 1:
                raise SparsifierError(
                    f"layer {name!r} carries another parametrization on top of its mask: remove "
                    "that before squash()"
                )
        for handles in (self._model_handles, *self._handles.values()):
            for handle in handles:
                handle.remove()
        for layer in reversed(self.layers.values()):  # the first one knows its module's whole order
            clear_outside(layer)
            unregister(self.model, layer)
        self._squashed = True
        return self.model

    def masks(self) -> dict[str, Tensor]:
        """Return name -> bool mask, in the stored weight's layout. They change with step()."""
        return {name: layer.mask.mask for name, layer in self.layers.items()}

    def density(self) -> float:
        """Return the share of the masked layers' weights that is kept."""
        masks = self.masks().values()
        kept, size = sum(int(m.count_nonzero()) for m in masks), sum(m.numel() for m in masks)
        return kept / size if size else 1.0

    def sad(self, total: bool = False) -> dict[str, int]:
        """Return name -> sum of absolute mask differences (Zhou et al., ICLR 2021, section 3.3).

        Args:
            total: over all refreshes instead of the last one; a resumed run counts on.
        """
        return {name: int(layer.mask.flips[int(total)]) for name, layer in self.layers.items()}

    def report(self) -> Report:
        """Return what is masked and how much it keeps; under FSDP2 every rank has to call it."""
        self._check_alive()
        compat.reshard(self.model)
        return make_report(self.layers, self.skipped, self.steps)

    # --- checks

    def _check_alive(self) -> None:
        if self._squashed:
            raise SparsifierError(
                f"this {type(self).__name__} was squashed: construct a new one to go on"
            )
        if lost := self.lost():
            raise SparsifierError(
                f"the mask of layer {lost[0]!r} is no longer on the model (sparsefx.pack takes it "
                "off, for one): construct a new sparsifier to go on"
            )

    def lost(self) -> list[str]:
        """Return the layers whose masks something else took off the model."""
        return [name for name, it in self.layers.items() if it.target.mask is not it.mask]

    def _check_attached(self) -> None:
        if not self.needs_hooks:
            return
        for name, layer in self.layers.items():
            parameter = layer.weight
            if parameter.requires_grad and self._attached.get(name) is not parameter:
                raise SparsifierError(
                    f"the weight of layer {name!r} has no hooks (it was replaced or unfrozen), so "
                    "its gradient may lack the decay: call attach() after fully_shard(), "
                    "requires_grad_() and whatever else does that"
                )

    @staticmethod
    def _checked(target: Target, mask: Tensor) -> Tensor:
        weight = target.weight
        if mask.dtype is not torch.bool or mask.shape != weight.shape:
            raise SparsifierError(
                f"the mask for layer {target.name!r} is {mask.dtype} {tuple(mask.shape)}; pass "
                f"torch.bool {tuple(weight.shape)}"
            )
        return mask.detach()


@torch.no_grad()
def clear_outside(layer: Layer[P]) -> None:
    """Set the parameter to exactly zero outside its mask, in place."""
    here = local(layer.weight)
    here.copy_(torch.where(shard_like(layer.mask.mask, layer.weight), here, 0))


def _register(target: Target, mask: Mask, pattern: P) -> Layer[P]:
    order = tuple(target.module._parameters)
    mask.train(target.module.training)
    parametrize.register_parametrization(target.module, target.tensor_name, mask, unsafe=True)
    return Layer(target, mask, pattern, order)


def unregister(model: nn.Module, layer: Layer[P]) -> None:
    """Take one layer's mask off the model, parameters in their old order; values stay."""
    module, name = layer.target.module, layer.target.tensor_name
    compat.remove_parametrization(model, module, name)
    now = dict(module._parameters)
    module._parameters.clear()
    for key in [*(k for k in layer.order if k in now), *(k for k in now if k not in layer.order)]:
        module._parameters[key] = now[key]


def _attach_after_load(
    owner: weakref.ref[Sparsifier[P]],
) -> Callable[[nn.Module, Any], None]:
    """Make a load_state_dict post-hook that a copy of the model may carry along."""

    def attach(module: nn.Module, incompatible: Any) -> None:
        sparsifier = owner()
        if sparsifier is not None and sparsifier.model is module and not sparsifier.lost():
            sparsifier.attach()

    return attach
