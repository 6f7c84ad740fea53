"""How much of a layer's outputs an input channel carries, at most, on a few examples.

Liebenwein et al., "Provable Filter Pruning for Efficient Neural Networks" (ICLR 2020), section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.gram import input_rows
from sparsefx.sparsifiers.streaming import Stream, quiet
from sparsefx.sparsifiers.taps import tapped
from sparsefx.sparsifiers.targets import Target

TAPS = ("sum", "max")
_CHUNK = 1 << 22  # shares that exist at once: 16 MiB in float32


@dataclass
class Seen:
    """What the examples showed of one layer.

    Attributes:
        sensitivity: s_j of every input channel, in [0, 1], float64 [groups * in/groups].
        patches: outputs of one filter for one example, at most.
        places: the same in all calls together, over all examples: what MACs grow with.
    """

    sensitivity: Tensor
    patches: int = 0
    places: int = 0


def channel_sensitivity(rows: Tensor, weight: Tensor, taps: str = "sum") -> Tensor:
    """Return the largest share that each input channel has in any output, [G * c].

    Positive and negative parts of inputs and weights make four sums without cancellation; a share
    is a channel's part of one of them: of its taps together (the published code takes the largest
    tap's, which understates a channel whose taps add up: ``taps="max"``). A sum of 0 has no shares.

    Args:
        rows: inputs of T outputs of each group, floating [G, T, c * taps].
        weight: of the same type, [G, filters, c, taps].
        taps: "sum" or "max".
    """
    groups, filters, channels, count = weight.shape
    rows = rows.reshape(groups, -1, channels, count)
    best = rows.new_zeros(groups, channels)
    width = groups * channels * (count if taps == "max" else 1)
    block = max(1, min(filters, _CHUNK // width))
    for x in torch.split(rows, max(1, _CHUNK // (width * block)), dim=1):
        parts = [part for part in (x.clamp(min=0), (-x).clamp(min=0)) if bool(part.any())]
        for w in torch.split(weight, block, dim=1):
            for a in parts:
                for half in (w.clamp(min=0), (-w).clamp(min=0)):
                    best = torch.maximum(best, _shares(a, half, taps))
    return best.flatten()


def _shares(a: Tensor, w: Tensor, taps: str) -> Tensor:
    """Largest shares [G, c] for inputs [G, T, c, taps] and weights [G, o, c, taps], all >= 0."""
    each = torch.einsum("gtck,gock->gcto", a, w)
    total = each.sum(1, keepdim=True)  # [G, 1, T, o]
    if taps == "max":
        each = torch.einsum("gtck,gock->gctok", a, w).amax(-1)
    share = torch.where(total > 0, each / total.clamp(min=torch.finfo(total.dtype).tiny), 0)
    return share.amax((2, 3))


def sample_size(filters: Sequence[int], delta: float) -> int:
    """Return how many examples the guarantee asks for: ceil(3 ln(8 max(f) sum(f) / delta)).

    Args:
        filters: numbers of filters f of the layers.
        delta: chance that the bound fails.
    """
    return math.ceil(3 * math.log(8 * max(filters) * sum(filters) / delta))


def look(
    model: nn.Module, targets: Sequence[Target], batches: Iterable[Any], wanted: int, taps: str
) -> tuple[dict[str, Seen], int, Any]:
    """Run batches, in eval mode, until ``wanted`` examples were seen.

    Args:
        model: left as it is.
        targets: the layers that are watched.
        batches: see :meth:`Stream.feed`.
        wanted: number of examples; the last batch counts whole.
        taps: see :func:`channel_sensitivity`.

    Returns:
        By layer what was seen, for those that were reached; the number of examples; a first batch.

    Raises:
        SparsifierError: no batch, one of an unknown type, or a NaN or infinity on the way.
    """
    known = {target.name: target for target in targets}
    found: dict[str, Seen] = {}
    examples, first, size = 0, None, 0

    mixed = set[str]()

    def take(name: str, inputs: tuple[Tensor, ...]) -> None:
        if any(x is not inputs[0] for x in inputs):
            mixed.add(name)  # query, key and value differ: a column stands for three channels
        else:
            _note(found, known[name], inputs, size, taps)

    stream = Stream(model, batches)
    with quiet(model), tapped(model, targets, take):
        for number, batch in stream.run():
            first, size = batch if number == 0 else first, _size(batch)
            stream.feed(batch)
            examples += size
            if examples >= wanted:
                break
    return {name: seen for name, seen in found.items() if name not in mixed}, examples, first


def _size(batch: Any) -> int:
    """Number of examples: the first dimension of the first tensor."""
    values = compat.leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(t) for t in values if isinstance(t, Tensor) and t.dim()), 1)


def _note(
    found: dict[str, Seen], target: Target, inputs: tuple[Tensor, ...], size: int, taps: str
) -> None:
    matrix = target.matrix(target.weight.detach())  # [out, in/groups, *taps]
    kind = torch.float64 if matrix.dtype is torch.float64 else torch.float32
    split = matrix.flatten(2) if matrix.dim() > 2 else matrix.unsqueeze(2)
    weight = split.reshape(target.groups, -1, *split.shape[1:]).to(kind)
    zeros = torch.zeros(weight.shape[0] * weight.shape[2], dtype=torch.float64)
    seen = found.setdefault(target.name, Seen(zeros.to(weight.device)))
    places = 0
    for _, rows in input_rows(target, inputs[:1]):
        if not bool(rows.isfinite().all()):
            raise SparsifierError(
                f"the input of layer {target.name!r} holds NaN or infinity; clean the batches"
            )
        shares = channel_sensitivity(rows.to(kind), weight, taps)
        if not bool(shares.isfinite().all()):
            raise SparsifierError(
                f"layer {target.name!r} holds infinity in its weight, or its outputs overflow: "
                "repair it before pruning"
            )
        seen.sensitivity = torch.maximum(seen.sensitivity, shares.double())
        places += rows.shape[1]
    seen.places += places
    seen.patches = max(seen.patches, math.ceil(places / max(1, size)))
