"""A sparse compiler for PyTorch: ``torch.compile(model, backend="sparsefx")``."""

from typing import Any

from sparsefx import kernels, masks, ops, sparsifiers
from sparsefx.calibration import calibrate
from sparsefx.config import NM, Dense, Masked, Rule, Sampled, SparseConfig, preset
from sparsefx.errors import (
    CompactError,
    ConfigError,
    DiagnosticsError,
    ExportError,
    KernelError,
    MaskError,
    PackError,
    PassError,
    SparsefxError,
    SparsefxWarning,
    SparsifierError,
)
from sparsefx.packing import pack, unpack
from sparsefx.registration import register_backend
from sparsefx.report import explain
from sparsefx.schedules import RatioSchedule
from sparsefx.variants import ratio_schedules

__version__ = "0.1.0"

__all__ = [
    "NM",
    "CompactError",
    "ConfigError",
    "Dense",
    "DiagnosticsError",
    "ExportError",
    "KernelError",
    "MaskError",
    "Masked",
    "PackError",
    "PassError",
    "RatioSchedule",
    "Rule",
    "Sampled",
    "SparseConfig",
    "SparsefxError",
    "SparsefxWarning",
    "SparsifierError",
    "calibrate",
    "explain",
    "masks",
    "ops",
    "pack",
    "preset",
    "ratio_schedules",
    "sparsifiers",
    "unpack",
]

kernels.register()
register_backend()


def __getattr__(name: str) -> Any:
    """Import what needs an extra, or is for tests, only when it is asked for."""
    if name == "export_onnx":
        from sparsefx.onnx import export_onnx

        return export_onnx
    if name in ("CompactPlan", "Compacted", "compact_channels"):
        from sparsefx import compact

        return getattr(compact, name)
    if name in ("PermutationReport", "permute_channels"):
        from sparsefx import permutation

        return getattr(permutation, name)
    if name == "diagnostics":
        import sparsefx.diagnostics as diagnostics

        return diagnostics
    if name == "distributed":
        import sparsefx.distributed as distributed

        return distributed
    if name == "testing":
        import sparsefx.testing as testing

        return testing
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
