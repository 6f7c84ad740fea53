"""How far sampled gradients are from exact ones, which ratios to take, what a network has learned.

``gradient_error`` compares gradients of a whole model, ``product_error`` each product on its own,
``tune_ratio`` proposes a ratio for every layer under a budget of FLOPs. ``tangent_report`` sets a
trained network beside regression with the kernel that it has learned.
"""

from sparsefx.diagnostics.meter import GradientErrors, gradient_error
from sparsefx.diagnostics.products import ProductErrors, product_error
from sparsefx.diagnostics.tangent import TangentReport, tangent_report
from sparsefx.diagnostics.tuning import Tuning, tune_ratio

__all__ = [
    "GradientErrors",
    "ProductErrors",
    "TangentReport",
    "Tuning",
    "gradient_error",
    "product_error",
    "tangent_report",
    "tune_ratio",
]
