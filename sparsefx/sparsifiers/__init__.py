"""Training and pruning with N:M masks: construct on a model, ``step()``, ``squash()``."""

from typing import Any

from sparsefx.sparsifiers.adaprune import AdaPrune, adam_fit
from sparsefx.sparsifiers.base import Layer, Sparsifier
from sparsefx.sparsifiers.calibration import Calibration, CalibrationRow
from sparsefx.sparsifiers.conversion import nm_for_sparsity
from sparsefx.sparsifiers.dst import DST
from sparsefx.sparsifiers.evolving import SET, Evolving
from sparsefx.sparsifiers.least_squares import least_squares
from sparsefx.sparsifiers.mask import Mask
from sparsefx.sparsifiers.pfp import FilterReport, FilterRow, ProvableFilterPruner
from sparsefx.sparsifiers.recalibrate import recalibrate_batchnorm
from sparsefx.sparsifiers.report import Report, Row
from sparsefx.sparsifiers.rigl import RigL
from sparsefx.sparsifiers.schedules import Constant, Cubic, Linear, Step
from sparsefx.sparsifiers.sparsegpt import SparseGPT
from sparsefx.sparsifiers.srste import SRSTE
from sparsefx.sparsifiers.static import Static
from sparsefx.sparsifiers.targets import Target, find_targets
from sparsefx.sparsifiers.thresholds import ThresholdMask, long_tailed
from sparsefx.sparsifiers.transposable import TransposableNM
from sparsefx.sparsifiers.unstructured import Unstructured
from sparsefx.sparsifiers.wanda import Wanda

__all__ = [
    "DST",
    "SET",
    "SRSTE",
    "AdaPrune",
    "Calibration",
    "CalibrationRow",
    "Constant",
    "Cubic",
    "Evolving",
    "FilterReport",
    "FilterRow",
    "Layer",
    "Linear",
    "Mask",
    "ProvableFilterPruner",
    "Report",
    "RigL",
    "Row",
    "SparseGPT",
    "Sparsifier",
    "Static",
    "Step",
    "Target",
    "ThresholdMask",
    "TransposableNM",
    "Unstructured",
    "Wanda",
    "adam_fit",
    "find_targets",
    "least_squares",
    "long_tailed",
    "nm_for_sparsity",
    "recalibrate_batchnorm",
]


def __getattr__(name: str) -> Any:
    """Import what walks a model's graph only when it is asked for."""
    if name == "VRPGE":
        from sparsefx.sparsifiers.vrpge import VRPGE

        return VRPGE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
