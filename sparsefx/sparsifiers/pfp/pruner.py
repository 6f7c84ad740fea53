"""Provable filter pruning: channels by sensitivity, shares of layers by one error bound."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.base import Layer, Sparsifier, clear_outside
from sparsefx.sparsifiers.mask import local, shard_like
from sparsefx.sparsifiers.pfp.plan import BUDGETS, PATTERN, columns, make_plan
from sparsefx.sparsifiers.pfp.report import FilterReport, kept_inputs, make_filter_report
from sparsefx.sparsifiers.pfp.selection import VARIANTS
from sparsefx.sparsifiers.pfp.sensitivity import TAPS
from sparsefx.sparsifiers.targets import Rules
from sparsefx.sparsifiers.unstructured import Unstructured


class ProvableFilterPruner(Sparsifier[Unstructured]):
    """Drop the input channels that matter least, and the filters that make them.

    At construction, a few examples run through the model in eval mode. The sensitivity of an input
    channel is the largest share that it has in any output of its layer; one error bound eps, the
    same for all layers, says how many channels each keeps, so that the budget is met. Layers that
    read the same channels (behind a residual sum, say) decide together, by the larger sensitivity,
    so that filters can go. A filter, its bias and its norm's scale and shift are zeroed where every
    layer that reads it dropped it; the outputs don't change by that. Masks then stay as they are;
    fine-tune with :meth:`step` after every ``optimizer.step()``, then :meth:`squash`, and
    :func:`sparsefx.compact_channels` makes the model smaller. Until then nothing is faster.

    The bound holds for drawn channels ("random"; Liebenwein et al., "Provable Filter Pruning for
    Efficient Neural Networks", ICLR 2020, theorem 2), layer by layer. At usual ratios eps is far
    above 1 and says nothing, which :meth:`report` states; what helps is the allocation.

    Convolutions with groups, linear layers and Hugging Face's Conv1D are pruned, and projections of
    nn.MultiheadAttention by their input channels. Heads are no units: queries and keys keep their
    filters. Channels that a layer norm reads, too, keep theirs, and their columns stay as zeros.

    Args:
        model: changed in place, once every check has passed.
        batches: tensors, tuples or lists (positional arguments), or mappings (keyword arguments);
            the first :func:`sample_size` examples are used, or all. Give every rank the same ones.
        keep: share of the budget that is kept, ``0 < keep <= 1``. At 1, what the examples never
            excite still goes.
        budget: "parameters" counts the masked layers' weights, "flops" their multiply-accumulates
            on the examples.
        variant: "deterministic": the channels of largest sensitivity, weights as they are.
            "random": drawn, their weights multiplied by count / (draws p), which leaves layers'
            outputs right in the mean over seeds. "hybrid": sure ones as they are, the rest drawn.
        delta: chance that the bound fails, in (0, 1).
        seed: of the draws; each set of layers has a generator of its own.
        rules: which layers; see :func:`sparsefx.sparsifiers.targets.find_targets`. Input features
            of the network are pruned, too: leave them with ``Rule("first", forward=Dense())``.
        taps: share of a convolution's channel: of its taps together ("sum"), or of the largest
            ("max", as the published code has it).

    Attributes:
        gone: parameter -> entries that were zeroed because nobody reads them, for biases and norms.

    Raises:
        SparsifierError: an argument makes no sense, a batch or layer holds NaN, or the budget is
            too small for one channel each; the model is then untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        keep: float = 0.5,
        *,
        budget: str = "parameters",
        variant: str = "deterministic",
        delta: float = 1e-16,
        seed: int = 0,
        rules: Rules = None,
        taps: str = "sum",
    ) -> None:
        """Look at the examples, choose channels, then change the model."""
        _check(keep, budget, variant, delta, seed, taps)
        if not isinstance(model, nn.Module):
            raise SparsifierError(f"model is {type(model).__name__}; pass an nn.Module")
        plan = make_plan(model, rules, batches, delta, taps)
        plan.allocate(keep, budget)
        weights = plan.choose(variant, seed)
        masks = plan.masks(weights)
        super().__init__(model, PATTERN, plan.rules, straight_through=False, masks=masks)
        self.skipped.update(plan.unreached)
        self._vectors = plan.wiring.vectors
        for name, layer in self.layers.items():
            numbers = plan.numbers(name).to(layer.mask.mask.device)
            layer.mask.register_buffer("allocation", numbers)
            _reweight(layer, weights[name])
        self._clear_vectors()

    @property
    def gone(self) -> dict[str, Tensor]:
        """Parameter -> bool, for biases and norms: entries that no layer reads any more."""
        kept = {name: kept_inputs(layer) for name, layer in self.layers.items()}
        return {name: ~rows.needed(kept) for name, rows in self._vectors.items()}

    def advance(self, layer: Layer[Unstructured], step: int) -> None:
        """Clear what momentum or weight decay put outside the mask."""
        clear_outside(layer)

    def squash(self) -> nn.Module:
        """Write the zeros into the parameters; see :meth:`Sparsifier.squash`."""
        if self._squashed:
            return self.model
        model = super().squash()
        self._clear_vectors()
        return model

    def report(self) -> FilterReport:
        """Return what each layer keeps, and what the error bound is worth."""
        return make_filter_report(super().report(), self.layers)

    @torch.no_grad()
    def _clear_vectors(self) -> None:
        for name, gone in self.gone.items():
            parameter = self.model.get_parameter(name)
            here = local(parameter)
            here.masked_fill_(shard_like(gone.to(here.device), parameter), 0)


@torch.no_grad()
def _reweight(layer: Layer[Unstructured], weights: Tensor) -> None:
    """Multiply the columns of kept channels, in place."""
    weights = torch.where(weights > 0, weights, 1)
    if bool((weights != 1).any()):
        weight = layer.weight
        factors = columns(layer.target, weights.to(weight.device, weight.dtype))
        weight.mul_(layer.target.unmatrix(factors))


def _check(keep: Any, budget: Any, variant: Any, delta: Any, seed: Any, taps: Any) -> None:
    choices = (("budget", budget, BUDGETS), ("variant", variant, VARIANTS), ("taps", taps, TAPS))
    for key, value, allowed in choices:
        if value not in allowed:
            raise SparsifierError(f"{key}={value!r} is not one of {', '.join(map(repr, allowed))}")
    if not _is_number(keep) or not 0 < keep <= 1:
        raise SparsifierError(f"keep={keep!r} must be a share of the budget in (0, 1]")
    if not _is_number(delta) or not 0 < delta < 1:
        raise SparsifierError(f"delta={delta!r} must be a probability in (0, 1)")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise SparsifierError(f"seed={seed!r} must be an int")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
