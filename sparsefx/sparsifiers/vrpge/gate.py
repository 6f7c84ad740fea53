"""A mask of whole units: the drawn one in training, the most probable one in eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer
from sparsefx.sparsifiers.mask import Mask
from sparsefx.sparsifiers.targets import Target
from sparsefx.sparsifiers.unstructured import Unstructured


class GateMask(Mask):
    """``where(mask, w, 0)`` in training, ``where(likely, w, 0)`` in eval; gradients stay inside.

    Beside :class:`Mask`'s buffers there is ``likely`` (bool, the weight's shape).
    """

    likely: Tensor

    def __init__(self, mask: Tensor, pattern: Unstructured) -> None:
        """Register the buffers."""
        super().__init__(mask, pattern, straight_through=False)
        self.register_buffer("likely", mask.clone())

    def forward(self, w: Tensor) -> Tensor:
        """Zero the units that are gated off."""
        return torch.where(self.mask if self.training else self.likely, w, 0)


class GateState(nn.Module):
    """What the gates of a whole net know; the first mask holds it.

    Buffers, all persistent, for n gates: ``probability`` (float32 [n]), ``moments`` (float32
    [2, n], Adam's), ``gates`` (bool [2, n]: drawn, most probable) and ``counts`` (int64 [3]: the
    seed, structure steps so far, whether frozen).
    """

    probability: Tensor
    moments: Tensor
    gates: Tensor
    counts: Tensor

    def __init__(self, n: int, seed: int, device: torch.device) -> None:
        """Register the buffers."""
        super().__init__()
        self.register_buffer("probability", torch.ones(n, device=device))
        self.register_buffer("moments", torch.zeros(2, n, device=device))
        self.register_buffer("gates", torch.ones(2, n, dtype=torch.bool, device=device))
        self.register_buffer("counts", torch.tensor([seed, 0, 0]))


def exchange(layer: Layer[Unstructured]) -> Layer[Unstructured]:
    """Put a :class:`GateMask` where the plain mask was."""
    mask = GateMask(layer.mask.mask, layer.pattern)
    mask.train(layer.target.module.training)
    held: Any = layer.target.module.parametrizations
    held[layer.target.tensor_name][0] = mask
    return Layer(layer.target, mask, layer.pattern, layer.order)


def put(target: Target, pattern: Unstructured) -> Layer[Unstructured]:
    """Put a gate on a vector that goes with a layer: a bias, or a norm's scale or shift."""
    order = tuple(target.module._parameters)
    mask = GateMask(torch.ones_like(target.weight, dtype=torch.bool), pattern)
    mask.train(target.module.training)
    parametrize.register_parametrization(target.module, target.tensor_name, mask, unsafe=True)
    return Layer(target, mask, pattern, order)


def check_alone(layers: Mapping[str, Layer[Unstructured]]) -> None:
    """Refuse parameters that something else was put on, before anything is taken off.

    Raises:
        SparsifierError: another parametrization lies on a gate.
    """
    for name, layer in layers.items():
        if len(layer.target.parametrizations) != 1:
            raise SparsifierError(
                f"{name!r} carries another parametrization on top of its gates: remove that "
                "before squash()"
            )
