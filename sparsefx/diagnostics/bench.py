"""A model, a batch and a loss to take gradients of; all of it is left as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.diagnostics.programs import Program
from sparsefx.diagnostics.running import Loss, loss_of, parameters_of
from sparsefx.diagnostics.streams import Generators, Stream
from sparsefx.errors import DiagnosticsError


class Bench:
    """Runs programs of one model on one batch, each run from the same state.

    Attributes:
        names: of the parameters that require gradients; a shared one by its first name.
    """

    def __init__(self, model: nn.Module, batch: Any, loss: Loss | None, seed: int) -> None:
        """Take what :func:`bench` has checked."""
        self._model, self._batch, self._seed = model, batch, seed
        self._loss, named = loss, parameters_of(model)
        self.names, self._parameters = list(named), list(named.values())
        self._buffers = _Buffers(model)
        self._generators = Generators()
        self._compiled: dict[Program, Any] = {}

    def run(self, program: Program, draw: int = 0) -> tuple[float, list[Tensor | None]]:
        """Return the loss and the gradient of every parameter.

        Args:
            program: compiled at its first run.
            draw: which draw of the sampling noise; all else is the same in every run.

        Raises:
            DiagnosticsError: for a loss that can't be differentiated, or never calls the model.
        """
        if program not in self._compiled:
            self._compiled[program] = compat.compile_apart(self._model, program)
        self._buffers.back()
        self._generators.back()
        torch.manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)
        program.stream = Stream(self._seed + 1 + draw)
        with torch.inference_mode(False), torch.enable_grad():
            value = loss_of(self._compiled[program], self._batch, self._loss)
            if program.graphs == 0:
                raise DiagnosticsError(
                    "the loss never ran the model that it was given: in loss=function(model, "
                    "batch), call that model, and let torch.compile see it"
                )
            grads = torch.autograd.grad(value, self._parameters, allow_unused=True)
        return float(value.detach()), list(grads)


@contextmanager
def bench(model: Any, batch: Any, loss: Loss | None, seed: int) -> Iterator[Bench]:
    """Yield a bench; afterwards, errors included, the model is as it was.

    Put back are buffers, ``.grad``, every module's training flag and all generators. Hooks on the
    accumulation of gradients don't run.

    Raises:
        DiagnosticsError: for what is no module, and for a module without such parameters.
    """
    with compat.as_written(model) as plain:
        parameters_of(plain)
        grads = [(p, p.grad) for p in plain.parameters()]
        modes = [(module, module.training) for module in plain.modules()]
        generators, buffers = Generators(), _Buffers(plain)
        try:
            for parameter, _ in grads:
                parameter.grad = None
            with compat.many_recompiles():
                yield Bench(plain, batch, loss, seed)
        finally:
            for parameter, grad in grads:
                parameter.grad = grad
            for module, training in modes:
                module.training = training
            buffers.back()
            generators.back()


class _Buffers:
    """The buffers of a model, as objects and as values."""

    def __init__(self, model: nn.Module) -> None:
        self._known = [
            (module, name, buffer, buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]

    def back(self) -> None:
        """Put them back: each tensor, and what it held."""
        with torch.no_grad():
            for module, name, buffer, value in self._known:
                setattr(module, name, buffer)
                buffer.copy_(value)
