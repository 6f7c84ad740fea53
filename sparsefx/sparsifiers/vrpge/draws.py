"""Draws that follow from a key alone: equal on every rank and after every resume."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def draw(probabilities: Tensor, *key: int | str) -> Tensor:
    """Return bool [n], each True with its probability, the same for the same key anywhere.

    The numbers are drawn on the host, so they don't depend on the device, and no global generator
    is touched.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    numbers = torch.rand(len(probabilities), generator=generator)  # [0, 1): never below 0
    return numbers.to(probabilities.device, non_blocking=True) < probabilities


def likely(probabilities: Tensor, costs: Tensor, groups: Tensor) -> Tensor:
    """Return the most probable sub-net among those of at most the expected cost, bool [n].

    Those are the units of highest probability, each group's best one among them whatever it costs.
    Of equals, groups take turns.

    Args:
        probabilities: [n].
        costs: [n].
        groups: int64 [n], the number of the group of each unit, rising.
    """
    counts = torch.bincount(groups)
    first = torch.cumsum(counts, 0) - counts
    place = torch.arange(len(groups), device=groups.device) - first[groups]
    value = probabilities.double() - 1e-6 * place / counts[groups]
    best = torch.full_like(counts, -1, dtype=value.dtype)
    best.scatter_reduce_(0, groups, value, "amax")
    order = (value + 4 * (value == best[groups])).argsort(descending=True, stable=True)
    spent = costs.double()[order].cumsum(0)
    allowed = (costs * probabilities).double().sum() * (1 + 1e-6)
    kept = (spent <= allowed) & (probabilities[order] > 0)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(0, order, kept) | (
        value == best[groups]
    )
