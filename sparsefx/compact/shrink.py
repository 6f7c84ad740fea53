"""Make a smaller model of a copy: cut parameters, folded biases, and the numbers of its modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparsefx.compact.contractions import Contraction
from sparsefx.compact.dead import Layout, Search
from sparsefx.compact.heads import FewerHeads
from sparsefx.permutation.axes import Axis, Dim, factors, segments, settle, size_of
from sparsefx.permutation.propagate import Model
from sparsefx.permutation.state import State

_CONVS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCES = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy a model with its parametrizations and torch.nn.utils.prune masks applied for good."""
    computed = {  # prune leaves its product behind, which is no leaf and can't be copied
        id(held): held.detach().clone()
        for module in model.modules()
        for held in vars(module).values()
        if isinstance(held, Tensor) and not held.is_leaf
    }
    small = copy.deepcopy(model, computed)
    for module in list(small.modules()):
        if parametrize.is_parametrized(module):
            _unparametrize(module)
        hooks = list(module._forward_pre_hooks.values())
        for hook in hooks:
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    return small


def _unparametrize(module: nn.Module) -> None:
    """Keep the values; ``remove_parametrizations`` would change the original's class as well."""
    lists: Any = module.parametrizations
    lists.eval()
    with torch.no_grad():
        values = {name: getattr(module, name).detach().clone() for name in lists}
    originals = {name: list(lists[name].parameters(recurse=False)) for name in lists}
    kind = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = kind
    for name, value in values.items():
        if originals[name]:
            wants = any(original.requires_grad for original in originals[name])
            module.register_parameter(name, nn.Parameter(value, requires_grad=wants))
        else:
            module.register_buffer(name, value)


def holders(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Return (module, attribute) of every place of each parameter and buffer, by its first name."""
    first: dict[int, str] = {}
    found: dict[str, list[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for label, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{path}.{label}".lstrip("."))
                found.setdefault(name, []).append((path, label))
    return found


def bias_takes(model: nn.Module, one: Contraction, uses: int) -> bool:
    """Whether a layer's bias can take constants: an ordinary layer that is used once."""
    if one.weight is None or uses != 1:
        return False
    places = holders(model)
    path, _, label = one.weight.name.rpartition(".")
    module = model.get_submodule(path)
    ordinary = isinstance(module, (nn.Linear, *_CONVS)) or type(module).__name__ == "Conv1D"
    if not ordinary or label != "weight" or len(places[one.weight.name]) != 1:
        return False
    return module.bias is None or len(places.get(f"{path}.bias".lstrip("."), [])) == 1


@dataclass
class Shrinker:
    """Builds smaller models.

    Attributes:
        known: the dimensions of the parameters.
        search: where axes lie, and every sum.
        holders: of parameters and buffers.
    """

    known: Model
    search: Search
    holders: Mapping[str, Sequence[tuple[str, str]]]

    @property
    def layout(self) -> Layout:
        """Where axes lie."""
        return self.search.layout

    def build(self, model: nn.Module, removed: Mapping[Axis, Tensor], keep: bool) -> nn.Module:
        """Copy ``model`` without the removed channels.

        Args:
            model: has the same parameters as the one that was looked at, in any precision.
            removed: channels that go, by axis.
            keep: of numbers that stand for two sizes, one that shrank and one that didn't, keep
                the old value.

        Raises:
            CompactError: a module can't work without these channels.
        """
        small = copy.deepcopy(model)
        for one in self.search.found.sums:
            self._fold(small, one, removed)
        touched = [
            state for state in self.known.states.values() if self._cut(small, state, removed)
        ]
        self._renumber(small, touched, removed, keep)
        return small

    def cut_shape(self, state: State, removed: Mapping[Axis, Tensor]) -> tuple[int, ...]:
        """Return the new shape of a parameter or buffer."""
        return tuple(self.layout.size(dim, removed) for dim in state.dims)

    def _fold(self, small: nn.Module, one: Contraction, removed: Mapping[Axis, Tensor]) -> None:
        if one.constants is None or one.right is None or one.weight is None:
            return
        gone = self.layout.gone(one.along, removed).to(one.constants.device)
        constants = torch.where(gone, one.constants, torch.zeros_like(one.constants))
        if not bool(constants.any()):
            return
        module: Any = small.get_submodule(one.weight.name.rpartition(".")[0])
        added = (constants.double() @ one.right.double()).to(module.weight.dtype)
        with torch.no_grad():
            if module.bias is None:
                module.bias = nn.Parameter(added, requires_grad=module.weight.requires_grad)
                self._cut_new(module, one, removed)
            else:
                module.bias.add_(added)

    def _cut_new(self, module: Any, one: Contraction, removed: Mapping[Axis, Tensor]) -> None:
        stays = ~self.layout.gone(one.out, removed).to(module.bias.device)
        module.bias = nn.Parameter(module.bias[stays], requires_grad=module.bias.requires_grad)

    def _cut(self, small: nn.Module, state: State, removed: Mapping[Axis, Tensor]) -> bool:
        if not state.read or self.cut_shape(state, removed) == tuple(state.tensor.shape):
            return False
        places = self.holders[state.name]
        tensor = getattr(small.get_submodule(places[0][0]), places[0][1])
        new = tensor.detach()
        for number, dim in enumerate(state.dims):
            stays = (~self.layout.gone(dim, removed)).nonzero().flatten().to(new.device)
            if len(stays) != new.shape[number]:
                new = new.index_select(number, stays)
        if isinstance(tensor, nn.Parameter):
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        for path, label in places:
            setattr(small.get_submodule(path), label, new)
        return True

    # --- the numbers of modules

    def _renumber(
        self, small: nn.Module, touched: Sequence[State], removed: Mapping[Axis, Tensor], keep: bool
    ) -> None:
        changed: dict[str, list[State]] = {}
        for state in touched:
            for path, _ in self.holders[state.name]:
                changed.setdefault(path, []).append(state)
        near: dict[str, list[State]] = {}
        for path, states in changed.items():
            module: Any = small.get_submodule(path)
            if not self._known_kind(module, states, removed):
                near.setdefault(path, []).extend(states)
            if (above := _above(small, path)) is not None:
                near.setdefault(above, []).extend(states)
        for path, states in near.items():
            _set_numbers(small.get_submodule(path), self._sizes(states, removed), keep)

    def _known_kind(
        self, module: Any, states: Sequence[State], removed: Mapping[Axis, Tensor]
    ) -> bool:
        """Set the sizes of a module of torch (or Hugging Face's Conv1D)."""
        weight = getattr(module, "weight", None)
        shape = list(weight.shape) if isinstance(weight, Tensor) else []
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, _CONVS):
            group = next((self.search.found.groups[s] for s in states
                          if s in self.search.found.groups), None)  # fmt: skip
            module.groups = module.groups if group is None else self.layout.size(group, removed)
            first, second = shape[0], shape[1] * module.groups
            first, second = (second, first) if module.transposed else (first, second)
            module.out_channels, module.in_channels = first, second
        elif isinstance(module, (*_NORMS, *_INSTANCES)):
            module.num_features = self.cut_shape(states[0], removed)[0]
        elif isinstance(module, nn.GroupNorm):
            inner = module.num_channels // module.num_groups
            module.num_channels, module.num_groups = shape[0], shape[0] // inner
        elif isinstance(module, nn.Embedding):
            module.embedding_dim = shape[1]
        elif isinstance(module, nn.MultiheadAttention):
            FewerHeads.take_over(module)
        elif type(module).__name__ == "Conv1D":
            module.nx, module.nf = shape
        else:
            return isinstance(module, nn.LayerNorm | nn.PReLU)
        return True

    def _sizes(
        self, states: Sequence[State], removed: Mapping[Axis, Tensor]
    ) -> dict[int, set[int]]:
        """Return the new sizes for each old one, of dimensions and of what they are made of."""
        found: dict[int, set[int]] = {}
        for state in states:
            for dim in state.dims:
                for part in _parts(dim):
                    found.setdefault(size_of(part), set()).add(self.layout.size(part, removed))
        return found


def _parts(dim: Dim) -> Iterator[Dim]:
    """Yield a dimension, its branches and their factors."""
    dim = settle(dim)
    yield dim
    if isinstance(dim, Axis):
        return
    for part in segments(dim) if len(segments(dim)) > 1 else factors(dim):
        yield from _parts(part)


def _above(model: nn.Module, path: str) -> str | None:
    """Return the nearest module around ``path`` that has a forward of its own."""
    while path:
        path = path.rpartition(".")[0]
        kind = type(model.get_submodule(path))
        if kind not in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            return path
    return None


def _set_numbers(module: nn.Module, sizes: Mapping[int, set[int]], keep: bool) -> None:
    def new(old: Any) -> Any:
        if isinstance(old, list | tuple) and type(old) in (list, tuple):
            return type(old)(new(item) for item in old)
        if type(old) is not int or old not in sizes:
            return old
        others = sizes[old] - {old}
        return old if len(others) != 1 or (keep and old in sizes[old]) else others.pop()

    if isinstance(module, nn.MultiheadAttention):
        return
    for name, value in list(vars(module).items()):
        plain = not name.startswith("_") and isinstance(value, int | list | tuple)
        if plain and (now := new(value)) != value:
            setattr(module, name, now)
