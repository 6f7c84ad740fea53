"""One budget over many layers: what all thresholds have to move by to meet it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def least_kept(size: int, floor: float) -> int:
    """Return the smallest count that is more than a share of ``size``."""
    return min(int(floor * size) + 1, size) if floor > 0 else 0


def excess(masks: Sequence[Tensor], wish: int) -> Tensor:
    """Return how many entries masks keep beyond a wish: int64 scalar on the first one's device."""
    counts = [mask.count_nonzero() for mask in masks]
    return torch.stack([n.to(counts[0].device) for n in counts]).sum() - wish


def shifts(margins: Sequence[Tensor], density: float, floor: float) -> list[Tensor]:
    """Return for each layer what to add to its thresholds; nothing waits for the device.

    One number serves all layers: the margin that ``density`` of all entries exceed. A layer that
    would be left with no more than a share ``floor`` moves less. Entries with equal margins go
    together, so ties can miss the budget.

    Args:
        margins: |w| - t of each layer, any shapes, on one device.
        density: share of all entries to keep, in (0, 1) and above ``floor``.
        floor: share that every layer keeps more than; 0 for no such promise.

    Returns:
        A scalar per layer, in the margins' dtype.
    """
    flat = [m.flatten() for m in margins]
    caps = [_exceeded_by(m, least_kept(m.numel(), floor)) for m in flat]
    safe = [torch.where(m > cap, torch.inf, m) for m, cap in zip(flat, caps, strict=True)]
    together = torch.cat(safe)
    kept = min(max(round(density * together.numel()), 1), together.numel() - 1)
    common = _exceeded_by(together, kept)
    return [torch.minimum(common, cap).to(m.dtype) for m, cap in zip(flat, caps, strict=True)]


def _exceeded_by(values: Tensor, count: int) -> Tensor:
    """A number that ``count`` of the values exceed, ties apart."""
    if count >= values.numel():
        return values.min() - 1
    return values.kthvalue(values.numel() - count).values
