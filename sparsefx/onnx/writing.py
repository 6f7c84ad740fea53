"""The draft in its forms, written, checked by onnx.checker and onnxruntime, and read back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefx.errors import ExportError
from sparsefx.masks import density
from sparsefx.onnx import compare, facts, forms, reading
from sparsefx.onnx.drafting import Draft
from sparsefx.onnx.report import ExportReport, TensorRow

_BESIDE = 256  # bytes: smaller tensors stay in the file when others lie beside it


def write(
    draft: Draft, file: Path, weights: str, force: bool, limit: int
) -> tuple[ExportReport, compare.OnnxRuntime | None]:
    """Write ``draft`` to ``file``, alone in its folder.

    Args:
        draft: the model with all zeros stored.
        file: its place.
        weights: "dense", "packed", "coo" or "auto".
        force: see :func:`forms.choose`.
        limit: bytes of weights above which they lie beside the file.

    Returns:
        The report, and the file in onnxruntime where it was tried there.

    Raises:
        ExportError: when no weight can take the form, or onnx.checker refuses the file.
    """
    if weights == "auto":
        return _smallest(draft, file, limit)
    choices = forms.choose(draft.model, weights, force)
    why = f"weights={weights!r}"
    if weights == "coo":  # what is around the weights is checked in full with these dense
        _attempt(draft, file, [], limit, why)
        why += f"; {_UNTYPED}"
    return _attempt(draft, file, choices, limit, why, full=weights != "coo"), None


# to infer types, onnx takes a sparse initializer for a sparse value, which no operator accepts;
# runtimes take it for a dense one
_UNTYPED = "onnx.checker takes sparse initializers only without its inference of types"
_TRIES: tuple[tuple[str, ...], ...] = (("packed", "coo"), ("packed",), ())


def _smallest(
    draft: Draft, file: Path, limit: int
) -> tuple[ExportReport, compare.OnnxRuntime | None]:
    """Write the smallest file that onnx.checker and onnxruntime take."""
    refused: dict[str, list[forms.Choice]] = {}  # by reason
    tried = set[str]()
    for allowed in _TRIES:
        choices = forms.choose(draft.model, "auto", allowed=allowed)
        form = _form(choices)
        if form in tried:
            continue
        tried.add(form)
        try:
            report = _attempt(draft, file, choices, limit, "; ".join([_auto(choices), *refused]))
            if form != "dense" and report.bytes >= report.dense_bytes:
                raise ExportError(f"{report.bytes} bytes of {report.dense_bytes} dense")
            return report, compare.OnnxRuntime(str(file))
        except ExportError as error:
            refused[f"{form} refused: {error}"] = choices
    return _unrunnable(draft, file, limit, refused), None


def _unrunnable(
    draft: Draft, file: Path, limit: int, refused: dict[str, list[forms.Choice]]
) -> ExportReport:
    """Write a model that onnxruntime can't run in any form: with its zeros.

    Raises:
        ExportError: when onnx.checker refuses it, too.
    """
    (*_, (why, choices)) = refused.items()
    return _attempt(draft, file, choices, limit, why)


def _auto(choices: Sequence[forms.Choice]) -> str:
    counts = Counter(choice.form for choice in choices)
    return "auto: of {} weights {} packed, {} coo".format(
        len(choices), counts["packed"], counts["coo"]
    )


def _form(choices: Sequence[forms.Choice]) -> str:
    used = {choice.form for choice in choices}
    return " and ".join(form for form in ("packed", "coo") if form in used) or "dense"


def _attempt(
    draft: Draft,
    file: Path,
    choices: Sequence[forms.Choice],
    limit: int,
    why: str,
    full: bool = True,
) -> ExportReport:
    for part in file.parent.iterdir():  # what an attempt before this left
        part.unlink()
    size = sum(len(p.raw_data) for p in draft.model.graph.initializer)
    save(forms.apply(draft.model, choices), file, size > limit)
    run_checker(str(file), full)
    return replace(
        read_back(file, draft, choices),
        dense_bytes=dense_size(draft.model),
        form=_form(choices),
        why=why,
        sampled=draft.sampled,
        missing=draft.missing,
    )


def dense_size(model: Any) -> int:
    """Bytes of an ``onnx.ModelProto`` written with all zeros, to a few per tensor."""
    rest = type(model)()
    for field, value in model.ListFields():
        if field.name == "graph":
            for part, content in value.ListFields():
                if part.name != "initializer":
                    _put(rest.graph, part, content)
        else:
            _put(rest, field, value)
    # a ModelProto of more than 2 GiB can't be measured as a whole
    return int(rest.ByteSize() + sum(proto.ByteSize() for proto in model.graph.initializer))


def _put(message: Any, field: Any, value: Any) -> None:
    if field.is_repeated:
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def save(model: Any, file: Path, external: bool) -> None:
    """Write an ``onnx.ModelProto``, with its larger initializers beside it if ``external``.

    Sparse initializers can't lie beside a file.

    Raises:
        ExportError: when the file would have more than 2 GiB, or can't be written.
    """
    import onnx
    from google.protobuf.message import EncodeError  # type: ignore[import-untyped]

    try:
        if external:
            copied = type(model)()
            copied.CopyFrom(model)  # saving empties what it moves
            onnx.save_model(
                copied, str(file), save_as_external_data=True, location=f"{file.name}.data",
                size_threshold=_BESIDE,
            )  # fmt: skip
        else:
            onnx.save_model(model, str(file))
    except (EncodeError, ValueError, OSError) as error:
        raise ExportError(
            f"{file.name!r} can't be written: {error}; sparse initializers can't lie beside the "
            "file: use weights='packed' or 'dense' for a model of this size"
        ) from error


def run_checker(path: str, full: bool = True) -> None:
    """Run onnx.checker, with its inference of types and shapes where ``full``.

    Raises:
        ExportError: when it refuses the file.
    """
    import onnx

    errors = (onnx.checker.ValidationError, onnx.shape_inference.InferenceError)
    try:
        onnx.checker.check_model(path, full_check=full)
    except errors as error:
        raise ExportError(f"onnx.checker refuses the file: {error}") from error


def read_back(file: Path, draft: Draft, choices: Sequence[forms.Choice]) -> ExportReport:
    """Make the report from the file itself, checking each zero and each form that it promises.

    Raises:
        ExportError: when a tensor isn't there in its form, or its zeros are others.
    """
    model = reading.open_file(file)
    stored, chosen = reading.stored_tensors(model), {c.name: c for c in choices}
    _check_forms(model, stored, choices)
    given = {weight.name for weight in draft.weights}
    order = {proto.name: place for place, proto in enumerate(draft.model.graph.initializer)}
    rows = tuple(
        _row(name, tensor, chosen.get(name), draft.facts.get(name), name if name in given else "")
        for name, tensor in sorted(stored.items(), key=lambda pair: order[pair[0]])
    )
    shown = {row.parameter for row in rows}
    return ExportReport(
        path=str(file),
        bytes=sum(part.stat().st_size for part in file.parent.iterdir()),
        rows=rows,
        opset=next(entry.version for entry in model.opset_import if entry.domain == ""),
        hidden=tuple(weight.name for weight in draft.weights if weight.name not in shown),
    )


def _check_forms(model: Any, stored: dict[str, Tensor], choices: Sequence[forms.Choice]) -> None:
    sparse = {tensor.values.name for tensor in model.graph.sparse_initializer}
    for choice in choices:
        there = choice.name in stored and (choice.name in sparse) == (choice.form == "coo")
        if not there or not torch.equal(stored[choice.name], choice.tensor):
            raise ExportError(
                f"tensor {choice.name!r} was written as {choice.form} ({choice.why}) and reads "
                "back otherwise; use weights='dense'"
            )


def _row(
    name: str, tensor: Tensor, choice: forms.Choice | None, fact: facts.Fact | None, parameter: str
) -> TensorRow:
    if fact is not None:
        facts.check(name, tensor != 0, fact)
    size = tensor.numel() * tensor.element_size()
    return TensorRow(
        name=name,
        shape=tuple(tensor.shape),
        bytes=size if choice is None else choice.bytes,
        density=density(tensor != 0),
        pattern="" if fact is None else str(fact),
        parameter=parameter if fact is None else fact.parameter,
        form="dense" if choice is None else choice.form,
        why="" if choice is None else choice.why,
        dense_bytes=size,
    )
