"""Sparse from scratch, with random masks that stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer, Sparsifier, clear_outside
from sparsefx.sparsifiers.initial import check_start, counts_for
from sparsefx.sparsifiers.regrow import drawn, generator_for
from sparsefx.sparsifiers.schedules import whole_number
from sparsefx.sparsifiers.targets import Rules, Target
from sparsefx.sparsifiers.unstructured import Unstructured


class Static(Sparsifier[Unstructured]):
    """Random masks that stay: a network that is sparse from scratch.

    A layer keeps a number of weights at random places, a whole number that never changes: the
    paper's layers draw every place by itself and so have that number on average. Weights outside
    are exactly 0 from construction on, and after every :meth:`step`. Those inside keep the model's
    values: scale your initialisation for the smaller fan-in if that matters.

    Args:
        model: changed in place; see :class:`Sparsifier`.
        density: share of the masked layers' weights that is kept, all together, exactly to the
            weight. By default 0.1.
        epsilon: instead of a density: a layer [n, m] keeps ``epsilon (n + m)`` weights, all where
            that is more (Mocanu et al., Nature Communications 2018, eq. 1).
        init: how layers share: "erdos_renyi"; "erk", which counts the taps of a kernel too (Evci
            et al., ICML 2020, section 3); "uniform", the same density for each, without epsilon.
        seed: of the draws, which the layer's name and the step also decide: equal on all ranks.
            It is kept in ``model.state_dict()``, and loading one brings its seed back.
        rules: which layers. Leave the last one dense by a rule, as the papers often do.

    Raises:
        SparsifierError: for an argument out of range, a layer that would keep no weight, or a
            model that can't be sparsified so.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        density: float | None = None,
        epsilon: float | None = None,
        init: str = "erdos_renyi",
        seed: int = 0,
        rules: Rules = None,
        straight_through: bool = False,
    ) -> None:
        """Check the options, then the model, then put the masks on."""
        name = type(self).__name__
        if density is None and epsilon is None:
            density = 0.1
        check_start(name, density, epsilon, init)
        self._start = density, epsilon, init
        self.seed = whole_number(name, "seed", seed, 0)
        if seed >= 2**63:
            raise SparsifierError(f"{name}: seed={seed} must be below 2**63: it is kept as int64")
        super().__init__(model, Unstructured(density), rules, straight_through=straight_through)
        for layer in self.layers.values():
            kept = torch.tensor(seed, dtype=torch.int64, device=layer.mask.mask.device)
            layer.mask.register_buffer("seed", kept)
            clear_outside(layer)

    def check_targets(self, targets: list[tuple[Target, Unstructured]]) -> None:
        """Decide how many weights each layer keeps, and give its pattern that density."""
        shapes = {target.name: tuple(target.matrix(target.weight).shape) for target, _ in targets}
        self._counts = counts_for(shapes, *self._start)
        for i, (target, _) in enumerate(targets):
            if size := target.weight.numel():
                targets[i] = target, Unstructured(self._counts[target.name] / size)

    def make_mask(self, target: Target, pattern: Unstructured, weight: Tensor, step: int) -> Tensor:
        """Draw a layer's first places."""
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        generator = generator_for(self.seed, step, target.name)
        mask[drawn(len(mask), self._counts[target.name], generator)] = True
        return mask.view(weight.shape)

    def advance(self, layer: Layer[Unstructured], step: int) -> None:
        """Take back what an optimizer did outside the mask: momentum from before, other kinds."""
        clear_outside(layer)
