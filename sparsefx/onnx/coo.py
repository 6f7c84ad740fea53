"""Weights as ONNX's own sparse tensors: values and linear indices, in ``sparse_initializer``.

    initializer w[*]   ->   sparse_initializer w: values [nnz], indices [nnz] (int64), dims

An index takes 8 bytes, so that a tensor is smaller than with its zeros only where
nnz * (8 + bytes of a value) < numel * bytes of a value: above 66.7 % zeros in float32, 80 % in 16
bits, 50 % in float64. A runtime makes a dense tensor of it when it loads the file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparsefx.errors import ExportError
from sparsefx.onnx.tensors import from_proto, to_proto

_INDEX_BYTES = 8


def size(w: Tensor) -> int:
    """Bytes of values and indices."""
    return int(torch.count_nonzero(w)) * (w.element_size() + _INDEX_BYTES)


def break_even(dtype: torch.dtype) -> float:
    """Share of zeros above which this form is the smaller one."""
    return 1 - dtype.itemsize / (dtype.itemsize + _INDEX_BYTES)


def pack(name: str, w: Tensor) -> Any:
    """Return the ``onnx.SparseTensorProto`` of ``w``."""
    import onnx

    flat = w.flatten()
    indices = flat.nonzero().flatten()  # ascending, as the standard asks
    return onnx.SparseTensorProto(
        values=to_proto(name, flat[indices]),
        indices=to_proto(f"{name}.indices", indices),
        dims=w.shape,
    )


def unpack(sparse: Any) -> Tensor:
    """Return the dense tensor of an ``onnx.SparseTensorProto`` with linear indices.

    Raises:
        ExportError: when its indices are coordinates, which :func:`pack` doesn't write.
    """
    values, indices = from_proto(sparse.values), from_proto(sparse.indices)
    if indices.dim() != 1:
        raise ExportError(
            f"sparse tensor {sparse.values.name!r} has indices of shape {tuple(indices.shape)}; "
            "only linear indices [nnz], as export_onnx writes them, can be read"
        )
    dense = values.new_zeros(math.prod(sparse.dims))
    dense[indices] = values
    return dense.reshape(tuple(sparse.dims))
