"""Masks: which weights act. Plain functions of torch tensors, usable without the compiler."""

from sparsefx.masks.diversity import Diversity, mask_diversity
from sparsefx.masks.magnitude import nm_mask
from sparsefx.masks.measures import Verdict, density, is_valid, retained
from sparsefx.masks.transposable import transposable_mask

__all__ = [
    "Diversity",
    "Verdict",
    "density",
    "is_valid",
    "mask_diversity",
    "nm_mask",
    "retained",
    "transposable_mask",
]
