"""``export_onnx``: the model as the compiler would run it, with zeros where weights don't act.

    check the arguments -> find the zeros -> mask a copy -> torch.onnx -> write aside
    -> onnx.checker -> zeros of the file -> onnxruntime against eager -> move into place

All is written in a folder of its own beside the file, which goes away whatever happens.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsefx.config import SparseConfig, as_config
from sparsefx.errors import ConfigError, ExportError
from sparsefx.onnx import compare, facts
from sparsefx.onnx.report import ExportReport
from sparsefx.onnx.zeros import Weight, Zeros, find_zeros

WEIGHTS = ("auto", "dense")
INLINE_LIMIT = 1_500_000_000  # bytes of weights in one file; protobuf ends at 2 GiB
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: nn.Module,
    args: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    config: SparseConfig | str | dict[str, Any] | None = None,
    *,
    weights: str = "dense",
    dynamic_shapes: Any = None,
    verify: bool = True,
) -> ExportReport:
    """Write ``model`` as ONNX, with zeros where the config's N:M masks drop weights.

    Which weights get zeros follows from the config by the compiler's own decisions on the
    inference graph; magnitudes are those of the weights as they are now. A weight that the model
    masks itself is stored as its mask leaves it, and its mask is not in the file. The model is
    exported in eval mode and not changed, its mode included. The file holds plain operators only;
    what the config makes N:M in it stands in its metadata under ``"sparsefx.weights"`` (JSON: one
    object per tensor). Above 1.5 GB the weights go to a second file beside it, ``<name>.data``.

    Args:
        model: a module, compiled or not.
        args: the inputs that it is traced with; a tuple, or one tensor.
        path: of the file; its folder must exist.
        config: as for the backend.
        weights: ``"dense"`` stores the zeros; ``"auto"`` chooses, today always ``"dense"``.
        dynamic_shapes: as for ``torch.onnx.export``.
        verify: run the file in onnxruntime, on ``args`` and on other inputs of the same shapes,
            and compare with the eager masked model. onnx.checker runs in any case.

    Returns:
        What was written, and how far it is from the eager masked model.

    Raises:
        ConfigError: a bad config or ``weights``.
        ExportError: bad ``model``, ``args`` or ``path``; packages are missing; the config wants
            what stored zeros can't express; the exporter, the checker or the comparison failed.
            No file is left behind then, and one that was there before is untouched.
    """
    settings, inputs, target = _checked(model, args, path, config, weights)
    _import_extra(verify)
    masked = _eval_copy(model)
    zeros = find_zeros(masked, inputs, settings)
    _mask(masked, zeros.weights)
    _apply_pruning(masked)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        program = _export(masked, inputs, dynamic_shapes)
        if zeros.stored_masks:
            tensors = [*masked.parameters(), *masked.buffers()]
            _apply_masks(program, max(x.numel() * x.element_size() for x in tensors))
        found = _describe(program, zeros.weights)
        file = aside / target.name
        program.save(str(file), external_data=_weight_bytes(masked) > INLINE_LIMIT)
        _run_checker(str(file))
        report = _read_back(file, target, zeros.weights, found)
        if verify:
            report = _verified(report, file, masked, inputs, zeros)
        _move_into_place(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


# --- before any work


def _checked(
    model: object, args: object, path: str | os.PathLike[str], config: object, weights: str
) -> tuple[SparseConfig, tuple[Any, ...], Path]:
    if weights not in WEIGHTS:
        allowed = ", ".join(map(repr, WEIGHTS))
        raise ConfigError(f"export_onnx: weights={weights!r} is not one of {allowed}")
    settings = as_config(config).resolved()
    if settings.passes:
        names = ", ".join(getattr(f, "__name__", repr(f)) for f in settings.passes)
        raise ExportError(
            f"passes of your own ({names}) edit the compiled graph, and an export stores weights "
            "only; export with a config without them"
        )
    if not isinstance(model, nn.Module):
        raise ExportError(f"model={type(model).__name__} must be a torch.nn.Module")
    if isinstance(args, Tensor):
        args = (args,)
    if not isinstance(args, tuple):
        raise ExportError(f"args must be a tensor or a tuple, got {type(args).__name__}")
    target = Path(path)
    if not target.name or target.is_dir():
        raise ExportError(f"path={str(path)!r} is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ExportError(
            f"path={str(path)!r}: the folder {str(target.parent)!r} doesn't exist; create it first"
        )
    return settings, args, target


def _import_extra(verify: bool) -> None:
    for name in _NEEDED if verify else _NEEDED[:2]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f'export_onnx needs {name}, which is not installed: pip install "sparsefx[onnx]"'
            ) from error


# --- the masked model


def _eval_copy(model: nn.Module) -> nn.Module:
    """Copy everything but the parameters, which nothing here writes to."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module, name in _pruned(model):  # what pruning left from the last forward has a history
        shared[id(getattr(module, name))] = getattr(module, name).detach()
    try:
        return copy.deepcopy(model, shared).eval()
    except (RuntimeError, TypeError) as error:  # a tensor with a history, a lock, a file
        raise ExportError(
            f"the model can't be copied: {error} (remove_weight_norm bakes what it has put in a "
            "parameter's place)"
        ) from error


def _pruned(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What torch.nn.utils.prune masks before each forward: (module, name of the weight)."""
    return [
        (module, hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]


def _apply_pruning(copied: nn.Module) -> None:
    """Leave pruned parameters as plain ones with zeros; the user's own are not written to."""
    for module, name in _pruned(copied):
        original = getattr(module, f"{name}_orig")
        setattr(module, f"{name}_orig", nn.Parameter(original.detach().clone()))
        prune.remove(module, name)  # type: ignore[no-untyped-call]


def _apply_masks(program: Any, limit: int) -> None:
    """Compute in the file what follows from stored tensors alone: masked weights are stored.

    Args:
        program: as the exporter returned it; it stops at a few thousand bytes itself.
        limit: bytes of the largest weight.
    """
    from onnxscript import optimizer

    optimizer.optimize(program.model, input_size_limit=limit, output_size_limit=limit)


def _mask(model: nn.Module, weights: Sequence[Weight]) -> None:
    """Put masked tensors in the place of those in ``weights``, wherever the copy holds them."""
    replaced: dict[int, Tensor] = {}
    for weight in weights:
        old = weight.tensor
        new: Tensor = torch.where(weight.kept(), old.detach(), 0.0)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        replaced[id(old)] = new
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, value in [*parameters, *buffers]:
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])


def _weight_bytes(model: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


# --- the file


def _export(model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any) -> Any:
    try:
        program = torch.onnx.export(
            model, args, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False
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


def _describe(program: Any, weights: list[Weight]) -> dict[str, facts.Fact]:
    """Find the zeros among the program's tensors and say so in its metadata."""
    values = {
        name: value.const_value.numpy()
        for name, value in program.model.graph.initializers.items()
        if value.const_value is not None
    }
    stored = {name: torch.from_numpy(array != 0) for name, array in values.items() if array.ndim}
    found = facts.locate(weights, stored)
    entries = [
        fact.to_dict(name, float(stored[name].double().mean())) for name, fact in found.items()
    ]
    program.model.metadata_props[facts.METADATA_KEY] = json.dumps(entries)
    return found


def _run_checker(path: str) -> None:
    import onnx

    errors = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    try:
        onnx.checker.check_model(path, full_check=True)
    except errors as error:
        raise ExportError(f"onnx.checker refuses the file: {error}") from error


def _read_back(
    file: Path, target: Path, weights: list[Weight], found: dict[str, facts.Fact]
) -> ExportReport:
    """Make the report from the file itself, checking each zero that it promises."""
    import onnx

    proto = onnx.load(str(file))
    names = {weight.name for weight in weights}
    rows = []
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        nonzero, fact = torch.from_numpy(np.asarray(array != 0)), found.get(tensor.name)
        if fact is not None:
            facts.check(tensor.name, nonzero, fact)
        parameter = tensor.name if tensor.name in names else ""
        rows.append(facts.row(tensor.name, nonzero, int(array.nbytes), fact, parameter))
    shown = {row.parameter for row in rows}
    return ExportReport(
        path=str(target),
        bytes=sum(part.stat().st_size for part in file.parent.iterdir()),
        rows=tuple(rows),
        opset=next(entry.version for entry in proto.opset_import if entry.domain == ""),
        hidden=tuple(weight.name for weight in weights if weight.name not in shown),
    )


def _verified(
    report: ExportReport, file: Path, model: nn.Module, args: tuple[Any, ...], zeros: Zeros
) -> ExportReport:
    """Compare the file with the eager masked model and add what came of it to the report."""
    runtime = compare.OnnxRuntime(str(file))
    dtypes = [parameter.dtype for parameter in model.parameters()]
    worst = limit = 0.0
    for kind, inputs in (("the given", args), ("random", compare.fresh_inputs(args))):
        expected = compare.eager_outputs(model, inputs)
        limit = compare.tolerance(expected, dtypes, zeros.depth)
        found = compare.compare(expected, runtime(inputs), limit)
        if found.error > found.tolerance:
            raise ExportError(
                f"{runtime.name} differs from the eager masked model on {kind} inputs: "
                f"{found.where} is off by {found.error:.3g} of its largest value, "
                f"allowed {found.tolerance:.3g}"
            )
        worst = max(worst, found.error)
    return replace(report, max_error=worst, tolerance=limit, runtimes=(runtime.name,))


def _move_into_place(aside: Path, target: Path) -> None:
    """Move the weights before the file that refers to them."""
    try:
        for part in sorted(aside.iterdir(), key=lambda p: p.name == target.name):
            os.replace(part, target.parent / part.name)
    except OSError as error:
        raise ExportError(f"{str(target)!r} can't be written: {error}") from error
