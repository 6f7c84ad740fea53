"""Transposable N:M masks, dynamic or static, with ramps, late starts and a dense tail."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from sparsefx.config import NM
from sparsefx.errors import SparsifierError
from sparsefx.masks import transposable_mask
from sparsefx.masks.transposable import Solver
from sparsefx.sparsifiers.base import Layer, clear_outside
from sparsefx.sparsifiers.refreshing import Refreshing
from sparsefx.sparsifiers.schedules import Constant, Cubic, Schedule, as_schedule, whole_number
from sparsefx.sparsifiers.targets import Rules, Target

Start = int | Mapping[str, int]
_NAME = "TransposableNM"


class TransposableNM(Refreshing):
    """Masks that are N:M along both axes of every m x m tile, so W and its transpose are sparse.

    Hubara et al., "Accelerated sparse neural training" (NeurIPS 2021). Dynamic masks follow the
    weights every ``refresh`` steps. Static ones are made once, from the pretrained weights, and
    frozen: weights outside become exactly zero and stay so through momentum and weight decay.

    Args:
        model: changed in place; see :class:`Sparsifier`.
        n: weights KEPT per row and column of a tile.
        m: side of a tile.
        refresh: steps from one mask to the next, or a schedule; the paper takes 40.
        solver: of :func:`sparsefx.masks.transposable_mask`.
        static: freeze the first mask, and zero what is outside.
        start: the step from which masks act; or a dict glob -> step, of which the first match
            counts, and 0 where none matches. Before it, a layer is dense.
        ramp: how far from n towards m a layer is, by steps since its start: a schedule of values
            from 1 (dense) to 0, or a number T of steps for ``Cubic(1, 0, T)``: n(t) = n +
            round((m - n) (1 - t/T)^3) (Zhu & Gupta, 2017). None is n at once.
        decay: SR-STE's, on the weights outside the mask; dynamic masks only.
        decoupled: apply the decay to weights instead of gradients, as in SRSTE.
        optimizer: for ``decoupled=True``.
        grad_scaler: as in SRSTE.
        weight_grad: "dense" is straight-through, "masked" is zero outside the mask. None is
            "dense" for dynamic and "masked" for static masks, which take no other.
        freeze: from this step on masks follow the weights no more; n's schedule still acts. Give
            the last masks some training: a run that ends on a refresh leaves with masks that no
            step was taken under.
        dense_tail: from this step on all masks are ones: dense fine-tuning at the end.
        rules: which layers; an NM in them must be transposable.

    Raises:
        ConfigError: n and m make no pattern.
        MaskError: the solver is unknown or can't do this m.
        SparsifierError: for any other argument, or a model that can't be sparsified so.
    """

    def __init__(
        self,
        model: nn.Module,
        n: int = 4,
        m: int = 8,
        *,
        refresh: int | Schedule = 40,
        solver: Solver = "greedy",
        static: bool = False,
        start: Start = 0,
        ramp: int | Schedule | None = None,
        decay: float = 0.0,
        decoupled: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        weight_grad: Literal["dense", "masked"] | None = None,
        freeze: int | None = None,
        dense_tail: int | None = None,
        rules: Rules = None,
    ) -> None:
        """Put the masks on."""
        self.solver = solver
        self.static = static
        self.starts = _as_starts(start)
        self.ramp = _as_ramp(ramp)
        self.dense_tail = dense_tail
        if dense_tail is not None:
            whole_number(_NAME, "dense_tail", dense_tail, 0)
        if static:
            _check_static(ramp, self.starts, decay)
        super().__init__(
            model,
            NM(n, m, transposable=True),
            rules,
            straight_through=_straight_through(static, weight_grad),
            refresh=refresh,
            decay=decay,
            decoupled=decoupled,
            optimizer=optimizer,
            grad_scaler=grad_scaler,
            freeze=freeze,
        )
        for layer in self.layers.values():
            self._clear(layer, 0)

    def check_targets(self, targets: list[tuple[Target, NM]]) -> None:
        """Check that patterns are transposable and every start names a layer."""
        for target, pattern in targets:
            if not pattern.transposable:
                raise SparsifierError(
                    f"the rule for layer {target.name!r} says {pattern}: write "
                    f"NM({pattern.n}, {pattern.m}, transposable=True), or use SRSTE"
                )
        for glob in self.starts:
            if not any(fnmatch.fnmatchcase(target.name, glob) for target, _ in targets):
                names = ", ".join(target.name for target, _ in targets)
                raise SparsifierError(f"start={glob!r} matches no masked layer; there are: {names}")
        super().check_targets(targets)

    def kept(self, target: Target, pattern: NM, step: int) -> int:
        """Return how many weights per row of a tile a layer keeps at a step; m is dense.

        Raises:
            SparsifierError: the ramp says something outside 0 to 1.
        """
        since = step - self.start_of(target.name)
        if since < 0 or (self.dense_tail is not None and step >= self.dense_tail):
            return pattern.m
        share = self.ramp(since)
        if not 0 <= share <= 1:
            raise SparsifierError(f"ramp({since}) is {share!r}; it must be from 0 (n) to 1 (dense)")
        return pattern.n + round((pattern.m - pattern.n) * share)

    def start_of(self, name: str) -> int:
        """Return the step from which a layer is masked."""
        return next(
            (step for glob, step in self.starts.items() if fnmatch.fnmatchcase(name, glob)), 0
        )

    def make_mask(self, target: Target, pattern: NM, weight: Tensor, step: int) -> Tensor:
        """Return the mask of a step; all ones while the layer is dense."""
        n = self.kept(target, pattern, step)
        if n == pattern.m:
            return torch.ones_like(weight, dtype=torch.bool)
        matrix = target.matrix(weight)
        return target.unmatrix(transposable_mask(matrix, n, pattern.m, solver=self.solver))

    def advance(self, layer: Layer, step: int) -> None:
        """Make the mask anew where it is due, or where n is another than a step ago."""
        n = self.kept(layer.target, layer.pattern, step)
        turned = n != self.kept(layer.target, layer.pattern, step - 1)
        if turned or (n < layer.pattern.m and not self.static and self.due(step)):
            self.remask(layer, step)
        self._clear(layer, step)

    def _clear(self, layer: Layer, step: int) -> None:
        """Keep frozen zeros at zero: an optimizer's earlier momentum could move them."""
        if self.static and (self.dense_tail is None or step < self.dense_tail):
            clear_outside(layer)


def _as_starts(start: object) -> dict[str, int]:
    if not isinstance(start, Mapping):
        step = whole_number(_NAME, "start", start, 0)
        return {"*": step} if step else {}
    return {str(glob): whole_number(_NAME, "start", step, 0) for glob, step in start.items()}


def _as_ramp(ramp: object) -> Schedule:
    if ramp is None:
        return Constant(0)
    if callable(ramp):
        return as_schedule(_NAME, "ramp", ramp)
    return Cubic(1, 0, whole_number(_NAME, "ramp", ramp, 1))


def _check_static(ramp: object, starts: dict[str, int], decay: float) -> None:
    given = {"ramp": ramp, "start": starts or None, "decay": decay or None}
    for key, value in given.items():
        if value is not None:
            raise SparsifierError(
                f"{_NAME}: {key}={value!r} has no meaning with static=True, whose masks are made "
                "once and whose other weights are zero; leave it out"
            )


def _straight_through(static: bool, weight_grad: str | None) -> bool:
    if weight_grad not in (None, "dense", "masked"):
        raise SparsifierError(f"{_NAME}: weight_grad={weight_grad!r} must be 'dense' or 'masked'")
    if static and weight_grad == "dense":
        raise SparsifierError(
            f"{_NAME}: weight_grad='dense' would move the zeros of static=True; leave it out"
        )
    return not static and weight_grad != "masked"
