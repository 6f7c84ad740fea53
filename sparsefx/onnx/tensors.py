"""Tensors of a file as torch has them, and back; the bytes are the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

DOMAIN = "sparsefx"
_CODES = {  # of onnx.TensorProto.DataType
    torch.float32: 1,
    torch.uint8: 2,
    torch.int64: 7,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def from_proto(proto: Any) -> Tensor:
    """Return the values of an ``onnx.TensorProto``, with its shape and dtype."""
    import onnx

    array = np.array(onnx.numpy_helper.to_array(proto))  # a copy that may be written to
    if array.dtype.name == "bfloat16":  # ml_dtypes', which torch doesn't know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_proto(name: str, tensor: Tensor) -> Any:
    """Return an ``onnx.TensorProto`` of a float, int64 or uint8 tensor."""
    import onnx

    held = tensor.detach().cpu().contiguous()
    return onnx.TensorProto(
        name=name,
        data_type=_CODES[held.dtype],
        dims=held.shape,
        raw_data=held.view(torch.uint8).numpy().tobytes() if held.numel() else b"",
    )


def code_of(dtype: torch.dtype) -> int:
    """Return the number that ONNX has for a dtype."""
    return _CODES[dtype]


def weights_of(model: Any) -> Iterator[tuple[Any, Tensor]]:
    """Yield the floating initializers that a form may be chosen for, with their values."""
    floats = {_CODES[dtype] for dtype in _FLOATS}
    for proto in model.graph.initializer:
        if len(proto.dims) > 1 and proto.data_type in floats:
            tensor = from_proto(proto)
            if tensor.numel():
                yield proto, tensor
