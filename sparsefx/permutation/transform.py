"""Permute the channels of a model, in place, so that N:M masks keep more of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.errors import PermutationError
from sparsefx.masks.checks import check_pattern
from sparsefx.permutation.axes import Axis, leaves
from sparsefx.permutation.check import Checked, Trial, apply, culprits
from sparsefx.permutation.classes import Channels
from sparsefx.permutation.layers import Layer
from sparsefx.permutation.places import Order, permuted
from sparsefx.permutation.plan import Planned, plan
from sparsefx.permutation.propagate import Model, understand
from sparsefx.permutation.report import PermutationReport, PermutedClass, PermutedLayer
from sparsefx.permutation.search import check_budget
from sparsefx.permutation.state import State


def permute_channels(
    model: nn.Module,
    args: Sequence[Any] | Tensor,
    n: int = 2,
    m: int = 4,
    *,
    kwargs: Mapping[str, Any] | None = None,
    layers: str | Sequence[str] = "*",
    keep_output_dense: bool = True,
    training: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    budget: int = 100,
    seed: int = 0,
) -> PermutationReport:
    """Permute channels in place, so that N:M masks keep more and the function stays the same.

    The graphs of the model, in eval and in training mode, say which dimensions of which parameters
    must be permuted together; what an operator doesn't treat alike is left alone, with the reason.
    Channels of heads and of convolution groups are permuted within each. Parameters stay the same
    objects; their gradients are permuted with them. The plan is tried on a copy of the model first.

    The search for each class of channels is :func:`sparsefx.permutation.search`. The idea is Pool &
    Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021); theirs is for 2:4.

    Args:
        model: its weights hold values; it runs on ``args`` a few times and its copy in float64.
        args: inputs.
        n: how many weights are kept of each group along what is summed over.
        m: the size of a group.
        kwargs: inputs by name.
        layers: globs of layer names whose masks count; others are permuted along, not improved.
        keep_output_dense: don't count the product that feeds the model's output, which the
            compiler leaves dense.
        training: look at the graph of training mode, too. ``False`` is for a model that can't run
            in it on ``args``; what it computes in training mode alone is then not known to stay.
        optimizer: its state for each parameter, if any, is permuted along.
        budget: rounds of swaps for each search, see :func:`sparsefx.permutation.search`.
        seed: of the searches.

    Returns:
        What was permuted, what is kept before and after, and why the rest was left alone.

    Raises:
        MaskError: n, m or the budget makes no sense.
        PermutationError: the model has no values or returns no tensors, or its copy's outputs
            changed by more than rounding: the message names the channels. The model is then
            untouched.
    """
    check_pattern(n, m)
    check_budget(budget)
    inputs = (args,) if isinstance(args, Tensor) else tuple(args)
    named = dict(kwargs or {})
    globs = [layers] if isinstance(layers, str) else list(layers)
    with compat.as_written(model) as written:
        _refuse_without_values(written)
        known = understand(written, inputs, named, keep_output_dense, training)
        planned = plan(known, n, m, globs, budget, seed)
        touched = _touched(known, planned)
        trial = Trial(written, inputs, named)
        checked = trial.check(touched, planned.orders)
        if not checked:
            _refuse(trial, touched, planned, checked)
    if optimizer is not None:
        _permute_optimizer(optimizer, touched, planned.orders)
    apply(touched, planned.orders, lambda state: state.tensor)
    return _report(known, planned, checked, n, m)


def _refuse_without_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta" or nn.parameter.is_lazy(tensor):
            raise PermutationError(
                f"{name!r} has no values yet; load the weights (and run lazy modules once) first"
            )


def _touched(known: Model, planned: Planned) -> list[State]:
    return [
        state
        for state in known.states.values()
        if state.read and any(a in planned.orders for dim in state.dims for a in leaves(dim))
    ]


def _refuse(trial: Trial, touched: Sequence[State], planned: Planned, checked: Checked) -> None:
    wrong = set(culprits(trial, touched, planned.orders)) or set(planned.orders)
    tensors = [_tensor_names(one) for one in planned.channels if one.axis in wrong]
    raise PermutationError(
        f"permuting the channels of {'; of '.join(tensors)} changes the model's outputs by "
        f"{checked.error:.1e} of their size, and {checked.tolerance:.1e} is allowed; nothing was "
        "changed. The model treats these channels in a way that its graph doesn't show: leave out "
        "the layers behind them with layers=[...], or report it"
    )


def _tensor_names(channels: Channels) -> str:
    return ", ".join(f"{state.name} (dim {dim})" for state, dim in channels.members)


def _permute_optimizer(
    optimizer: torch.optim.Optimizer, touched: Sequence[State], orders: Mapping[Axis, Order]
) -> None:
    for state in touched:
        for value in optimizer.state.get(state.tensor, {}).values():
            if isinstance(value, Tensor) and value.shape == state.tensor.shape:
                with torch.no_grad():
                    value.copy_(permuted(value, state.dims, orders))


# --- the report


def _report(known: Model, planned: Planned, checked: Checked, n: int, m: int) -> PermutationReport:
    rows = [_row(layer, planned) for layer in known.layers]
    classes = [
        _class(one, planned.orders[one.axis])
        for one in planned.channels
        if one.axis in planned.orders
    ]
    return PermutationReport(
        n, m, tuple(classes), tuple(rows), checked.dtype, checked.error, checked.tolerance
    )


def _class(channels: Channels, order: Order) -> PermutedClass:
    lists = order.order.reshape(-1, channels.axis.size).tolist()
    return PermutedClass(
        size=channels.axis.size,
        blocks=channels.blocks,
        moved=order.moved,
        tensors=tuple((state.name, dim) for state, dim in channels.members),
        layers=tuple(layer.name for layer in channels.layers),
        order=tuple(map(tuple, lists)),
    )


def _row(layer: Layer, planned: Planned) -> PermutedLayer:
    name = layer.weight.name if layer.weight is not None else ""
    if layer.reason or layer.weight is None:
        return PermutedLayer(layer.name, name, layer.dim, 0.0, 0.0, 0.0, layer.reason)
    total = float(layer.weight.tensor.detach().abs().sum(dtype=torch.float64))
    return PermutedLayer(
        layer.name, name, layer.dim, total, planned.before[layer], planned.after[layer],
        _why_not(layer, planned),
    )  # fmt: skip


def _why_not(layer: Layer, planned: Planned) -> str:
    """Return "" if any of its channels were permuted, else every reason why they weren't."""
    axes = list(dict.fromkeys(leaves(layer.summed)))
    if any(axis in planned.orders for axis in axes):
        return ""
    found = {one.axis: one.reason for one in planned.channels}
    reasons = [found.get(axis) or axis.reason for axis in axes]
    return "; ".join(dict.fromkeys(reasons))
