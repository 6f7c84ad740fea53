"""The model that is exported: a copy in eval mode, with zeros where weights don't act."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsefx.errors import ExportError
from sparsefx.onnx import names
from sparsefx.onnx.zeros import Weight


def eval_copy(model: nn.Module) -> nn.Module:
    """Copy everything but the parameters, which nothing here writes to."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    shared: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for module, name in pruned(model):  # what pruning left from the last forward has a history
        shared[id(getattr(module, name))] = getattr(module, name).detach()
    try:
        return copy.deepcopy(model, shared).eval()
    except (RuntimeError, TypeError) as error:  # a tensor with a history, a lock, a file
        raise ExportError(
            f"the model can't be copied: {error} (remove_weight_norm bakes what it has put in a "
            "parameter's place)"
        ) from error


def pruned(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """What torch.nn.utils.prune masks before each forward: (module, name of the weight)."""
    return [
        (module, hook._tensor_name)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(hook, prune.BasePruningMethod)
    ]


def apply_pruning(copied: nn.Module) -> dict[str, str]:
    """Leave pruned parameters as plain ones with zeros; the user's own are not written to.

    Returns:
        By the old name of each parameter that has another one now, or will have once its
        parametrizations are baked in, that name.
    """
    paths = {id(module): f"{path}." if path else "" for path, module in copied.named_modules()}
    renamed = {
        f"{paths[id(module)]}{name}_orig": paths[id(module)] + name
        for module, name in pruned(copied)
    }
    for name, _ in copied.named_parameters():
        renamed.setdefault(name, names.baked_name(name))
    for module, name in pruned(copied):
        original = getattr(module, f"{name}_orig")
        setattr(module, f"{name}_orig", nn.Parameter(original.detach().clone()))
        prune.remove(module, name)  # type: ignore[no-untyped-call]
    return renamed


def mask(model: nn.Module, weights: Sequence[Weight]) -> None:
    """Put masked tensors in the place of those in ``weights``, wherever the copy holds them."""
    replaced: dict[int, Tensor] = {}
    for weight in weights:
        old = weight.tensor
        new: Tensor = torch.where(weight.kept(), old.detach(), 0.0)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        replaced[id(old)] = new
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, value in [*parameters, *buffers]:
            if id(value) in replaced:
                setattr(module, name, replaced[id(value)])
