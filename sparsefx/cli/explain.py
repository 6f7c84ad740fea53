"""``sparsefx explain``: the report on a model that was named."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.cli.inputs import draw_inputs
from sparsefx.cli.models import load_config, load_device, load_model
from sparsefx.cli.results import Result
from sparsefx.config import SparseConfig
from sparsefx.report import explain


@dataclass(frozen=True)
class Subject:
    """A model in its mode, with inputs on its device, and the config that was asked for."""

    model: nn.Module
    args: tuple[Tensor, ...]
    kwargs: dict[str, Tensor]
    config: SparseConfig


def subject_of(options: argparse.Namespace, device: torch.device) -> Subject:
    """Return what ``explain`` and ``bench`` are about; cheap words are checked before the model.

    Raises:
        UsageError: for a model, an input, a config or a device that is none.
    """
    config = load_config(options.config)
    args, kwargs = draw_inputs(options.input, options.seed, device)
    model = load_model(options.model, options.seed).to(device)
    model.train(not options.inference)
    with torch.no_grad():  # what doesn't fit is refused here in fewer words than by a compiler
        model(*args, **kwargs)
    return Subject(model, args, kwargs, config)


def run(options: argparse.Namespace) -> Result:
    """Explain a model: nothing is compiled."""
    subject = subject_of(options, load_device(options.device))
    with torch.set_grad_enabled(not options.inference):
        report = explain(subject.model, config=subject.config)(*subject.args, **subject.kwargs)
    data: dict[str, Any] = {"command": "explain", "model": options.model, **report.to_dict()}
    parts = [str(report)]
    if options.why is not None:
        data["why"] = report.why(options.why)
        parts = ["\n".join(data["why"]) or f"no product's layer matches {options.why!r}"]
    if options.times:
        data["times"] = report.times()
        parts.append(report.times())
    return Result("\n\n".join(parts), data)
