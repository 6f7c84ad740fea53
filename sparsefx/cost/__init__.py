"""What a product costs in operations, bytes and time, and whether sparse is worth it."""

from sparsefx.cost.breakeven import BreakEven, break_even
from sparsefx.cost.calibrated import digest, pace_of, table
from sparsefx.cost.choice import predicted, predicted_dense, told, unprofitable
from sparsefx.cost.expressions import Expressions, expressions
from sparsefx.cost.fitting import Fit, Sample, fit
from sparsefx.cost.kept import FEWEST_WEIGHTS, MOST_FUSED, reads_kept
from sparsefx.cost.measured import Calibration, Measured
from sparsefx.cost.paces import MARGIN, PACES, Pace
from sparsefx.cost.products import (
    dense_flops,
    executes_dense,
    packed_weight_bytes,
    sparse_flops,
)
from sparsefx.cost.vendor import vendor_pays
from sparsefx.cost.work import Work, dense_work, sampled_work, total

__all__ = [
    "FEWEST_WEIGHTS",
    "MARGIN",
    "MOST_FUSED",
    "PACES",
    "BreakEven",
    "Calibration",
    "Expressions",
    "Fit",
    "Measured",
    "Pace",
    "Sample",
    "Work",
    "break_even",
    "dense_flops",
    "dense_work",
    "digest",
    "executes_dense",
    "expressions",
    "fit",
    "pace_of",
    "packed_weight_bytes",
    "predicted",
    "predicted_dense",
    "reads_kept",
    "sampled_work",
    "sparse_flops",
    "table",
    "told",
    "total",
    "unprofitable",
    "vendor_pays",
]
