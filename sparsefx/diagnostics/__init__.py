"""How far sampled gradients are from exact ones, and which ratios to take.

``gradient_error`` compares gradients of a whole model, ``product_error`` each product on its own,
``tune_ratio`` proposes a ratio for every layer under a budget of FLOPs.
"""

from sparsefx.diagnostics.meter import GradientErrors, gradient_error
from sparsefx.diagnostics.products import ProductErrors, product_error
from sparsefx.diagnostics.tuning import Tuning, tune_ratio

__all__ = [
    "GradientErrors",
    "ProductErrors",
    "Tuning",
    "gradient_error",
    "product_error",
    "tune_ratio",
]
