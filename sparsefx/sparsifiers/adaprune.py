"""AdaPrune: magnitude masks, and weights refitted to the dense layer's outputs.

Hubara et al., "Accelerated Sparse Neural Training" (arXiv 2102.08124), section 5. They minimise
|W' X - W X|^2 on a fixed mask by Adam; the minimum has a closed form, see least_squares.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsefx.config import NM, Rule
from sparsefx.errors import SparsifierError
from sparsefx.masks import density
from sparsefx.sparsifiers.base import Layer
from sparsefx.sparsifiers.calibration import Calibrated, by_group
from sparsefx.sparsifiers.conversion import mask_within, nm_for_sparsity, unstructured_masks
from sparsefx.sparsifiers.gram import Gram
from sparsefx.sparsifiers.least_squares import (
    check_damping,
    check_problem,
    least_squares,
)
from sparsefx.sparsifiers.targets import Rules, find_targets

Method = Literal["least_squares", "adam"]


def adam_fit(
    w: Tensor,
    gram: Tensor,
    mask: Tensor,
    cross: Tensor | None = None,
    *,
    count: int = 1,
    lr: float = 1e-3,
    steps: int = 1000,
) -> Tensor:
    """Fit weights on a fixed mask by Adam, from the masked weights on; the data only as Grams.

    The loss is the mean squared error of the outputs, of all calibration data at each step (the
    paper draws 50 samples a step). Rows that end no better than they began keep their masked
    weights.

    Args:
        w: [out, K], the dense weights.
        gram: X X^T, [K, K].
        mask: bool [out, K].
        cross: X_dense X^T where the targets are w X_dense; None for w X.
        count: columns of X, for the mean.
        lr: Adam's learning rate; the largest change of a weight is about lr * steps.
        steps: how many.

    Returns:
        [out, K], dtype of w, zero off the mask.

    Raises:
        SparsifierError: as :func:`least_squares`; lr or steps isn't positive.
    """
    check_problem(w, gram, mask, cross, 0.0)
    _check_adam(lr, steps)
    dense, hessian = w.to(torch.float64), gram.to(torch.float64)
    wanted = dense @ (hessian if cross is None else cross.to(torch.float64))
    start = torch.where(mask, dense, 0.0)
    new = start.clone()
    optimizer = torch.optim.Adam([new], lr=lr)
    scale = 2 / max(1, count * len(w))
    for _ in range(steps):
        new.grad = torch.where(mask, (new @ hessian - wanted) * scale, 0.0)
        optimizer.step()
    # error(new) - error(start) of each row
    change = (((new + start) @ hessian - 2 * wanted) * (new - start)).sum(1)
    return torch.where((change < 0)[:, None], new, start).to(w.dtype)


def _check_adam(lr: float, steps: int) -> None:
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < float("inf"):
        raise SparsifierError(f"lr={lr!r} must be a positive number")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise SparsifierError(f"steps={steps!r} must be an int of at least 1")


def _named(name: str) -> Callable[[Any], bool]:
    return lambda target: target.name == name


class AdaPrune(Calibrated):
    """Magnitude N:M masks and weights refitted on them, from calibration data.

    Args:
        model: changed in place, once every check has passed.
        n: weights kept of every m.
        m: group size.
        transposable: at most n per row and column of every m x m tile.
        rules: which layers, with which patterns.
        method: "least_squares" is the minimum in closed form; "adam" the published recipe, whose
            learning rate and number of steps follow.
        sequential: each layer on the inputs of the net pruned up to there, with the dense net's
            outputs as its targets; otherwise on the dense net's inputs.
        damping: of least squares: how strongly weights are held, over the mean square of an input.
            More of it for few data: below some 10 rows per input, 0.1 is better than 0.01.
        lr: of "adam".
        steps: of "adam".
        progress: show a progress bar on the terminal.
        masks: layer name -> bool mask in the stored weight's layout, instead of magnitudes.

    Raises:
        ConfigError: n or m makes no sense.
        SparsifierError: the model can't be sparsified so; it is then untouched.
    """

    paired = True

    def __init__(
        self,
        model: nn.Module,
        n: int = 2,
        m: int = 4,
        *,
        transposable: bool = False,
        rules: Rules = None,
        method: Method = "least_squares",
        sequential: bool = True,
        damping: float = 0.01,
        lr: float = 1e-3,
        steps: int = 1000,
        progress: bool = False,
        masks: dict[str, Tensor] | None = None,
    ) -> None:
        """Check everything, then put magnitude masks on the model."""
        if method not in ("least_squares", "adam"):
            raise SparsifierError(f"method={method!r} is unknown; pass 'least_squares' or 'adam'")
        check_damping(damping)
        _check_adam(lr, steps)
        self.method, self.damping, self.lr, self.steps_of_adam = method, damping, lr, steps
        pattern = NM(n, m, transposable=transposable)
        super().__init__(
            model, pattern, rules, sequential=sequential, progress=progress, masks=masks
        )

    @classmethod
    def from_unstructured(
        cls,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        masks: Mapping[str, Tensor] | None = None,
        m: int = 4,
        conf: float = 0.1,
        transposable: bool = False,
        rules: Rules = None,
        **options: Any,
    ) -> AdaPrune:
        """Turn unstructured sparsity into N:M, each layer with the n that its sparsity asks for.

        A group keeps the weights that the unstructured mask keeps, by magnitude, and others where
        those are fewer than n. Layers that need n = m stay dense. calibrate() aims at the outputs
        that the model has now.

        Args:
            model: changed in place, once every check has passed.
            sparsity: the share of zeros that global magnitude pruning of all layers would make;
                None takes masks, or the zeros that the weights hold.
            masks: layer name -> bool mask of the stored weight's shape.
            m: group size.
            conf: how probable it must be that a group fits, see :func:`nm_for_sparsity`.
            transposable: at most n per row and column of every m x m tile.
            rules: which layers; of their patterns only Dense() counts.
            options: further arguments of AdaPrune.

        Raises:
            ConfigError: m makes no sense.
            SparsifierError: an argument is out of its range, or no layer is left.
        """
        found, skipped = find_targets(model, rules, NM(1, m, transposable=transposable))
        nm_for_sparsity(0.0 if sparsity is None else sparsity, m, conf)  # checks them
        targets = [target for target, _ in found]
        kept = unstructured_masks(targets, sparsity, masks)
        wanted = {name: nm_for_sparsity(1 - density(mask), m, conf) for name, mask in kept.items()}
        rules = [
            Rule(_named(name), forward=NM(n, m, transposable=transposable))
            for name, n in wanted.items()
            if n < m
        ]
        if not rules:
            raise SparsifierError(f"every layer needs n=m={m} at conf={conf}: nothing to convert")
        nm_masks = {
            target.name: mask_within(
                target, kept[target.name], wanted[target.name], m, transposable
            )
            for target in targets
            if wanted[target.name] < m
        }
        made = cls(model, 1, m, transposable=transposable, rules=rules, masks=nm_masks, **options)
        full = {name: f"its sparsity asks for n=m={m}" for name, n in wanted.items() if n == m}
        made.skipped = skipped | full
        return made

    def solve(self, layer: Layer, w: Tensor, mask: Tensor, gram: Gram) -> tuple[Tensor, Tensor]:
        """Return the weights fitted on the mask there is."""
        return torch.cat(
            [
                self._fit(rows, kept, gram, i)
                for i, (rows, kept) in enumerate(by_group(gram, w, mask))
            ]
        ), mask

    def _fit(self, w: Tensor, mask: Tensor, gram: Gram, i: int) -> Tensor:
        cross = None if gram.cross is None else gram.cross[i]
        if self.method == "least_squares":
            return least_squares(w, gram.sum[i], mask, cross, self.damping)
        return adam_fit(
            w, gram.sum[i], mask, cross, count=gram.count, lr=self.lr, steps=self.steps_of_adam
        )
