"""Batch norm statistics after pruning: means over data, in place of those of the dense net."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.streaming import Forward, Stream, quiet

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None = None
) -> int:
    """Set each batch norm's running statistics to the averages over these batches.

    The mean is that of the batches' means, the variance that of their unbiased variances, each
    batch counting alike: what momentum=None gives from a fresh start. All layers are estimated in
    one pass, each batch normalised by its own statistics, as in training. Everything else is in
    eval mode; momentum, num_batches_tracked and train/eval flags come back as they were.

    Hubara et al. (arXiv 2102.08124) do this after AdaPrune.

    Args:
        model: holds batch norms with running statistics; others, and those that no batch reaches,
            stay as they are.
        batches: as for ``calibrate``; a generator will do.
        forward: called with model and batch, for batches that the model doesn't take as they are.

    Returns:
        How many batch norms were recalibrated.

    Raises:
        SparsifierError: no batch norm with running statistics, no batch, or NaN or infinity in
            the new statistics. This and any error of the model's own leaves it untouched.
    """
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and module.running_mean is not None
    }
    if not norms:
        raise SparsifierError("the model has no batch norm with running statistics")
    saved = {name: _Saved(norm) for name, norm in norms.items()}
    done = False
    try:
        with quiet(model):
            for norm in norms.values():
                norm.train()
                norm.momentum = None  # cumulative average
                norm.reset_running_stats()
            stream = Stream(model, batches, forward)
            for _, batch in stream.run():
                stream.feed(batch)
            reached = {name: bool(norm.num_batches_tracked) for name, norm in norms.items()}
            _check_finite({name: norms[name] for name, seen in reached.items() if seen})
        done = True
    finally:
        for name, norm in norms.items():
            saved[name].restore(norm, statistics=not (done and reached[name]))
    return sum(reached.values())


class _Saved:
    """A batch norm as it was."""

    def __init__(self, norm: BatchNorm) -> None:
        self.momentum = norm.momentum
        self.buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}

    @torch.no_grad()
    def restore(self, norm: BatchNorm, statistics: bool) -> None:
        norm.momentum = self.momentum
        for name, values in self.buffers.items():
            if statistics or name == "num_batches_tracked":
                found: Tensor = getattr(norm, name)
                found.copy_(values)


def _check_finite(norms: dict[str, BatchNorm]) -> None:
    for name, norm in norms.items():
        for values in (norm.running_mean, norm.running_var):
            if values is not None and not bool(values.isfinite().all()):
                raise SparsifierError(
                    f"batch norm {name!r}: the new statistics hold NaN or infinity; clean the data"
                )
