"""Training and pruning with N:M masks: construct on a model, ``step()``, ``squash()``."""

from sparsefx.sparsifiers.base import Layer, Sparsifier
from sparsefx.sparsifiers.mask import Mask
from sparsefx.sparsifiers.report import Report, Row
from sparsefx.sparsifiers.targets import Target, find_targets

__all__ = [
    "Layer",
    "Mask",
    "Report",
    "Row",
    "Sparsifier",
    "Target",
    "find_targets",
]
