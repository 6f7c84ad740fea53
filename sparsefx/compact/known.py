"""What is known of the elements of a tensor, whatever the inputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a tensor.

    Attributes:
        value: its elements; 0 where they are unknown.
        unknown: bool, of the same shape.
    """

    value: Tensor
    unknown: Tensor

    def live(self) -> Tensor:
        """Return where it isn't known to be 0, bool."""
        return self.unknown | (self.value != 0)

    def constant(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what is alike along every dimension but ``kept``: (known, value), of their sizes.

        The value is 0 where it isn't known.
        """
        others = [d for d in range(self.value.dim()) if d not in kept]
        if not others:
            return ~self.unknown, self.value
        low, high = self.value.amin(others), self.value.amax(others)
        known = ~self.unknown.any(others) & (low == high)  # [others] isn't empty: not all dims
        return known, torch.where(known, low, torch.zeros_like(low))


def of(tensor: Tensor) -> Known:
    """Say that all of a tensor is known."""
    return Known(tensor, torch.zeros((), dtype=torch.bool, device=tensor.device).expand_as(tensor))


def nothing(value: Tensor) -> Known:
    """Say that nothing is known of a tensor of this shape, dtype and device."""
    shape = tuple(value.shape)
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    return Known(zero.expand(shape), torch.ones_like(zero, dtype=torch.bool).expand(shape))


def some(value: Tensor, unknown: Tensor) -> Known:
    """Say that all but ``unknown`` is known; whatever stands there is dropped."""
    unknown = unknown.expand(value.shape)
    return Known(torch.where(unknown, torch.zeros_like(value), value), unknown)


Env = dict[Node, Any]  # Known, lists of them, and what is no tensor


def unknown_like(meta: Any) -> Any:
    """Say that nothing is known of a value, a tensor or several; what is no tensor stays."""
    if isinstance(meta, Tensor):
        return nothing(meta)
    return [unknown_like(item) for item in meta] if isinstance(meta, list | tuple) else meta
