"""What a plan holds: parameters of which slices travel, and how the ranks agree on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefx.distributed.slices import Cut


@dataclass(frozen=True)
class Finder:
    """Finds the indices of one product again.

    Attributes:
        cut: the graph that does it.
        inputs: the parameters and buffers that it reads.
        count: how many indices it returns for each group.
        text: equal for those that differ in ``count`` alone, on every rank.
    """

    cut: Cut
    inputs: tuple[Tensor, ...]
    count: int
    text: str

    def __call__(self) -> Tensor:
        """Return the indices, [count] or [groups, count]."""
        found: Tensor = self.cut.graph(self.count, *self.inputs)
        return found


@dataclass
class Sliced:
    """A parameter of which slices travel.

    Attributes:
        name: of the parameter.
        axis: along which it is sliced.
        groups: parts of axis 0 that have indices of their own.
        depth: slices of each group.
        levels: what was compiled for it, from few slices to many, and all of it together. There are
            several where a schedule or a mode changes; the gradients of a step say which one holds.
        expected: whether a compiled graph makes the whole gradient, so that no slices suffice.
        level: which one is sent; ``len(levels)`` is the whole tensor.
    """

    name: str
    axis: int
    groups: int
    depth: int
    levels: list[list[Finder]]
    expected: bool = False
    level: int = 0

    @property
    def whole(self) -> bool:
        """Whether the whole tensor is sent."""
        return self.level == len(self.levels)

    def indices(self, level: int) -> Tensor:
        """Return the slices of a level as positions in [groups * depth]."""
        found = [self._flat(finder()) for finder in self.levels[level]]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _flat(self, indices: Tensor) -> Tensor:
        first = torch.arange(self.groups, device=indices.device).unsqueeze(1) * self.depth
        return (indices.view(self.groups, -1) + first).flatten()

    def describe(self) -> str:
        """Say what is sent."""
        count = count_of(self.levels[min(self.level, len(self.levels) - 1)])
        where = f"along axis {self.axis}" + (" of each group" if self.groups > 1 else "")
        slices = f"{count} of {self.depth} slices {where}"
        return f"in full at present: {slices} don't hold it" if self.whole else slices

    def signature(self) -> str:
        """Return what ranks must agree on before they add up these slices."""
        levels = [texts_of(level) for level in self.levels]
        text = repr((self.axis, self.groups, self.depth, levels))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Plan:
    """What is known of every parameter.

    Attributes:
        sliced: by the parameter's id.
        whole: reason by name, of those that are sent in full.
        known: ids of all parameters.
        seen: what the plan was made from, to tell when more was compiled.
    """

    sliced: dict[int, Sliced] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    known: frozenset[int] = frozenset()
    seen: tuple[object, ...] = ()

    def keep_agreed(self, others: Sequence[Mapping[str, str]]) -> None:
        """Send in full what another rank sees differently."""
        for key, entry in list(self.sliced.items()):
            mine = entry.signature()
            if any(other.get(entry.name) != mine for other in others):
                del self.sliced[key]
                self.whole[entry.name] = "the ranks compiled it differently"

    def signatures(self) -> dict[str, str]:
        """Return what other ranks compare: a text by parameter."""
        return {entry.name: entry.signature() for entry in self.sliced.values()}


def count_of(finders: Sequence[Finder]) -> int:
    """Return how many indices they find for each group."""
    return sum(finder.count for finder in finders)


def texts_of(finders: Sequence[Finder]) -> list[tuple[str, int]]:
    """Return what tells them from others."""
    return [(finder.text, finder.count) for finder in finders]
