"""Choose an order for every axis that gains by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sparsefx import masks
from sparsefx.permutation.axes import Axis, leaves, pin
from sparsefx.permutation.classes import Channels, channels_of, matrix, thinned, uses_of
from sparsefx.permutation.layers import Layer
from sparsefx.permutation.places import Order, permuted
from sparsefx.permutation.propagate import Model
from sparsefx.permutation.search import search

MOST_ROWS = 4096  # that one search looks at; whether a layer gained is measured on all of them
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Planned:
    """What is to be done.

    Attributes:
        orders: by axis.
        channels: every class of channels that was looked at, permuted or not.
        before: magnitude that each counted layer keeps, in float64.
        after: the same once everything is permuted.
    """

    orders: dict[Axis, Order] = field(default_factory=dict)
    channels: list[Channels] = field(default_factory=list)
    before: dict[Layer, float] = field(default_factory=dict)
    after: dict[Layer, float] = field(default_factory=dict)


def plan(known: Model, n: int, m: int, globs: Sequence[str], budget: int, seed: int) -> Planned:
    """Search every class of channels in turn, each on the weights as those before it left them."""
    for layer in known.layers:
        layer.reason = layer.reason or _not_counted(layer, n, m, globs)
    counted = [layer for layer in known.layers if not layer.reason]
    planned = Planned()
    for layer in counted:
        planned.before[layer] = planned.after[layer] = _kept(layer, {}, n, m)
    axes = list(dict.fromkeys(axis for layer in counted for axis in leaves(layer.summed)))
    uses = uses_of(known.flow, [axis for axis in axes if not axis.reason])
    for axis in axes:
        if not axis.reason:
            states = list(known.states.values())
            channels = channels_of(axis, uses, states, counted, m, planned.orders)
            planned.channels.append(channels)
            if not channels.reason:
                _improve(planned, channels, n, m, budget, seed)
    return planned


def _not_counted(layer: Layer, n: int, m: int, globs: Sequence[str]) -> str:
    """Why a layer has no N:M mask to improve; a weight that must stay is pinned."""
    assert layer.weight is not None
    weight, size = layer.weight.tensor, layer.weight.tensor.shape[layer.dim]
    if not any(fnmatchcase(layer.name, glob) for glob in globs):
        return f"no pattern of layers={list(globs)} matches its name"
    if weight.dtype not in _FLOATS:
        return f"its weight is {weight.dtype}"
    if size % m:
        return f"its sums run over {size} channels, which is not a multiple of m={m}"
    if not bool(weight.detach().isfinite().all()):
        return "its weight holds NaN or infinity"
    if not bool(weight.detach().any()):
        return "its weight is all zeros"
    if masks.is_valid(weight.detach(), n, m, layer.dim):
        reason = f"the weight of {layer.name} holds {n}:{m} zeros already"
        pin(layer.summed, reason)
        return reason
    return ""


def _improve(planned: Planned, channels: Channels, n: int, m: int, budget: int, seed: int) -> None:
    """Search, and keep the order if the layers retain more as a whole."""
    order = _searched(planned, channels, n, m, budget, seed)
    trial = {**planned.orders, channels.axis: order}
    after = {layer: _kept(layer, trial, n, m) for layer in channels.layers}
    if sum(after.values()) <= sum(planned.after[layer] for layer in channels.layers):
        channels.reason = f"no better order of its {channels.axis.size} channels was found"
        return
    planned.orders[channels.axis] = order
    planned.after.update(after)
    if channels.block is not None:
        pin(channels.block, "its blocks hold channels with permutations of their own")


def _searched(
    planned: Planned, channels: Channels, n: int, m: int, budget: int, seed: int
) -> Order:
    size = channels.axis.size
    phase = channels.windows[0].start % m
    orders = []
    for block in range(channels.blocks):
        rows = []
        for window in channels.windows:
            if window.block == block:
                weight = _weight(window.layer, planned.orders)
                rows.append(thinned(matrix(window, weight, size, m), MOST_ROWS))
        columns = -(-(phase + size) // m) * m
        movable = torch.zeros(columns, dtype=torch.bool)
        movable[phase : phase + size] = True
        every = torch.cat([part.float() for part in rows]) if rows else torch.zeros(0, columns)
        found = search(thinned(every, MOST_ROWS), n, m, movable=movable, budget=budget, seed=seed)
        orders.append(found[phase : phase + size] - phase)
    if channels.block is None:
        return Order(orders[0])
    return Order(torch.stack(orders), channels.block)


def _weight(layer: Layer, orders: Mapping[Axis, Order]) -> Tensor:
    assert layer.weight is not None
    return permuted(layer.weight.tensor, layer.weight.dims, orders)


def _kept(layer: Layer, orders: Mapping[Axis, Order], n: int, m: int) -> float:
    weight = _weight(layer, orders)
    mask = masks.nm_mask(weight, n, m, layer.dim)
    return float(torch.where(mask, weight.abs(), 0).sum(dtype=torch.float64))
