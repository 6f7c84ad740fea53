"""Remove for good the channels that masks left without effect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.compact.contractions import Found, contractions
from sparsefx.compact.dead import Search, foldable, search_of
from sparsefx.compact.plan import CompactPlan, LeftZeros, ShrunkChannels, ShrunkTensor
from sparsefx.compact.shrink import Shrinker, bias_takes, holders, plain_copy
from sparsefx.compact.trial import Reference, Removed, Trial
from sparsefx.errors import CompactError
from sparsefx.permutation.axes import Axis, Dim, leaves
from sparsefx.permutation.propagate import understand
from sparsefx.permutation.state import State


class Compacted(NamedTuple):
    """What :func:`sparsefx.compact_channels` returns.

    Attributes:
        plan: what shrank, and what could not.
        model: the smaller module.
    """

    plan: CompactPlan
    model: nn.Module


def compact_channels(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    *,
    kwargs: Mapping[str, Any] | None = None,
    round_to: int = 1,
) -> Compacted:
    """Return a smaller model that computes in eval mode what the masked one does.

    A channel goes if every sum over it holds only terms that are 0, whatever the input: its filters
    are zero and so is what follows (bias, batch norm, activation), or nobody reads it. Terms that
    are a constant are folded into the bias of the layer that sums them, unless zero padding makes
    them differ at the edge. Channels of a residual stream go where no writer or no reader is left;
    heads, and groups of a convolution, go as a whole. Where a size of the model's code stands
    against it, the channels stay, and the plan says why.

    What only training mode reads (an auxiliary head) is not cut. Nor are channels that reach an
    output: for Hugging Face models with a cache, set ``use_cache=False``.

    Masks are read as the values they leave: of any sparsifier, squashed or parametrized, and of
    ``torch.nn.utils.prune``. The original is not changed. The smaller model has plain parameters
    under the same names, in the original's training mode; batch norm in training mode turns
    filters of zeros into its bias, so that what is equal in eval mode need not be so there.

    Args:
        model: holds values and runs on ``args``; a compiled one is taken as it was written.
        args: inputs like those it is for, not just zeros: what is removed doesn't depend on their
            values, but both models are compared on them.
        kwargs: inputs by name.
        round_to: keep a multiple of so many channels (or all), for kernels that want one; heads
            and groups count with their width. 1 removes most.

    Returns:
        The plan and the model, an ordinary module: ``plan, small = compact_channels(...)``.

    Raises:
        CompactError: ``round_to`` is below 1; the model has no values, returns no tensors or
            differs between two runs; or a copy's outputs differ from the masked model's by more
            than 1e-5 of the largest value of an output, in float64 where it runs in that.
    """
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise CompactError(f"round_to={round_to!r}: give a number of channels, 1 or more")
    inputs = (args,) if isinstance(args, Tensor) else tuple(args)
    with compat.as_written(model) as written:
        _refuse_without_values(written)
        plain = plain_copy(written)
    reference = Reference(plain, inputs, kwargs or {})
    shrinker = _shrinker(reference)
    trial = Trial(reference, shrinker, round_to)
    removed = trial.settle()
    small = shrinker.build(plain, removed, trial.keep)
    return Compacted(_plan(plain, small, trial, removed), small)


def _refuse_without_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta" or nn.parameter.is_lazy(tensor):
            raise CompactError(
                f"{name!r} has no values yet; load the weights (and run lazy modules once) first"
            )


def _shrinker(reference: Reference) -> Shrinker:
    args, kwargs = reference.inputs()
    known = understand(reference.model, args, kwargs, False, training=False)
    with torch.no_grad():
        found = contractions(known)
    uses = Counter(one.weight for one in found.sums if one.weight is not None)
    for one in found.sums:
        count = 0 if one.weight is None else uses[one.weight]
        foldable(one, bias_takes(reference.model, one, count))
    return Shrinker(known, search_of(known, found), holders(reference.model))


# --- the plan


def _plan(plain: nn.Module, small: nn.Module, trial: Trial, removed: Removed) -> CompactPlan:
    shrinker, search = trial.shrinker, trial.shrinker.search
    states = [state for state in shrinker.known.states.values() if state.read]
    shapes = [(s, tuple(s.tensor.shape), shrinker.cut_shape(s, removed)) for s in states]
    return CompactPlan(
        tensors=tuple(ShrunkTensor(s.name, was, now) for s, was, now in shapes if was != now),
        channels=tuple(_channels(axis, gone, states) for axis, gone in removed.items()),
        left=tuple(_left(small, trial, states)),
        parameters_before=sum(p.numel() for p in plain.parameters()),
        parameters_after=sum(p.numel() for p in small.parameters()),
        macs_before=search.macs(search.found.costs, {}),
        macs_after=search.macs(search.found.costs, removed),
        folded=_folded(search.found, search, removed),
        checked=trial.reference.dtype,
        error=trial.error,
    )


def _channels(axis: Axis, gone: Tensor, states: Sequence[State]) -> ShrunkChannels:
    members = tuple(
        (state.name, number)
        for state in states
        for number, dim in enumerate(state.dims)
        if axis in leaves(dim)
    )
    return ShrunkChannels(axis.size, tuple((~gone).nonzero().flatten().tolist()), members)


def _folded(found: Found, search: Search, removed: Removed) -> tuple[str, ...]:
    names = []
    for one in found.sums:
        if one.constants is not None and one.weight is not None:
            gone = search.layout.gone(one.along, removed).to(one.constants.device)
            if bool(one.constants[gone].any()):
                names.append(one.weight.name.rpartition(".")[0])
    return tuple(names)


def _left(small: nn.Module, trial: Trial, states: Sequence[State]) -> Iterator[LeftZeros]:
    tensors = dict(small.named_parameters())
    for state in states:
        tensor = tensors.get(state.name)
        if tensor is None or tensor.dim() < 2:
            continue
        for number in range(2):
            others = [d for d in range(tensor.dim()) if d != number]
            zeros = int((tensor.detach().abs().amax(others) == 0).sum())
            if zeros:
                yield LeftZeros(state.name, number, zeros, _why(trial, state.dims[number]))


def _why(trial: Trial, dim: Dim) -> str:
    axes = list(dict.fromkeys(leaves(dim)))
    reasons = dict.fromkeys(_why_axis(trial, axis) for axis in axes)
    whole = "heads or groups go as a whole: " if len(axes) > 1 else ""
    return whole + "; ".join(reasons) if reasons else "one of each stays"


def _why_axis(trial: Trial, axis: Axis) -> str:
    search = trial.shrinker.search
    if reason := trial.refused.get(axis) or search.reason(axis):
        return reason
    name = search.needed.get(axis, (None, ""))[1]
    return f"{name} still needs them" if name else "nothing sums over them"
