"""Which dimensions of which tensors hold gated channels, and the tensors without some of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsefx.permutation.axes import Dim, settle, size_of
from sparsefx.permutation.places import places
from sparsefx.permutation.propagate import Model
from sparsefx.sparsifiers.targets import Target, all_targets
from sparsefx.sparsifiers.vrpge.sizes import Sizes

if TYPE_CHECKING:
    from sparsefx.sparsifiers.vrpge.method import VRPGE

Tensors = dict[str, Tensor]
Spots = tuple[tuple[int, Tensor, Tensor], ...]
Written = list[tuple[str, Tensor, int, Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Cut:
    """A dimension of a tensor that has gated channels.

    Attributes:
        number: which dimension.
        spots: (group, its gate for each position, those positions), for each place of an axis.
        size: of the dimension.
        written: whether channels that are off are to be zero in it.
        told: (module, attribute) of the code that holds the size as a number.
    """

    number: int
    spots: Spots
    size: int
    written: bool
    told: tuple[tuple[nn.Module, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Source:
    """Where a tensor of the model lives, and how it is cut."""

    name: str
    holder: dict[str, Tensor | None]
    key: str
    cuts: tuple[Cut, ...]
    buffer: bool

    @property
    def tensor(self) -> Tensor:
        """What the model holds now."""
        found = self.holder[self.key]
        assert found is not None
        return found


class Wiring:
    """The tensors of a model, each with its cuts.

    Args:
        owner: the gates.
        skeleton: the model's code without gates.
        known: the model's graph.
    """

    def __init__(self, owner: VRPGE, skeleton: nn.Module, known: Model) -> None:
        """Find every cut."""
        self.owner, self.skeleton, self.known = owner, skeleton, known
        self.groups = owner.groups
        self._places: dict[int, tuple[Dim, Spots]] = {}  # the dimension is kept for its id
        self.sources = list(self._find_sources())
        self._products = list(self._find_products())

    def gather(
        self, live: list[Tensor], kept: list[Tensor], values: Callable[[Source], Tensor]
    ) -> tuple[Tensors, Written]:
        """Return the tensors of the sub-net, and what is to be written back of buffers.

        Args:
            live: for each group, bool [channels]: whose gates are on.
            kept: likewise, those that are computed.
            values: what a source holds.
        """
        small: Tensors = {}
        written: Written = []
        known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        for source in self.sources:
            full = part = values(source)
            for cut in source.cuts:
                key = tuple(id(spot[1]) for spot in cut.spots)
                if key not in known:
                    known[key] = _positions(cut, live, kept)
                index, on = known[key]
                for module, attribute in cut.told:
                    setattr(module, attribute, len(index))
                if source.buffer or len(index) < cut.size:
                    part = part.index_select(cut.number, index)
                if source.buffer:
                    written.append((source.name, full, cut.number, index, on))
                elif cut.written:
                    shape = [1] * part.dim()
                    shape[cut.number] = len(index)
                    part = torch.where(on.reshape(shape), part, 0)
            small[source.name] = part
        return small, written

    def _find_sources(self) -> Iterator[Source]:
        made_of = {state.name: state.dims for state in self.known.states.values()}
        masked = dict(self._masked(made_of))
        buffers = {name for name, _ in self.skeleton.named_buffers()}
        for name in (*dict(self.skeleton.named_parameters()), *buffers):
            holder, key = _holder(self.owner.model, name)
            gate, cuts = masked.get(name, (-1, ())), []
            for number, dim in enumerate(made_of.get(name, ())):
                own = gate[1] if number == gate[0] else self._spots(dim)
                if own:
                    told = _told(self.skeleton, name, number)
                    cuts.append(Cut(number, own, size_of(dim), number == gate[0], told))
            if name in buffers and len(cuts) > 1:
                for group, _, _ in (spot for cut in cuts for spot in cut.spots):
                    self.groups[group].reason = f"buffer {name!r} holds gated channels twice"
            yield Source(name, holder, key, tuple(cuts), name in buffers)

    def _masked(self, made_of: dict[str, list[Dim]]) -> Iterator[tuple[str, tuple[int, Spots]]]:
        """Name -> the dimension that is gated, and its places."""
        for i, group in enumerate(self.groups):
            first = {int(gate): c for c, gate in reversed(list(enumerate(group.unit.tolist())))}
            for member in (*group.members, *group.beside):
                target = member.target
                whole = torch.arange(len(member.unit))
                local = torch.tensor([first[gate] for gate in member.unit.tolist()])
                spots: Spots = ((i, local, whole),)
                name = _plain_name(self.owner.model, target)
                if group.axis is not None:
                    spots = self._spots(made_of[name][member.dim])
                yield name, (member.dim, spots)

    def _spots(self, dim: Dim) -> Spots:
        dim = settle(dim)
        if id(dim) not in self._places:  # an axis is one object wherever it occurs
            numbers = {group.axis: i for i, group in enumerate(self.groups)}
            found = [place for place in places(dim) if place.axis in numbers]
            spots = tuple((numbers[one.axis], one.local, one.positions) for one in found)
            self._places[id(dim)] = dim, spots
        return self._places[id(dim)][1]

    def _find_products(self) -> Iterator[tuple[int, list[Cut], tuple[int, ...]]]:
        sources = {source.name: source for source in self.sources}
        for target in all_targets(self.owner.model):
            name = _plain_name(self.owner.model, target)
            if uses := self.owner.uses.get(target.name, 0):
                yield uses, list(sources[name].cuts), tuple(target.weight.shape)

    def cost(self, sizes: Sizes) -> float:
        """Return the multiply-accumulates of one forward pass with so many channels."""
        total = 0.0
        for uses, cuts, shape in self._products:
            left = [float(size) for size in shape]
            for cut in cuts:
                for group, _, positions in cut.spots:
                    share = 1 - sizes[group] / len(self.groups[group].unit)
                    left[cut.number] -= share * len(positions)
            total += uses * math.prod(left)
        return total


def _positions(cut: Cut, live: list[Tensor], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return which coordinates are computed, int64 [kept], and whose gates are on, bool [kept]."""
    device = live[0].device
    stay, on = torch.ones(2, cut.size, dtype=torch.bool, device=device)
    for group, local, positions in cut.spots:
        stay[positions] &= kept[group][local]
        on[positions] &= live[group][local]
    index = stay.nonzero().flatten()
    return index, on[index]


def skeleton_of(model: nn.Module) -> nn.Module:
    """Copy a model's modules, without its tensors: both hold the same ones."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _plain_name(model: nn.Module, target: Target) -> str:
    path = next(name for name, module in model.named_modules() if module is target.module)
    return f"{path}.{target.tensor_name}".lstrip(".")


def _told(skeleton: nn.Module, name: str, number: int) -> tuple[tuple[nn.Module, str], ...]:
    """Return where code keeps a size that it reads: depthwise groups, Hugging Face's Conv1D."""
    path, _, key = name.rpartition(".")
    module = skeleton.get_submodule(path)
    size = module.get_parameter(key).shape[number] if key == "weight" else 0
    for attribute, dim in (("groups", 0), ("nf", 1)):
        if number == dim and size > 1 and getattr(module, attribute, None) == size:
            return ((module, attribute),)
    return ()


def _holder(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Return the dict in which a model keeps a tensor, and its key there."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._buffers:
        return module._buffers, key
    if key not in module._parameters:
        return module.parametrizations[key]._parameters, "original"  # type: ignore[index,union-attr]
    return module._parameters, key
