"""``export_onnx``: the model as the compiler would run it, in plain ONNX.

    check the arguments -> find the zeros -> mask a copy -> torch.onnx -> sampled products
    -> choose forms -> write aside -> onnx.checker -> read back -> onnxruntime against eager
    -> move into place

All is written in a folder of its own beside the file, which goes away whatever happens.
"""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsefx import compat
from sparsefx.config import SparseConfig, as_config
from sparsefx.errors import ConfigError, ExportError
from sparsefx.onnx import compare, drafting, forms, masking
from sparsefx.onnx import sampled as sampling
from sparsefx.onnx.report import ExportReport
from sparsefx.onnx.writing import write
from sparsefx.onnx.zeros import find_zeros

WEIGHTS = ("auto", *forms.FORMS)
SAMPLED = ("sampled", "exact")
INLINE_LIMIT = 1_500_000_000  # bytes of weights in one file; protobuf ends at 2 GiB
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: nn.Module,
    args: Tensor | tuple[Any, ...],
    path: str | os.PathLike[str],
    config: SparseConfig | str | dict[str, Any] | None = None,
    weights: str = "auto",
    dynamic_shapes: Any = None,
    sampled: str = "sampled",
    verify: bool = True,
    force: bool = False,
    *,
    external_above: int | None = None,
) -> ExportReport:
    """Write ``model`` as ONNX, with zeros where the config's N:M masks drop weights.

    Which weights get zeros follows from the config by the compiler's own decisions on the
    inference graph; magnitudes are those of the weights as they are now. A weight that the model
    masks itself is stored as its mask leaves it, and its mask is not in the file. The model is
    exported in eval mode and not changed, its mode included. A runtime with opset 18 or later runs
    the file; what each was seen to do stands in README.md beside this. What the config makes N:M
    stands in the metadata under ``"sparsefx.weights"`` (JSON: one object per tensor), the model's
    names for the tensors under ``"sparsefx.parameters"``.

    Args:
        model: a module, compiled or not.
        args: the inputs that it is traced with; a tuple, or one tensor.
        path: of the file; its folder must exist.
        config: as for the backend. None takes that of a model compiled by sparsefx.
        weights: how weights with zeros are stored. ``"dense"``: with the zeros. ``"packed"``: N:M
            weights as kept values and bit-packed places, which a function of standard operators
            expands. ``"coo"``: as sparse initializers (values and int64 indices), refused where
            these are larger than dense. ``"auto"``: each in its smallest form that onnx.checker
            and onnxruntime take. All of this is size on disk: runtimes multiply dense weights.
        dynamic_shapes: as for ``torch.onnx.export``.
        sampled: ``"sampled"`` writes products that the config samples at inference as functions
            of standard operators; ``"exact"`` writes them dense.
        verify: run the file in onnxruntime, on ``args`` and on other inputs of the same shapes,
            and compare with the eager masked model. onnx.checker runs in any case.
        force: write ``"coo"`` weights even where they are larger than dense ones.
        external_above: bytes of weights above which they go to a second file beside the first,
            ``<name>.data``; 1.5 GB by default.

    Returns:
        What was written, in which forms, and how far it is from the eager masked model.

    Raises:
        ConfigError: a bad config, ``weights``, ``sampled`` or ``external_above``.
        ExportError: bad ``model``, ``args`` or ``path``; packages are missing; the config wants
            what a file can't express; no weight can take the form; the exporter, the checker or
            the comparison failed. No file is left behind then, and one that was there before is
            untouched.
    """
    _check_options(weights, sampled, external_above)
    settings, inputs, target = _checked(model, args, path, _config_of(model, config))
    _import_extra(verify or weights == "auto")
    masked = masking.eval_copy(model)
    zeros = find_zeros(masked, inputs, settings)
    products = zeros.products if sampled == "sampled" else []
    sampling.check(products)
    masking.mask(masked, zeros.weights)
    names = masking.apply_pruning(masked)
    limit = INLINE_LIMIT if external_above is None else external_above
    with _aside(target) as file:
        draft = drafting.draft(masked, inputs, dynamic_shapes, zeros, products, names)
        report, runtime = write(draft, file, weights, force, limit)
        report = replace(report, path=str(target))
        if verify:
            runtime = runtime or compare.OnnxRuntime(str(file))
            run = _sampling(masked, settings) if draft.sampled else masked
            report = _verified(report, runtime, masked, run, inputs, zeros.depth)
        _move_into_place(file.parent, target)
    return report


# --- before any work


def _check_options(weights: str, sampled: str, external_above: int | None) -> None:
    for key, given, known in (("weights", weights, WEIGHTS), ("sampled", sampled, SAMPLED)):
        if given not in known:
            allowed = ", ".join(map(repr, known))
            raise ConfigError(f"export_onnx: {key}={given!r} is not one of {allowed}")
    whole = isinstance(external_above, int) and not isinstance(external_above, bool)
    if external_above is not None and not (whole and external_above >= 0):
        raise ConfigError(
            f"export_onnx: external_above={external_above!r} must be a number of bytes, 0 or more"
        )


def _config_of(model: Any, config: Any) -> Any:
    """The config that was given, or that the model was compiled with."""
    wrapper: Any = compat.wrapper_of(model) if config is None else None
    if wrapper is None or not compat.made_by(wrapper, "sparsefx.backend"):
        return config
    return compat.options_of(wrapper).get("config")


def _checked(
    model: object, args: object, path: str | os.PathLike[str], config: Any
) -> tuple[SparseConfig, tuple[Any, ...], Path]:
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


def _import_extra(runtime: bool) -> None:
    for name in _NEEDED if runtime else _NEEDED[:2]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f'export_onnx needs {name}, which is not installed: pip install "sparsefx[onnx]"'
            ) from error


# --- the file


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """Yield the file's place in a folder of its own, on the same disk."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sampling(model: nn.Module, settings: SparseConfig) -> Callable[..., Any]:
    """The masked model with its sampled products, operator by operator."""
    config = replace(settings, codegen="aot_eager")
    compiled: Callable[..., Any] = compat.compile_apart(
        model, "sparsefx", options={"config": config}
    )
    return compiled


def _verified(
    report: ExportReport,
    runtime: compare.OnnxRuntime,
    model: nn.Module,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    depth: int,
) -> ExportReport:
    """Compare the file with ``run``, the eager masked model; put the result into the report."""
    dtypes = [parameter.dtype for parameter in model.parameters()]
    worst = limit = 0.0
    for kind, inputs in (("the given", args), ("random", compare.fresh_inputs(args))):
        expected = compare.eager_outputs(run, inputs)
        limit = compare.tolerance(expected, dtypes, depth)
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
