"""Training and pruning with N:M masks: construct on a model, ``step()``, ``squash()``."""

from sparsefx.sparsifiers.base import Layer, Sparsifier
from sparsefx.sparsifiers.mask import Mask
from sparsefx.sparsifiers.report import Report, Row
from sparsefx.sparsifiers.schedules import Constant, Cubic, Linear, Step
from sparsefx.sparsifiers.srste import SRSTE
from sparsefx.sparsifiers.targets import Target, find_targets
from sparsefx.sparsifiers.transposable import TransposableNM

__all__ = [
    "SRSTE",
    "Constant",
    "Cubic",
    "Layer",
    "Linear",
    "Mask",
    "Report",
    "Row",
    "Sparsifier",
    "Step",
    "Target",
    "TransposableNM",
    "find_targets",
]
