"""What torch.onnx makes of the masked model: an ``onnx.ModelProto`` with all zeros stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sparsefx.errors import ExportError
from sparsefx.onnx import facts, names, sampled
from sparsefx.onnx.tensors import from_proto
from sparsefx.onnx.zeros import Weight, Zeros

_MERGES_PARAMETERS = "FuseBatchNorm"
_ROUNDS = 2  # of folding and rewriting, as onnxscript has it


@dataclass
class Draft:
    """A model before the forms of its weights are chosen.

    Attributes:
        model: an ``onnx.ModelProto``, with metadata and sampled products.
        weights: the parameters that the config masks.
        facts: what holds of the initializers that carry its zeros, by name.
        sampled: how many products are sampled.
        missing: entries of the state_dict that no initializer holds.
    """

    model: Any
    weights: list[Weight]
    facts: dict[str, facts.Fact]
    sampled: int
    missing: tuple[str, ...]


def draft(
    model: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any,
    zeros: Zeros,
    products: Sequence[sampled.Product],
    renamed: Mapping[str, str],
) -> Draft:
    """Export ``model`` and note in the file what its tensors are.

    Args:
        model: masked, in eval mode.
        args: its inputs.
        dynamic_shapes: as for ``torch.onnx.export``.
        zeros: what was found before it was masked.
        products: all forward products, if some are to be sampled in the file.
        renamed: by the name that ``products`` has for a parameter, that of the state_dict.

    Raises:
        ExportError: when torch.onnx can't write it, or sampled products aren't found in the file.
    """
    program = _export_program(model, args, dynamic_shapes)
    tensors = [*model.parameters(), *model.buffers()]
    largest = max((x.numel() * x.element_size() for x in tensors), default=0)
    proto = _optimize(program, largest if zeros.stored_masks else None)
    found = _describe(proto, zeros.weights)
    stored = {tensor.name: from_proto(tensor) for tensor in proto.graph.initializer}
    entries, missing = names.find_parameters(names.state_of(model), stored)
    names.write(proto, entries)
    held = {entry["parameter"]: entry["tensor"] for entry in entries if "tensor" in entry}
    products = [
        replace(product, parameter=renamed.get(product.parameter, product.parameter))
        for product in products
    ]
    return Draft(proto, zeros.weights, found, sampled.rewrite(proto, products, held), missing)


def _export_program(model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any) -> Any:
    """Run torch.onnx's exporter; its optimizer comes in :func:`_optimize`.

    Raises:
        ExportError: when it can't write the model.
    """
    try:
        program = torch.onnx.export(
            model, args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, optimize=False
        )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(
            f"torch.onnx.export can't write this model: {_innermost(error)}"
        ) from error
    assert program is not None  # dynamo=True returns a program
    return program


def _innermost(error: BaseException) -> str:
    """Say what went wrong without the pages of advice that the exporter wraps around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip()}"


def _optimize(program: Any, fold_limit: int | None) -> Any:
    """Fold constants and apply onnxscript's rewrites; returns the ``onnx.ModelProto``.

    All but one of its rewrites: a batch norm's parameters stay apart from the layer before it, so
    that a file holds the model's own weights. Runtimes merge the two when they load it.

    Args:
        program: as the exporter returned it.
        fold_limit: bytes up to which tensors are computed in advance; None is onnxscript's own.
    """
    from onnx_ir.passes import Sequential
    from onnx_ir.passes import common as passes
    from onnxscript import optimizer, rewriter

    limits = {} if fold_limit is None else dict.fromkeys(
        ("input_size_limit", "output_size_limit"), fold_limit
    )  # fmt: skip
    rules = [
        rule
        for rule in rewriter._DEFAULT_REWRITE_RULES
        if not str(rule.name).startswith(_MERGES_PARAMETERS)
    ]
    model = program.model
    optimizer.inline(model)
    for _ in range(_ROUNDS):
        optimizer.fold_constants(model, onnx_shape_inference=True, **limits)
        model = rewriter.rewrite(model, rules)
    tidy = Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )
    program.model = tidy(model).model
    return program.model_proto


def _describe(model: Any, weights: list[Weight]) -> dict[str, facts.Fact]:
    """Find the zeros among the tensors of an ``onnx.ModelProto``; say so in its metadata."""
    stored = {proto.name: from_proto(proto) != 0 for proto in model.graph.initializer if proto.dims}
    found = facts.locate(weights, stored)
    entry = model.metadata_props.add()
    entry.key = facts.METADATA_KEY
    entry.value = json.dumps(
        [fact.to_dict(name, float(stored[name].double().mean())) for name, fact in found.items()]
    )
    return found
