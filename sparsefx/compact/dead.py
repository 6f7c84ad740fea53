"""Which channels no sum needs: removing them changes nothing that can be told."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefx.compact.contractions import Contraction, Cost, Found
from sparsefx.permutation.axes import Axis, Dim, leaves, size_of
from sparsefx.permutation.places import Place, places
from sparsefx.permutation.propagate import Model


class Layout:
    """Where axes lie in dimensions, looked up once."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._known: dict[int, tuple[Dim, list[Place]]] = {}

    def places(self, dim: Dim) -> list[Place]:
        """Return every place of every axis within a dimension."""
        if id(dim) not in self._known:
            self._known[id(dim)] = dim, places(dim)
        return self._known[id(dim)][1]

    def gone(self, dim: Dim, removed: Mapping[Axis, Tensor]) -> Tensor:
        """Return which coordinates of a dimension go, bool [size]."""
        out = torch.zeros(size_of(dim), dtype=torch.bool)
        for spot in self.places(dim):
            if spot.axis in removed:
                out[spot.positions] |= removed[spot.axis][spot.local]
        return out

    def size(self, dim: Dim, removed: Mapping[Axis, Tensor]) -> int:
        """Return how many coordinates stay."""
        return int((~self.gone(dim, removed)).sum())


@dataclass
class Search:
    """What may be removed, by axis of the parameters.

    Attributes:
        found: sums and bars.
        axes: the axes of parameters and buffers over which something sums.
        layout: of their dimensions.
        widths: how many channels of a tensor one coordinate of an axis takes along, at least.
        needed: who needs the channels of an axis, as it was found last.
    """

    found: Found
    axes: list[Axis]
    layout: Layout
    widths: dict[Axis, int]
    needed: dict[Axis, tuple[Tensor, str]] = field(default_factory=dict)

    def removable(self, allowed: Container[Axis], round_to: int) -> dict[Axis, Tensor]:
        """Return the channels that go, bool [size] by axis; at least one of each stays.

        What only a removed channel reads may go as well, so this repeats until nothing changes.

        Args:
            allowed: axes that may shrink; whatever is pinned or barred does not.
            round_to: keep a multiple of so many channels, or all.
        """
        free = [a for a in self.axes if a in allowed and not self.reason(a)]
        removed: dict[Axis, Tensor] = {}
        while True:
            needed = self._needed(free, removed)
            now = {axis: self._rounded(axis, ~needed[axis][0], round_to) for axis in free}
            now = {axis: gone for axis, gone in now.items() if bool(gone.any())}
            if all(axis in removed and torch.equal(removed[axis], now[axis]) for axis in now):
                self.needed.update(needed)
                return now
            removed = now

    def reason(self, axis: Axis) -> str:
        """Return why nothing of an axis may be removed; "" where it may."""
        return axis.reason or self.found.bars.get(axis, "")

    def _needed(
        self, free: Iterable[Axis], removed: Mapping[Axis, Tensor]
    ) -> dict[Axis, tuple[Tensor, str]]:
        out = {axis: (torch.zeros(axis.size, dtype=torch.bool), "") for axis in free}
        for one in self.found.sums:
            spots = [spot for spot in self.layout.places(one.along) if spot.axis in out]
            if not spots:
                continue
            needs = self._rows(one, removed)
            for spot in spots:
                before, name = out[spot.axis]
                before[spot.local[needs[spot.positions]]] = True
                out[spot.axis] = before, name or one.where
        return out

    def _rows(self, one: Contraction, removed: Mapping[Axis, Tensor]) -> Tensor:
        matters = one.matters
        if matters.shape[1] == size_of(one.out):
            columns = ~self.layout.gone(one.out, removed)
            if not bool(columns.all()):
                matters = matters[:, columns.to(matters.device)]
        return matters.any(1).cpu()

    def _rounded(self, axis: Axis, gone: Tensor, round_to: int) -> Tensor:
        """Give back channels until at least 1 stays, and a multiple of ``round_to`` channels."""
        step = round_to // math.gcd(round_to, self.widths[axis])
        stays = len(gone) - int(gone.sum())
        wanted = min(len(gone), max(1, -(-stays // step)) * step)
        gone = gone.clone()
        gone[gone.nonzero().flatten()[: wanted - stays]] = False
        return gone

    def macs(self, costs: Iterable[Cost], removed: Mapping[Axis, Tensor]) -> int:
        """Return the multiply-accumulates of all products."""
        total = 0
        for cost in costs:
            count = cost.fixed
            for dim in cost.dims:
                count *= self.layout.size(dim, removed)
            total += count
        return total


def search_of(model: Model, found: Found) -> Search:
    """Gather the axes of parameters and buffers that anything sums over."""
    states = [state for state in model.states.values() if state.read]
    layout, widths = Layout(), dict[Axis, int]()
    for spot in (spot for state in states for dim in state.dims for spot in layout.places(dim)):
        widths[spot.axis] = min(spot.stride, widths.get(spot.axis, spot.stride))
    summed = {axis for one in found.sums for axis in leaves(one.along)}
    return Search(found, [axis for axis in widths if axis in summed], layout, widths)


def foldable(one: Contraction, allowed: bool) -> None:
    """Let terms that are a constant times a known weight go, where a bias can take them."""
    if one.constants is None or not allowed:
        one.constants = one.right = None
        return
    one.matters = one.matters & (one.constants == 0).unsqueeze(1)
