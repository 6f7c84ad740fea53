"""calibrate(): what AdaPrune, Wanda and SparseGPT have in common.

batches -> Gram of a layer's inputs -> new weights and mask of that layer -> the next layer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsefx.config import NM
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer, Sparsifier, clear_outside, unregister
from sparsefx.sparsifiers.gram import Gram
from sparsefx.sparsifiers.least_squares import layer_error
from sparsefx.sparsifiers.mask import is_sharded
from sparsefx.sparsifiers.streaming import Forward, Keep, Stream, Survey, collect, quiet, survey
from sparsefx.sparsifiers.targets import Rules, Target

if TYPE_CHECKING:
    from rich.progress import Progress


@dataclass(frozen=True)
class CalibrationRow:
    """How well one layer's outputs are kept on the calibration data.

    Args:
        layer: its qualified name.
        inputs: columns of X: tokens, or windows of a convolution.
        before: |W' X - W X_d|^2 / |W X_d|^2 for plain magnitude pruning with the same pattern.
        after: the same for the weights that calibrate() wrote.
    """

    layer: str
    inputs: int
    before: float
    after: float


@dataclass(frozen=True)
class Calibration:
    """What calibrate() did, layer by layer in the order of execution; ``print`` it.

    Args:
        rows: the layers that calibration data reached.
    """

    rows: tuple[CalibrationRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data: numbers, strings, lists, dicts."""
        return {"rows": [dataclasses.asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        """Return a table."""
        width = max(len("layer"), *(len(row.layer) for row in self.rows))
        lines = [f"{'layer':<{width}}  {'inputs':>9}  magnitude  calibrated"]
        for row in self.rows:
            numbers = f"{row.inputs:>9}  {row.before:>9.4f}  {row.after:>10.4f}"
            lines.append(f"{row.layer:<{width}}  {numbers}")
        return "\n".join(lines)


class Calibrated(Sparsifier):
    """A sparsifier that looks at data once, writes masks and weights, and then keeps the masks.

    Construction puts magnitude masks on the model; :meth:`calibrate` replaces masks and weights.
    Masks are frozen, with the masked gradient: fine-tuning moves the weights that are kept, and
    :meth:`step` clears what an optimizer puts outside (so calibrate before the first step).

    Args:
        model: changed in place, once every check has passed.
        pattern: for each layer that a rule doesn't give another.
        rules: which layers; see :func:`sparsefx.sparsifiers.targets.find_targets`.
        sequential: solve the layers in the order of execution, each on the inputs that it gets in
            the net pruned up to there; otherwise all at once, on the dense net's inputs.
        progress: show a progress bar on the terminal.
        masks: layer name -> bool mask, for layers whose first mask isn't the magnitudes'.

    Attributes:
        calibration: what calibrate() returned; None before.
    """

    paired = False  # whether targets are the dense net's outputs, rather than W X

    def __init__(
        self,
        model: nn.Module,
        pattern: NM,
        rules: Rules = None,
        *,
        sequential: bool = True,
        progress: bool = False,
        masks: dict[str, Tensor] | None = None,
    ) -> None:
        """Check everything, then put magnitude masks on the model."""
        for name, value in (("sequential", sequential), ("progress", progress)):
            if not isinstance(value, bool):
                raise SparsifierError(f"{name}={value!r} must be True or False")
        super().__init__(model, pattern, rules, straight_through=False, masks=masks)
        self.sequential, self.progress = sequential, progress
        self.calibration: Calibration | None = None

    def solve(self, layer: Layer, w: Tensor, mask: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
        """Return new weights and their mask, [out, K] both; each method has its own.

        Args:
            layer: whose pattern counts.
            w: the dense weights [out, K], float64.
            mask: the mask until now, bool [out, K].
            gram: of the layer's inputs.
        """
        raise NotImplementedError

    def mask_of(self, layer: Layer, scores: Tensor) -> Tensor:
        """Return the layer's N:M mask with the largest scores, bool [out, K].

        Args:
            layer: whose pattern counts.
            scores: at least 0, [out, K].
        """
        target, shape = layer.target, layer.target.matrix(layer.weight).shape
        mask = self.make_mask(target, layer.pattern, target.unmatrix(scores.view(shape)), 0)
        return target.matrix(mask).flatten(1)

    def advance(self, layer: Layer, step: int) -> None:
        """Clear what momentum or weight decay put outside the mask."""
        clear_outside(layer)

    def calibrate(
        self, batches: Iterable[Any], forward: Forward | None = None, keep: Keep | None = None
    ) -> Calibration:
        """Run the batches and write masks and weights, layer by layer.

        The model runs in eval mode without gradients; running statistics stay as they are. Inputs
        of one batch exist at a time, and Gram matrices, K x K in float64, of the layers that are
        being solved: of one at a time when sequential, of all otherwise. Layers that no batch
        reaches stay dense: they lose their mask and are listed in ``skipped``.

        Args:
            batches: tensors, tuples or lists (positional arguments), or mappings (keyword
                arguments). Sequential mode runs them once, and once more for each layer (for each
                set of layers with one input), so it takes no generator.
            forward: called with model and batch, for batches that the model doesn't take as they
                are.
            keep: called with a batch, returns bool [*, T], which tokens count: for example
                ``lambda batch: batch["attention_mask"].bool()``, which leaves padding out. It acts
                on linear layers whose input is [*, T, K]; all other inputs count whole.

        Returns:
            The relative error of each layer before and after.

        Raises:
            SparsifierError: no batch, an iterator in sequential mode, a batch of an unknown type,
                NaN or infinity in a layer's input or weight, no layer reached, called twice. This
                and any error of the model's own leaves weights and masks as they were.
        """
        self._check_fresh()
        stream = Stream(self.model, batches, forward, keep)
        if self.sequential:
            stream.check_repeats()
        from rich.progress import Progress  # a machine that only computes needs no rich

        with quiet(self.model), _Work(self) as work, Progress(disable=not self.progress) as bar:
            rows = work.sequential(stream, bar) if self.sequential else work.at_once(stream, bar)
            work.finish()
        for name in [name for name in self.layers if name not in work.new]:
            layer = self.layers.pop(name)
            unregister(self.model, layer)
            self.skipped[name] = "no calibration data reached it"
        self.calibration = Calibration(tuple(rows))
        return self.calibration

    def _check_fresh(self) -> None:
        self._check_alive()
        if self.calibration is not None:
            raise SparsifierError(
                f"this {type(self).__name__} was calibrated before, and the dense weights are "
                "gone: start again from the dense model"
            )
        if self.steps:
            raise SparsifierError(
                f"step() was called {self.steps} times and cleared the weights outside the masks: "
                "calibrate before training"
            )
        for name, layer in self.layers.items():
            if is_sharded(layer.weight):
                raise SparsifierError(f"layer {name!r} is sharded: calibrate before fully_shard")
            if not bool(layer.weight.isfinite().all()):
                raise SparsifierError(f"layer {name!r} holds NaN or infinity in its weight")


class _Work:
    """One calibration: dense weights, new ones, and the masks to go back to if it fails.

    Inside, every mask is full, so the weights alone say whether the net is dense or pruned.
    """

    def __init__(self, owner: Calibrated) -> None:
        self.owner = owner
        self.dense = {k: layer.weight.detach().clone() for k, layer in owner.layers.items()}
        self.masks = {k: layer.mask.mask.clone() for k, layer in owner.layers.items()}
        self.new: dict[str, Tensor] = {}
        self.new_masks: dict[str, Tensor] = {}

    def __enter__(self) -> _Work:
        for layer in self.owner.layers.values():
            layer.mask.mask.fill_(True)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self.switch(dense=True)
        final = self.masks | (self.new_masks if kind is None else {})
        for name, layer in self.owner.layers.items():
            layer.mask.mask.copy_(final[name])

    @torch.no_grad()
    def switch(self, dense: bool) -> None:
        """Make the net dense, or pruned as far as the work has come."""
        for name, values in self.new.items():
            self.owner.layers[name].weight.copy_(self.dense[name] if dense else values)

    def sequential(self, stream: Stream, bar: Progress) -> list[CalibrationRow]:
        """Solve in the order of execution, on the inputs of the net pruned so far."""
        rows: list[CalibrationRow] = []
        task = bar.add_task("survey", total=len(self.owner.layers))
        found = survey(stream, self._targets(), None)
        for stage in found.stages():
            once = found.calls[stage[0].name] == stream.count
            paired = self.owner.paired and bool(self.new)  # before the first, both nets are dense
            bar.update(task, description=stage[0].name)
            gram = collect(stream, stage, once, self.switch if paired else None)
            rows += [self._solve(target, gram) for target in stage]
            self.switch(dense=False)
            bar.advance(task, len(stage))
        return rows

    def at_once(self, stream: Stream, bar: Progress) -> list[CalibrationRow]:
        """Solve all layers on the dense net's inputs."""
        grams: dict[str, Gram] = {}
        task = bar.add_task("calibration", total=len(self.owner.layers))
        found: Survey = survey(stream, self._targets(), grams)
        rows = []
        for target in found.order:
            rows.append(self._solve(target, grams.pop(target.name)))
            bar.advance(task)
        return rows

    def finish(self) -> None:
        """Leave the new weights in the model."""
        if not self.new:
            names = ", ".join(self.owner.layers)
            raise SparsifierError(f"no calibration data reached any layer of: {names}")
        self.switch(dense=False)

    def _targets(self) -> Iterator[Target]:
        return (layer.target for layer in self.owner.layers.values())

    def _solve(self, target: Target, gram: Gram) -> CalibrationRow:
        layer, stored = self.owner.layers[target.name], self.dense[target.name]
        matrix = target.matrix(stored)  # [out, in/groups, *taps]
        w = matrix.flatten(1).to(torch.float64)
        mask = target.matrix(self.masks[target.name]).flatten(1)
        magnitude = self.owner.make_mask(target, layer.pattern, stored, 0)
        plain = torch.where(target.matrix(magnitude).flatten(1), w, 0.0)
        new, mask = self.owner.solve(layer, w, mask, gram)
        new = new.to(stored.dtype)
        self.new[target.name] = target.unmatrix(new.view(matrix.shape))
        self.new_masks[target.name] = target.unmatrix(mask.view(matrix.shape))
        zero, inputs = torch.zeros_like(w), gram.count
        energy = gram_error(zero, w, gram)
        before, after = (gram_error(v.to(torch.float64), w, gram) for v in (plain, new))
        scale = energy or 1.0  # no output at all: no error either
        return CalibrationRow(target.name, inputs, before / scale, after / scale)


def gram_error(w: Tensor, dense: Tensor, gram: Gram) -> float:
    """|w X - dense X_d|^2 over all rows [out, K] and groups."""
    total = 0.0
    for i, (rows, wanted) in enumerate(by_group(gram, w, dense)):
        cross = None if gram.cross is None else gram.cross[i]
        target = None if gram.dense is None else gram.dense[i]
        total += float(layer_error(rows, wanted, gram.sum[i], cross, target).sum())
    return total


def by_group(gram: Gram, *matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut [out, K] matrices into those of the layer's groups."""
    return zip(*(matrix.chunk(len(gram.sum)) for matrix in matrices), strict=True)
