"""Weights of a file as a state_dict, in whichever form they were written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsefx.errors import ExportError
from sparsefx.onnx import coo, names, packed
from sparsefx.onnx.tensors import DOMAIN, from_proto


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights of a file that :func:`sparsefx.export_onnx` wrote.

    Args:
        path: of the file; external data lies beside it.

    Returns:
        Dense tensors on the CPU under the model's own names, in their shapes and dtypes: what
        ``model.load_state_dict`` takes, once masks and parametrizations are baked in. Weights are
        those that act, so with zeros where a mask was. Not there is what
        ``ExportReport.missing`` names: tensors of more than 16 kB that the exporter merged with
        others, or that the inference graph doesn't read.

    Raises:
        ExportError: when there is no such file, it is no ONNX file, export_onnx didn't write it,
            or it lacks a tensor that it should hold.
    """
    model = open_file(path)
    entries = names.read(model)
    if entries is None:
        raise ExportError(
            f"{str(path)!r} has no metadata {names.METADATA_KEY!r}, which says what the model "
            "calls its weights: only files that export_onnx wrote can be read"
        )
    stored = stored_tensors(model)
    state = {}
    for entry in entries:
        if "tensor" not in entry:
            state[entry["parameter"]] = names.from_entry(entry)
            continue
        if entry["tensor"] not in stored:
            raise ExportError(
                f"{str(path)!r} lacks tensor {entry['tensor']!r} of parameter "
                f"{entry['parameter']!r}; some tools drop sparse initializers: export it again"
            )
        tensor = stored[entry["tensor"]]
        state[entry["parameter"]] = tensor.t().contiguous() if entry["transposed"] else tensor
    return state


def open_file(path: str | os.PathLike[str]) -> Any:
    """Return the ``onnx.ModelProto``, external data included.

    Raises:
        ExportError: when it can't be read.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not Path(path).is_file():
        raise ExportError(f"path={str(path)!r}: there is no such file")
    try:
        return onnx.load(str(path))
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{str(path)!r} can't be read as ONNX: {error}") from error


def stored_tensors(model: Any) -> dict[str, Tensor]:
    """Return the initializers of an ``onnx.ModelProto`` by name, dense whatever their form."""
    protos = {proto.name: proto for proto in model.graph.initializer}
    packs = [n for n in model.graph.node if n.domain == DOMAIN and n.op_type == packed.NAME]
    parts = {name for node in packs for name in node.input}
    found = {name: from_proto(proto) for name, proto in protos.items() if name not in parts}
    found.update({node.output[0]: packed.unpack(node, protos) for node in packs})
    found.update({s.values.name: coo.unpack(s) for s in model.graph.sparse_initializer})
    return found
