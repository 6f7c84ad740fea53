"""Models for other runtimes: ``sfx.export_onnx``, with the zeros of the config in the weights.

    export.py     the call: what is checked, in which order, and what is left on disk
    zeros.py      which elements of which parameters the compiler would multiply by zero
    views.py      what a view of a parameter reads
    masking.py    the copy of the model that has these zeros
    drafting.py   what torch.onnx makes of it
    facts.py      where these parameters ended up in the file, and what holds there
    names.py      which tensor of the file is which entry of the state_dict
    sampled.py    sampled products as functions of standard operators
    forms.py      in which form each weight is written: dense, packed.py or coo.py
    writing.py    the file written, checked and read back
    reading.py    ``load_weights``: the weights of a file, whatever their form
    compare.py    the file against the eager model, in a runtime
    report.py     what the caller gets to see
    tensors.py    tensors of a file as torch has them

What other runtimes do with such files: README.md. Needs ``pip install "sparsefx[onnx]"``.
"""

from sparsefx.onnx.export import export_onnx
from sparsefx.onnx.reading import load_weights
from sparsefx.onnx.report import ExportReport, TensorRow

__all__ = ["ExportReport", "TensorRow", "export_onnx", "load_weights"]
