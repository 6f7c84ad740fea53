"""The weight step on the drawn sub-net alone: the same model with smaller tensors.

Weights are gathered, ``W[rows][:, columns]``, the model runs on them through
``torch.func.functional_call``, and the gather's backward brings gradients to the full parameters.
What a channel that is off would hold is never computed, in the forward or the backward pass.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsefx import compat
from sparsefx.errors import SparsifierError
from sparsefx.permutation.axes import Dim, settle, size_of
from sparsefx.permutation.places import places
from sparsefx.sparsifiers.schedules import whole_number
from sparsefx.sparsifiers.targets import Target, all_targets
from sparsefx.sparsifiers.vrpge.sizes import Programs, Sizes
from sparsefx.sparsifiers.vrpge.trial import find_whole

if TYPE_CHECKING:
    from sparsefx.sparsifiers.vrpge.method import VRPGE

Tensors = dict[str, Tensor]
Spots = tuple[tuple[int, Tensor, Tensor], ...]
Written = list[tuple[str, Tensor, int, Tensor, Tensor]]


class Macs(NamedTuple):
    """Multiply-accumulates of one forward pass on the example inputs, products with gates alone.

    Attributes:
        dense: of the full net.
        live: of the channels that are on.
        computed: of what runs, padding included.
    """

    dense: int
    live: int
    computed: int


@dataclass(frozen=True, eq=False)
class _Cut:
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
class _Source:
    """Where a tensor of the model lives, and how it is cut."""

    name: str
    holder: dict[str, Tensor | None]
    key: str
    cuts: tuple[_Cut, ...]
    buffer: bool

    @property
    def tensor(self) -> Tensor:
        found = self.holder[self.key]
        assert found is not None
        return found


class CompactStep:
    """Call it in place of the model; it computes the channels of the present sub-net alone.

    In training mode that is the drawn sub-net, in eval mode the most probable one. The outputs are
    those of the masked model to rounding; so are gradients, which land in the model's parameters
    (zeros where gates are off), and running statistics, but that those of channels that are off
    stay as they are. Counts are rounded up with channels whose weights act as zero. Groups that
    can't be left out (see :attr:`whole`) are computed whole, with masked weights.

    Hooks of wrappers around the model, such as DDP's, don't run: average gradients yourself.

    Args:
        owner: the gates; constructed with args.
        backend: as for :meth:`VRPGE.compact`, like the others.
        buckets: likewise.
        programs: likewise.

    Attributes:
        whole: group -> why its channels are computed whole.
        sizes: channels of each group that the last call computed.

    Raises:
        SparsifierError: the owner has no example inputs, or an option is out of range.
    """

    def __init__(self, owner: VRPGE, backend: Any, buckets: int, programs: int) -> None:
        """Find what is cut where, and try it."""
        if owner.known is None or owner.skeleton is None:
            raise SparsifierError(
                "VRPGE.compact() needs to know who reads which channel: pass args=, example "
                "inputs, to VRPGE"
            )
        whole_number("VRPGE.compact", "buckets", buckets, 1)
        whole_number("VRPGE.compact", "programs", programs, 1)
        self.owner, self.backend = owner, backend
        self.skeleton: nn.Module = owner.skeleton
        self.groups = owner.groups
        self._starts = [0]
        for group in self.groups:
            self._starts.append(self._starts[-1] + group.size)
        self._run = _run_of(self.skeleton)
        self._places: dict[int, tuple[Dim, Spots]] = {}  # the dimension is kept for its id
        self._sources = list(self._find_sources())
        self._products = list(self._find_products())
        self._modules = [
            (owner.model.get_submodule(name), mine) for name, mine in self.skeleton.named_modules()
        ]
        self.whole = {group.name: group.reason for group in self.groups if group.reason}
        self.whole |= find_whole(self)
        full = tuple(len(group.unit) for group in self.groups)
        self.programs = Programs(full, buckets, programs, self._cost)
        self.sizes: Sizes = full
        self._compiled: dict[object, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the sub-net on inputs of the model.

        Raises:
            SparsifierError: after squash().
        """
        owner = self.owner
        owner._check_alive()
        live = self._live(owner.state.gates[0 if owner.model.training else 1])
        counts = torch.stack([one.sum() for one in live]).tolist()
        self.sizes = self._choose(counts)
        kept = [pad(one, size) for one, size in zip(live, self.sizes, strict=True)]
        small, written = self.gather(live, kept, lambda source: source.tensor)
        for module, mine in self._modules:
            mine.training = module.training
        out = self._run_program(small, args, kwargs)
        if owner.model.training:
            _write_back(small, written)
        return out

    def macs(self) -> Macs:
        """Return what the present sub-net takes, and what the last call computed."""
        gates = self.owner.state.gates[0 if self.owner.model.training else 1]
        counts = tuple(int(one.sum()) for one in self._live(gates))
        full = tuple(len(group.unit) for group in self.groups)
        return Macs(*(round(self._cost(sizes)) for sizes in (full, counts, self.sizes)))

    # --- gathering

    def gather(
        self, live: list[Tensor], kept: list[Tensor], values: Callable[[_Source], Tensor]
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
        for source in self._sources:
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

    def _live(self, gates: Tensor) -> list[Tensor]:
        return [
            gates[start : start + group.size][group.unit.to(gates.device)]
            for start, group in zip(self._starts, self.groups, strict=False)
        ]

    def _choose(self, counts: list[int]) -> Sizes:
        free = [group.name not in self.whole for group in self.groups]
        full = self.programs.full
        counts = [c if f else size for c, f, size in zip(counts, free, full, strict=True)]
        if self.backend is None:
            return self.programs.tight(counts)
        return self.programs.choose(counts, self._expected())

    def _expected(self) -> list[float]:
        s = self.owner.state.probability
        out = []
        for start, group in zip(self._starts, self.groups, strict=False):
            own = s[start : start + group.size][group.unit.to(s.device)]
            out.append(float(own.sum() + (own * (1 - own)).sum().sqrt()))
        return out

    def _run_program(self, small: Tensors, args: Any, kwargs: Any) -> Any:
        """Run eagerly, or what was compiled for these sizes."""
        if self.backend is None:
            return self._run(small, args, kwargs)
        if self.sizes in self._compiled:
            return self._compiled[self.sizes](small, args, kwargs)
        compiled = compat.compile_apart(_run_of(self.skeleton), self.backend)
        self._compiled[self.sizes] = compiled
        with warnings.catch_warnings():  # Dynamo asks gathered tensors, no leaves, for their .grad
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
            return compiled(small, args, kwargs)

    # --- what is cut where

    def _find_sources(self) -> Iterator[_Source]:
        known = self.owner.known
        assert known is not None
        made_of = {state.name: state.dims for state in known.states.values()}
        masked = dict(self._masked(made_of))
        buffers = {name for name, _ in self.skeleton.named_buffers()}
        for name in (*dict(self.skeleton.named_parameters()), *buffers):
            holder, key = _holder(self.owner.model, name)
            gate, cuts = masked.get(name, (-1, ())), []
            for number, dim in enumerate(made_of.get(name, ())):
                own = gate[1] if number == gate[0] else self._spots(dim)
                if own:
                    told = _told(self.skeleton, name, number)
                    cuts.append(_Cut(number, own, size_of(dim), number == gate[0], told))
            if name in buffers and len(cuts) > 1:
                for group, _, _ in (spot for cut in cuts for spot in cut.spots):
                    self.groups[group].reason = f"buffer {name!r} holds gated channels twice"
            yield _Source(name, holder, key, tuple(cuts), name in buffers)

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

    def _find_products(self) -> Iterator[tuple[int, list[_Cut], tuple[int, ...]]]:
        sources = {source.name: source for source in self._sources}
        for target in all_targets(self.owner.model):
            name = _plain_name(self.owner.model, target)
            if uses := self.owner.uses.get(target.name, 0):
                yield uses, list(sources[name].cuts), tuple(target.weight.shape)

    def _cost(self, sizes: Sizes) -> float:
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


# --- helpers


def _run_of(skeleton: nn.Module) -> Callable[..., Any]:
    def run(small: Tensors, args: Any, kwargs: Any) -> Any:
        return functional_call(skeleton, small, args, kwargs)

    return run


def _positions(cut: _Cut, live: list[Tensor], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return which coordinates are computed, int64 [kept], and whose gates are on, bool [kept]."""
    device = live[0].device
    stay, on = torch.ones(2, cut.size, dtype=torch.bool, device=device)
    for group, local, positions in cut.spots:
        stay[positions] &= kept[group][local]
        on[positions] &= live[group][local]
    index = stay.nonzero().flatten()
    return index, on[index]


def pad(live: Tensor, size: int) -> Tensor:
    """Return ``size`` channels: those that are on, and the first others."""
    order = (~live).to(torch.uint8).argsort(stable=True)
    return torch.zeros_like(live).index_fill(0, order[:size], True)


@torch.no_grad()
def _write_back(small: Tensors, written: Written) -> None:
    for name, full, number, index, on in written:
        part = small[name].index_select(number, on.nonzero().flatten())
        full.index_copy_(number, index[on], part)


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
