"""Where masked parameters ended up in the file, and whether the zeros hold there.

The exporter renames and transposes weights (a MatMul takes [in, out]) and folds a batch norm's
scale into a convolution, so a tensor is known by its name or, failing that, by where its zeros are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefx import masks
from sparsefx.config import NM
from sparsefx.errors import ExportError
from sparsefx.onnx.zeros import Use, Weight

METADATA_KEY = "sparsefx.weights"


@dataclass(frozen=True)
class Fact:
    """What holds of one tensor of the file: ``pattern`` along its own axis ``dim``."""

    parameter: str
    layer: str
    pattern: NM
    dim: int

    def __str__(self) -> str:
        """Return the report's word for it."""
        nm = f"{self.pattern.n}:{self.pattern.m}"
        return f"{nm} transposable" if self.pattern.transposable else f"{nm} along dim {self.dim}"

    def to_dict(self, name: str, density: float) -> dict[str, Any]:
        """Return what the file's metadata says of the tensor called ``name``."""
        return {
            "name": name,
            "parameter": self.parameter,
            "layer": self.layer,
            "n": self.pattern.n,
            "m": self.pattern.m,
            "dim": self.dim,
            "transposable": self.pattern.transposable,
            "density": density,
        }


def locate(weights: list[Weight], stored: Mapping[str, Tensor]) -> dict[str, Fact]:
    """Find the masked parameters among the file's tensors.

    Args:
        weights: the masked parameters, with their unmasked values.
        stored: by name, which elements of each tensor of the file aren't zero (bool).

    Returns:
        A fact by name, for the tensors that carry zeros on purpose.
    """
    by_name: dict[str, Fact] = {}
    by_zeros: dict[str, Fact] = {}
    for weight in weights:
        acting = (weight.tensor.detach() != 0) & weight.kept()
        for use in weight.masked:
            read, fact = acting.flatten()[use.index], _fact(weight, use, use.dim)
            by_zeros.setdefault(_digest(read), fact)
            if read.dim() == 2:
                by_zeros.setdefault(_digest(read.t()), _fact(weight, use, 1 - use.dim))
        if (whole := _fact_of_whole(weight)) is not None:
            by_name[weight.name] = whole
            by_zeros.setdefault(_digest(acting), whole)
    found = {}
    for name, nonzero in stored.items():
        seen = by_name.get(name) or by_zeros.get(_digest(nonzero))
        if seen is not None:
            found[name] = seen
    return found


def _fact(weight: Weight, use: Use, dim: int) -> Fact:
    assert use.pattern is not None
    return Fact(weight.name, use.layer, use.pattern, dim)


def _fact_of_whole(weight: Weight) -> Fact | None:
    """What holds of the stored parameter, where its uses read slices of it in one pattern."""
    first = weight.masked[0]
    assert first.pattern is not None
    if any(use.pattern != first.pattern for use in weight.masked):
        return None
    kept, nm = weight.kept(), first.pattern
    if kept.dim() < 2 or (nm.transposable and kept.dim() != first.index.dim()):
        return None
    for dim in (first.dim, *range(kept.dim())):
        if masks.is_valid(kept, nm.n, nm.m, dim, nm.transposable):
            return _fact(weight, first, dim)
    return None


def _digest(nonzero: Tensor) -> str:
    bits = nonzero.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return f"{tuple(nonzero.shape)} {hashlib.sha256(bits).hexdigest()}"


def check(name: str, nonzero: Tensor, fact: Fact) -> None:
    """Raise ExportError unless the zeros of a stored tensor are what ``fact`` says."""
    nm = fact.pattern
    verdict = masks.is_valid(nonzero, nm.n, nm.m, fact.dim, nm.transposable)
    if not verdict:
        raise ExportError(
            f"tensor {name!r} of the file, parameter {fact.parameter!r}, is not {fact}: "
            f"{verdict.reason}"
        )
