"""The parameters and buffers of a model, and which of them must stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsefx.permutation.axes import Dim, new_dim, pin


@dataclass(eq=False)
class State:
    """A parameter or buffer.

    Attributes:
        name: the first of its qualified names.
        tensor: it.
        dims: its dimensions, the same in whichever graph reads it.
        read: whether a graph reads it.
    """

    name: str
    tensor: Tensor
    dims: list[Dim] = field(default_factory=list)
    read: bool = False


def states_of(model: nn.Module) -> dict[int, State]:
    """Return every parameter and buffer once, by id; what must not be permuted is pinned."""
    found: dict[int, State] = {}
    named = (*model.named_parameters(), *model.named_buffers())
    for name, tensor in named:
        state = State(name, tensor, [new_dim(int(size)) for size in tensor.shape])
        found.setdefault(id(tensor), state)
    for module_name, module in model.named_modules():
        for name, reason in _held_back(module):
            full = f"{module_name}.{name}".lstrip(".")
            _pin(found, model.get_buffer(full) if _is_buffer(module, name) else
                 model.get_parameter(full), f"{full!r} {reason}")  # fmt: skip
    _pin_overlaps(found)
    return found


def _is_buffer(module: nn.Module, name: str) -> bool:
    return name in dict(module.named_buffers(recurse=False))


def _pin(found: dict[int, State], tensor: Tensor, reason: str) -> None:
    for dim in found[id(tensor)].dims:
        pin(dim, reason)


def _held_back(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of a module's own tensors that must stay, each with the reason."""
    saved = module.state_dict(keep_vars=True)
    buffers = dict(module.named_buffers(recurse=False))
    for name in buffers:
        if name not in saved:
            yield name, "isn't saved with the model: a loaded one would not be permuted"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            yield name, f"is a {type(parameter).__name__}, not a plain parameter"
        elif 0 in parameter.stride() and parameter.numel() > 1:
            yield name, "repeats one value in memory (expand)"
        elif name.endswith("_orig") and f"{name.removesuffix('_orig')}_mask" in buffers:
            yield name, "is masked by torch.nn.utils.prune"
    if parametrize.is_parametrized(module):
        for name, _ in module.named_parameters():
            if name.startswith("parametrizations."):
                yield name, "is parametrized"


def _pin_overlaps(found: dict[int, State]) -> None:
    """Pin tensors that share memory: permuting one would change the other."""
    owners: dict[int, State] = {}
    for state in found.values():
        tensor = state.tensor
        if tensor.device.type == "meta" or not tensor.numel():
            continue
        address = tensor.untyped_storage().data_ptr()
        other = owners.setdefault(address, state)
        if other is not state:
            for one, two in ((state, other), (other, state)):
                for dim in one.dims:
                    pin(dim, f"{one.name!r} shares its memory with {two.name!r}")


def pin_unread_masks(model: nn.Module, found: dict[int, State]) -> None:
    """Pin parameters beside which a buffer of their shape lies that no graph reads.

    Such a buffer is a mask, a momentum or a scale that something else applies, and would no longer
    fit.
    """
    for name, module in model.named_modules():
        own = [found[id(p)] for p in module.parameters(recurse=False)]
        for label, buffer in module.named_buffers(recurse=False):
            state = found[id(buffer)]
            for parameter in own:
                if not state.read and buffer.dim() and buffer.shape == parameter.tensor.shape:
                    full = f"{name}.{label}".lstrip(".")
                    reason = f"buffer {full!r} has its shape and no graph reads it: a mask?"
                    for dim in parameter.dims:
                        pin(dim, reason)


def check_values(found: dict[int, State]) -> list[str]:
    """Return the names of tensors without values: on the meta device."""
    return [s.name for s in found.values() if s.tensor.device.type == "meta"]


def has_nan(tensor: Tensor) -> bool:
    """Whether a floating tensor holds NaN."""
    return tensor.is_floating_point() and bool(torch.isnan(tensor).any())
