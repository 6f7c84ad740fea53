"""Models for other runtimes: ``sfx.export_onnx``, with the zeros of the config in the weights.

    export.py     the call: what is checked, in which order, and what is left on disk
    zeros.py      which elements of which parameters the compiler would multiply by zero
    facts.py      where these parameters ended up in the file, and what holds there
    compare.py    the file against the eager model, in a runtime
    report.py     what the caller gets to see

Needs ``pip install "sparsefx[onnx]"``.
"""

from sparsefx.onnx.export import export_onnx
from sparsefx.onnx.report import ExportReport, TensorRow

__all__ = ["ExportReport", "TensorRow", "export_onnx"]
