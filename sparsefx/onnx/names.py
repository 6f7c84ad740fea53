"""Which tensor of the file holds which entry of the model's state_dict.

What the exporter merged with something else, or the graph doesn't read, lies in the metadata where
it is small: its folding leaves nothing larger than a few thousand bytes without a tensor.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

METADATA_KEY = "sparsefx.parameters"
_SMALL = 16384  # bytes


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict that ``model`` has once its parametrizations are baked in."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for path, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        start = f"{path}." if path else ""
        for name in module.parametrizations:
            inside = f"{start}parametrizations.{name}."
            state = {key: value for key, value in state.items() if not key.startswith(inside)}
            with torch.no_grad():
                state[start + name] = getattr(module, name).detach()
    return state


def baked_name(name: str) -> str:
    """What a parameter is called once masks and parametrizations are baked in."""
    name = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name)
    return name


def find_parameters(
    state: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """Find entries of a state_dict among the tensors of a file, by name and values.

    Args:
        state: what was exported.
        stored: the file's initializers by name.

    Returns:
        One object per entry: ``parameter``, ``tensor`` and ``transposed`` where an initializer
        holds it; ``parameter``, ``dtype``, ``shape`` and ``data`` (base64, "" for zeros) where it
        is small or zero. And the names of all others.
    """
    by_value: dict[str, tuple[str, bool]] = {}
    for name, tensor in stored.items():
        if tensor.dim() == 2:
            by_value.setdefault(_digest(tensor.t()), (name, True))
    by_value.update({_digest(tensor): (name, False) for name, tensor in stored.items()})
    entries, left = [], []
    for parameter, tensor in state.items():
        held = tensor.detach().cpu()
        same = stored.get(parameter)
        found: tuple[str, bool] | None
        if same is not None and same.dtype == held.dtype and torch.equal(same, held):
            found = parameter, False
        else:
            found = by_value.get(_digest(held))
        if found is None:
            left.append(parameter)
        else:
            entries.append(_entry(parameter, *found))
    return _with_masked(entries, left, state, stored)


def _with_masked(
    entries: list[dict[str, Any]], left: list[str], state: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:  # fmt: skip
    """Find weights that the model masks by hand: the file holds what the mask leaves."""
    used = {entry["tensor"] for entry in entries}
    free = {name: tensor for name, tensor in stored.items() if name not in used}
    missing = []
    for parameter in left:
        held = state[parameter].detach().cpu()
        for name, tensor in free.items():
            turned = [tensor, tensor.t()] if tensor.dim() == 2 else [tensor]
            fits = [_masks(view, held) for view in turned]
            if any(fits):
                entries.append(_entry(parameter, name, not fits[0]))
                break
        else:
            if held.any() and held.numel() * held.element_size() > _SMALL:
                missing.append(parameter)
            else:
                entries.append(_beside(parameter, held))
    return entries, tuple(missing)


def _masks(tensor: Tensor, whole: Tensor) -> bool:
    """Whether ``tensor`` is ``whole`` with some, but not all, elements set to zero."""
    if tensor.shape != whole.shape or tensor.dtype != whole.dtype or tensor.dim() < 2:
        return False
    kept = tensor != 0
    return bool(kept.any()) and torch.equal(tensor, torch.where(kept, whole, 0))


def _entry(parameter: str, name: str, transposed: bool) -> dict[str, Any]:
    return {"parameter": parameter, "tensor": name, "transposed": transposed}


def _beside(parameter: str, tensor: Tensor) -> dict[str, Any]:
    data = _content(tensor) if tensor.any() else b""
    return {
        "parameter": parameter,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode(),
    }


def from_entry(entry: Mapping[str, Any]) -> Tensor:
    """Return the tensor of an entry that no initializer holds."""
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    data = bytearray(base64.b64decode(entry["data"]))
    if not data:
        return torch.zeros(entry["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(entry["shape"])


def _content(tensor: Tensor) -> bytes:
    held = tensor.contiguous().reshape(-1)
    return held.view(torch.uint8).numpy().tobytes() if held.numel() else b""


def _digest(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_content(tensor)).hexdigest()}"


def write(model: Any, entries: list[dict[str, Any]]) -> None:
    """Put ``entries`` into the metadata of an ``onnx.ModelProto``."""
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA_KEY, json.dumps(entries)


def read(model: Any) -> list[dict[str, Any]] | None:
    """Return the entries that :func:`write` put there; None in a file without."""
    found = [entry.value for entry in model.metadata_props if entry.key == METADATA_KEY]
    return json.loads(found[0]) if found else None
