"""Masks: which weights act. Plain functions of torch tensors, usable without the compiler."""

from sparsefx.masks.certificate import Certificate, certify
from sparsefx.masks.devices import accelerate
from sparsefx.masks.diversity import Diversity, mask_diversity
from sparsefx.masks.finding import FoundPattern, find_pattern
from sparsefx.masks.magnitude import nm_mask
from sparsefx.masks.measures import Verdict, density, is_valid, retained, sad
from sparsefx.masks.transposable import transposable_mask

__all__ = [
    "Certificate",
    "Diversity",
    "FoundPattern",
    "Verdict",
    "accelerate",
    "certify",
    "density",
    "find_pattern",
    "is_valid",
    "mask_diversity",
    "nm_mask",
    "retained",
    "sad",
    "transposable_mask",
]
