"""Which axes can be permuted to any use, and whether block by block."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefx.permutation.axes import Axis, leaves
from sparsefx.permutation.flow import Flow
from sparsefx.permutation.layers import Layer
from sparsefx.permutation.places import Place, block_of, places
from sparsefx.permutation.state import State


@dataclass(eq=False)
class Window:
    """A run of a layer's weight that one permutation of an axis rearranges.

    Attributes:
        layer: whose weight.
        start: where the axis begins in the dimension that is summed over.
        block: coordinate of the block axis; 0 where there is none.
        rows: (d, coordinates) of the rows that belong to the block, where it is another dimension.
    """

    layer: Layer
    start: int
    block: int
    rows: tuple[int, Tensor] | None = None


@dataclass(eq=False)
class Channels:
    """An axis that may be permuted, and what would gain by it.

    Attributes:
        axis: it.
        block: each coordinate of this axis can have a permutation of its own.
        windows: what the search looks at.
        layers: every counted layer whose sum runs over the axis.
        members: (parameter, dimension) that are permuted.
        reason: why it is of no use; "" where it is.
    """

    axis: Axis
    block: Axis | None
    windows: list[Window]
    layers: list[Layer]
    members: list[tuple[State, int]]
    reason: str = ""

    @property
    def blocks(self) -> int:
        """How many permutations it takes."""
        return self.block.size if self.block is not None else 1


@dataclass
class Uses:
    """What is asked of every axis, gathered once.

    Attributes:
        tensors: distinct structures of tensors, by axis: the places in each dimension.
        mixes: by axis: axes along which its coordinates were combined.
    """

    tensors: dict[Axis, list[list[list[Place]]]] = field(default_factory=dict)
    mixes: dict[Axis, set[Axis]] = field(default_factory=dict)


def uses_of(flow: Flow, axes: Iterable[Axis]) -> Uses:
    """Gather the tensors and mixtures in which these axes occur."""
    wanted, uses, seen = set(axes), Uses(), set[tuple[int, ...]]()
    small: dict[int, list[Place]] = {}
    for dims in flow.tensors:
        inside = {axis for dim in dims for axis in leaves(dim)} & wanted
        key = tuple(map(id, dims))
        if not inside or key in seen:
            continue
        seen.add(key)
        for dim in dims:
            if id(dim) not in small:
                small[id(dim)] = places(dim)
        found = [small[id(dim)] for dim in dims]
        for axis in inside:
            uses.tensors.setdefault(axis, []).append(found)
    for along, others in flow.mixes:
        mixed = {axis for dim in along for axis in leaves(dim)}
        for axis in {axis for dim in others for axis in leaves(dim)} & wanted:
            uses.mixes.setdefault(axis, set()).update(mixed)
    return uses


def channels_of(
    axis: Axis,
    uses: Uses,
    states: Iterable[State],
    layers: Sequence[Layer],
    m: int,
    moved: Container[Axis],
) -> Channels:
    """Describe what permuting ``axis`` takes and may bring; what ``moved`` numbers no blocks."""
    members = [
        (state, number)
        for state in states
        if state.read
        for number, dim in enumerate(state.dims)
        if axis in leaves(dim)
    ]
    counted = [layer for layer in layers if axis in leaves(layer.summed)]
    block = _block(axis, uses, moved)
    windows = [w for layer in counted for w in _windows(layer, axis, block)]
    windows = _one_phase([w for w in windows if axis.size > 1], m)
    reason = ""
    if not windows:
        reason = f"its {axis.size} channels lie scattered in the groups of m={m}"
    elif axis.size + windows[0].start % m <= m:
        reason = f"its {axis.size} channels share one group of m={m}: their order is of no matter"
    return Channels(axis, block, windows, counted, members, reason)


def _block(axis: Axis, uses: Uses, moved: Container[Axis]) -> Axis | None:
    """Find the axis that accompanies this one everywhere, so that it can choose its permutation."""
    tensors = uses.tensors.get(axis, [])
    mixed = uses.mixes.get(axis, set())
    common: set[Axis] | None = None
    for found in tensors:
        here = {place.axis for dim in found for place in dim} - {axis}
        common = here if common is None else common & here
    for block in sorted(common or (), key=lambda other: -other.size):
        if block in mixed or block in moved:
            continue
        if all(_accompanies(found, axis, block) for found in tensors):
            return block
    return None


def _accompanies(found: Sequence[Sequence[Place]], axis: Axis, block: Axis) -> bool:
    mine = [place for dim in found for place in dim if place.axis is axis]
    return all(block_of(found, place, block) is not None for place in mine)


def _windows(layer: Layer, axis: Axis, block: Axis | None) -> list[Window]:
    assert layer.weight is not None
    found = [places(dim) for dim in layer.weight.dims]
    out = []
    for place in found[layer.dim]:
        if place.axis is not axis or place.stride != 1:
            continue
        bases = place.positions - place.local
        first = place.local == 0
        where = None if block is None else block_of(found, place, block)
        if where is None or block is None:
            out += [Window(layer, int(start), 0) for start in bases[first]]
        elif where[0] < 0:
            starts = zip(bases[first].tolist(), where[1][first].tolist(), strict=True)
            out += [Window(layer, start, number) for start, number in starts]
        else:
            out += [
                Window(layer, int(start), number, where)
                for start in bases[first]
                for number in range(block.size)
            ]
    return out


def _one_phase(windows: list[Window], m: int) -> list[Window]:
    """Keep the windows whose groups of m begin at the same channel as most weights' do."""
    weights: dict[int, int] = {}
    for window in windows:
        assert window.layer.weight is not None
        phase = window.start % m
        weights[phase] = weights.get(phase, 0) + window.layer.weight.tensor.numel()
    if not weights:
        return []
    best = max(weights, key=lambda phase: (weights[phase], -phase))
    return [window for window in windows if window.start % m == best]


def matrix(window: Window, weight: Tensor, size: int, m: int) -> Tensor:
    """Return the columns of whole groups around a window, [rows, columns].

    Args:
        window: it.
        weight: its layer's, as it is now.
        size: of the axis.
        m: of a group.
    """
    layer = window.layer
    if window.rows is not None:
        other, blocks = window.rows
        chosen = (blocks == window.block).nonzero().flatten()
        weight = weight.index_select(other, chosen.to(weight.device))
    rows = weight.detach().movedim(layer.dim, -1)
    start = window.start - window.start % m
    stop = -(-(window.start + size) // m) * m
    return rows[..., start:stop].reshape(-1, stop - start)


def thinned(rows: Tensor, most: int) -> Tensor:
    """Return at most so many rows, evenly spread."""
    if len(rows) <= most:
        return rows
    return rows[torch.arange(most) * len(rows) // most]
