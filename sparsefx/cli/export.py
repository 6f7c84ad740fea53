"""``sparsefx export``: a model with its zeros as an ONNX file."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.cli.inputs import draw_inputs
from sparsefx.cli.models import load_config, load_model
from sparsefx.cli.results import Result, UsageError


def run(options: argparse.Namespace) -> Result:
    """Write the file, and say what is in it."""
    import sparsefx

    config = None if options.config is None else load_config(options.config)
    args, kwargs = draw_inputs(options.input, options.seed, torch.device("cpu"))
    model = load_model(options.model, options.seed)
    report = sparsefx.export_onnx(
        model,
        by_place(model, args, kwargs),
        options.file,
        config=config,
        weights=options.weights,
        sampled=options.sampled,
        verify=not options.no_verify,
        force=options.force,
    )
    data = {"command": "export", "model": options.model, **dataclasses.asdict(report)}
    return Result(str(report), data)


def by_place(
    model: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
) -> tuple[Any, ...]:
    """Return the inputs in the order of the model's arguments: a file's inputs have places.

    Raises:
        UsageError: the model takes no such arguments, or one before them was left out.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"--input: the model's forward: {error}") from error
    if bound.kwargs:
        raise UsageError(
            f"--input {next(iter(bound.kwargs))}=...: an export passes inputs by their places, and "
            "an argument before this one is missing; wrap the model in one that takes these alone"
        )
    return bound.args
