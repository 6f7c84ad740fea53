"""Where in a tensor an axis lies, and the index that permutes it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.permutation.axes import Axis, Dim, Prod, settle, size_of


@dataclass(frozen=True, eq=False)
class Place:
    """One place of an axis within a dimension.

    Attributes:
        axis: it.
        positions: int64 [p], coordinates of the dimension that it covers.
        local: int64 [p], which coordinate of the axis each of them is.
        stride: how far apart neighbours of the axis lie in the dimension.
        total: size of the dimension.
        beside: coordinates [p] of the axes that this one is multiplied with, where unambiguous.
    """

    axis: Axis
    positions: Tensor
    local: Tensor
    stride: int
    total: int
    beside: dict[Axis, Tensor]


@dataclass(frozen=True, eq=False)
class Order:
    """How an axis is permuted.

    Attributes:
        order: int64 [size]: the coordinate that each place takes; [blocks, size] with a block axis.
        block: the axis whose coordinate chooses the row; None where all are permuted alike.
    """

    order: Tensor
    block: Axis | None = None

    @property
    def moved(self) -> int:
        """How many channels leave their place."""
        return int((self.order != torch.arange(self.order.shape[-1])).sum())


def places(dim: Dim) -> list[Place]:
    """Return every place of every axis within a dimension."""
    total = size_of(dim)
    every = torch.arange(total)
    return [
        Place(axis, positions, local, stride, total, beside)
        for axis, positions, local, stride, beside in _walk(settle(dim), every, every, 1, {})
    ]


def _walk(
    dim: Dim, local: Tensor, positions: Tensor, stride: int, beside: dict[Axis, Tensor]
) -> Iterator[tuple[Axis, Tensor, Tensor, int, dict[Axis, Tensor]]]:
    if isinstance(dim, Axis):
        yield dim, positions, local, stride, beside
    elif isinstance(dim, Prod):
        yield from _walk_product(dim, local, positions, stride, beside)
    else:
        start = 0
        for part in dim.parts:
            stop = start + size_of(part)
            inside = (local >= start) & (local < stop)
            others = {axis: at[inside] for axis, at in beside.items()}
            yield from _walk(part, local[inside] - start, positions[inside], stride, others)
            start = stop


def _walk_product(
    dim: Prod, local: Tensor, positions: Tensor, stride: int, beside: dict[Axis, Tensor]
) -> Iterator[tuple[Axis, Tensor, Tensor, int, dict[Axis, Tensor]]]:
    digits, inner = list[tuple[Dim, Tensor, int]](), stride
    for part in reversed(dim.parts):
        size = size_of(part)
        digits.append((part, local % size, inner))
        local, inner = local // size, inner * size
    plain = [part for part in dim.parts if isinstance(part, Axis)]
    for part, at, step in digits:
        others = dict(beside)
        for other, coordinate, _ in digits:
            if isinstance(other, Axis) and other is not part and plain.count(other) == 1:
                others[other] = coordinate
        yield from _walk(part, at, positions, step, others)


def block_of(
    found: Sequence[Sequence[Place]], place: Place, block: Axis
) -> tuple[int, Tensor] | None:
    """Find the coordinates of ``block`` that go with a place.

    Args:
        found: the places in each dimension of one tensor.
        place: one of them.
        block: the axis that is asked for.

    Returns:
        (-1, coordinates for each of the place's positions), or (d, coordinates for each position
        of dimension d), or None where it is ambiguous or absent.
    """
    near = [(d, p) for d, dim in enumerate(found) for p in dim if _meet(dim, p, place)]
    mine = sum(p.axis is place.axis for _, p in near)
    theirs = [(d, p) for d, p in near if p.axis is block]
    if block in place.beside:
        return (-1, place.beside[block]) if len(theirs) == mine else None
    if mine != 1 or len(theirs) != 1:
        return None
    number, other = theirs[0]
    whole = torch.equal(other.positions, torch.arange(other.total))
    return (number, other.local) if whole and place not in found[number] else None


def _meet(dim: Sequence[Place], other: Place, place: Place) -> bool:
    """Whether elements of the tensor lie in both places: always, but in parts of one sum."""
    return place not in dim or bool(torch.isin(place.positions[:1], other.positions))


def permuted(tensor: Tensor, dims: Sequence[Dim], orders: Mapping[Axis, Order]) -> Tensor:
    """Return a copy of ``tensor`` with all its axes in their new orders.

    Args:
        tensor: any.
        dims: its dimensions.
        orders: by axis; others stay.
    """
    found = [places(dim) for dim in dims]
    out = tensor.detach()
    for number, inside in enumerate(found):
        index = torch.arange(tensor.shape[number])
        for place in inside:
            order = orders.get(place.axis)
            if order is None:
                continue
            if order.block is None:
                index[place.positions] += (order.order[place.local] - place.local) * place.stride
                continue
            where = block_of(found, place, order.block)
            assert where is not None, "a block axis that isn't there"
            if where[0] < 0:
                new = order.order[where[1], place.local]
                index[place.positions] += (new - place.local) * place.stride
            else:
                out = _across(out, number, where, place, order.order)
        if not torch.equal(index, torch.arange(len(index))):
            out = out.index_select(number, index.to(out.device))
    return out


def _across(
    tensor: Tensor, dim: int, where: tuple[int, Tensor], place: Place, order: Tensor
) -> Tensor:
    """Permute along ``dim``, each slice of another dimension in its own way."""
    other, blocks = where
    index = torch.arange(tensor.shape[dim]).repeat(tensor.shape[other], 1)
    new = order[blocks][:, place.local]
    index[:, place.positions] += (new - place.local) * place.stride
    shape = [1] * tensor.dim()
    shape[other], shape[dim] = index.shape
    index = index if other < dim else index.T
    return tensor.gather(dim, index.reshape(shape).expand(tensor.shape).to(tensor.device))
