"""In which form each weight is written: with its zeros, packed, or as a sparse tensor.

dense    the initializer as it is
packed   packed.py: N:M zeros along any axis; values, codes, a function
coo      coo.py: any zeros; values, indices
auto     for each tensor the one of these that takes the fewest bytes
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsefx.errors import ExportError
from sparsefx.masks import density
from sparsefx.onnx import coo, packed
from sparsefx.onnx.tensors import DOMAIN, weights_of

FORMS = ("dense", "packed", "coo")
_SPARSE = 0.9  # density: with more than this no one set zeros on purpose
_NODE = 300  # bytes of an NMUnpack node and of the names that it needs
_NAMES = 50  # bytes that a sparse initializer has beside values and indices


@dataclass(frozen=True)
class Choice:
    """How one initializer is written.

    Attributes:
        name: of the initializer.
        tensor: its values.
        form: "dense", "packed" or "coo".
        bytes: in that form, names left out.
        why: the reason, with sizes.
        groups: the pattern that it is packed by.
    """

    name: str
    tensor: Tensor
    form: str
    bytes: int
    why: str
    groups: packed.Groups | None = None


def choose(
    model: Any, weights: str, force: bool = False, allowed: Container[str] = FORMS
) -> list[Choice]:
    """Choose a form for every weight (floating, rank 2 or more) of an ``onnx.ModelProto``.

    Args:
        model: as the exporter wrote it, all initializers dense.
        weights: "dense", "packed", "coo" or "auto".
        force: write sparse tensors that are larger than dense ones.
        allowed: which forms "auto" may take.

    Raises:
        ExportError: when no weight can take the form that was asked for, or, unless forced, when
            sparse tensors would be larger.
    """
    if weights == "dense":
        return []
    tensors = [(proto.name, tensor) for proto, tensor in weights_of(model)]
    if weights == "auto":
        return [_smallest(name, tensor, allowed) for name, tensor in tensors]
    make = _as_packed if weights == "packed" else _as_coo
    found = [choice for name, tensor in tensors if (choice := make(name, tensor)) is not None]
    if not found:
        raise ExportError(_nothing(weights, tensors))
    if weights == "coo" and not force:
        _refuse_larger(found)
    return found


def _nothing(weights: str, tensors: Sequence[tuple[str, Tensor]]) -> str:
    wanted = {
        "packed": "N:M zeros with m = 2, 4, 8, 16 or 32 along an axis that m divides",
        "coo": "a tenth or more zeros",
    }[weights]
    if not tensors:
        return f"weights={weights!r}: the file holds no floating weight; use weights='dense'"
    name, tensor = min(tensors, key=lambda pair: density(pair[1]))
    return (
        f"weights={weights!r}: none of {len(tensors)} weights has {wanted} (fewest nonzeros: "
        f"{name!r} {tuple(tensor.shape)}, density {density(tensor):.3g}); give a config that "
        "makes some, or use weights='dense'"
    )


def _dense(name: str, w: Tensor, why: str) -> Choice:
    return Choice(name, w, "dense", packed.dense_bytes(w), why)


def _as_packed(name: str, w: Tensor) -> Choice | None:
    groups = packed.find_groups(w)
    if groups is None:
        return None
    why = f"{groups}: {groups.bytes} of {packed.dense_bytes(w)} bytes"
    return Choice(name, w, "packed", groups.bytes, why, groups)


def _as_coo(name: str, w: Tensor) -> Choice | None:
    share = density(w)
    if not 0 < share <= _SPARSE:
        return None
    size = coo.size(w)
    why = f"{1 - share:.1%} zeros: {size} of {packed.dense_bytes(w)} bytes"
    return Choice(name, w, "coo", size, why)


def _smallest(name: str, w: Tensor, allowed: Container[str]) -> Choice:
    rows = [c for c in (_as_packed(name, w), _as_coo(name, w)) if c and c.form in allowed]
    overhead = {"packed": _NODE, "coo": _NAMES}
    dense = packed.dense_bytes(w)
    best = min(rows, key=lambda c: c.bytes + overhead[c.form], default=None)
    if best is not None and best.bytes + overhead[best.form] < dense:
        return best
    return _dense(name, w, f"density {density(w):.3g}: no other form is smaller")


def _refuse_larger(found: Sequence[Choice]) -> None:
    """Say no to sparse tensors that take more than dense ones."""
    larger = [choice for choice in found if choice.bytes >= packed.dense_bytes(choice.tensor)]
    if larger:
        worst = max(larger, key=lambda c: c.bytes - packed.dense_bytes(c.tensor))
        w = worst.tensor
        raise ExportError(
            f"weights='coo': {worst.name!r} {tuple(w.shape)} {w.dtype} has "
            f"{1 - density(w):.1%} zeros and would take {worst.bytes} bytes, "
            f"{packed.dense_bytes(w)} dense ({len(larger)} of {len(found)} weights are larger); "
            f"this form is smaller above {coo.break_even(w.dtype):.1%} zeros: use weights='packed' "
            "or 'dense', or force=True"
        )


def apply(model: Any, choices: Sequence[Choice]) -> Any:
    """Return a copy of an ``onnx.ModelProto`` with its initializers in the chosen forms."""
    changed = {choice.name: choice for choice in choices if choice.form != "dense"}
    if not changed:
        return model
    written = type(model)()
    written.CopyFrom(model)
    graph = written.graph
    kept = [proto for proto in model.graph.initializer if proto.name not in changed]
    known = [info for info in model.graph.value_info if info.name not in changed]
    nodes = []
    del graph.initializer[:]
    del graph.value_info[:]  # of sparse initializers: the checker wants none
    graph.value_info.extend(known)
    graph.initializer.extend(kept)
    for choice in changed.values():
        if choice.groups is None:
            graph.sparse_initializer.append(coo.pack(choice.name, choice.tensor))
            continue
        tensors, node = packed.pack(choice.name, choice.tensor, choice.groups)
        graph.initializer.extend(tensors)
        nodes.append(node)
        graph.value_info.append(packed.value_info(choice.name, choice.tensor))
    if nodes:
        others = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *others])
        add_domain(written)
        opset = next(entry.version for entry in written.opset_import if entry.domain == "")
        packed.add_function(written, opset)
    return written


def add_domain(model: Any) -> None:
    """Import the domain "sparsefx", version 1, once."""
    import onnx

    if DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
