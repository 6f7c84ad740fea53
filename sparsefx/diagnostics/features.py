"""Tangent features of a network: what each active parameter does to each sample's output.

    J[i, j] = d f(x_i) / d w_j        for every weight w_j inside the masks

They are taken of a copy without masks' parametrizations, whose weights are zero outside the masks:
no straight-through or long-tailed estimator gets between a weight and its derivative.
"""

from __future__ import annotations

import copy
import fnmatch
import operator
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from sparsefx import compat
from sparsefx.diagnostics.running import call, parameters_of
from sparsefx.errors import DiagnosticsError
from sparsefx.sparsifiers.mask import Mask

CHUNK = 2**26  # bytes of gradients that are held before the active ones are picked out


@dataclass(frozen=True)
class Network:
    """A copy of a model in evaluation mode, its masks beside it.

    Args:
        model: the copy; weights are zero outside the masks.
        masks: :func:`plain` parameter name -> bool mask, of its shape.
        weights: the chosen parameters that require a gradient, by the copy's names, detached.
    """

    model: nn.Module
    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]

    @property
    def active(self) -> dict[str, int]:
        """How many entries of each chosen parameter are inside its mask."""
        masks = {name: self.masks.get(plain(name)) for name in self.weights}
        return {
            name: w.numel() if (mask := masks[name]) is None else int(mask.count_nonzero())
            for name, w in self.weights.items()
        }


def network(model: Any, masks: Mapping[str, Tensor] | None, chosen: Sequence[str]) -> Network:
    """Copy a model and put its masks, and those given, into its weights.

    Args:
        model: compiled or not.
        masks: by layer, as ``Sparsifier.masks()`` names them, or by parameter.
        chosen: globs on parameter names.

    Raises:
        DiagnosticsError: for a mask or a glob that fits no parameter.
    """
    model = getattr(model, "_orig_mod", model)
    parameters_of(model)
    copied = copy.deepcopy(model).eval()
    found = _take_off(copied)
    known = {plain(name): p for name, p in copied.named_parameters()}
    given = {_parameter(known, name): mask for name, mask in (masks or {}).items()}
    for name, mask in given.items():
        if name in found:
            raise DiagnosticsError(f"masks: {name!r} carries a mask already: leave it out")
        _apply(name, known[name], mask)
    weights = {
        name: p.detach()
        for name, p in copied.named_parameters()
        if p.requires_grad and any(fnmatch.fnmatchcase(plain(name), glob) for glob in chosen)
    }
    if not weights:
        raise DiagnosticsError(f"parameters={list(chosen)} match none of: {', '.join(known)}")
    copied.requires_grad_(False)  # only what is differentiated
    return Network(copied, found | given, weights)


def plain(name: str) -> str:
    """Return what a masked parameter is called without its mask."""
    return re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)


@torch.no_grad()
def _take_off(model: nn.Module) -> dict[str, Tensor]:
    """Let nothing stand where masks were, over masked weights; return the masks by parameter.

    (Copies share the class that torch makes for a parametrized module. Taking the parametrization
    off a copy would take it off that class, and so break the model.)
    """
    masks = {}
    for path, held in list(model.named_modules()):
        if isinstance(held, parametrize.ParametrizationList) and isinstance(held[0], Mask):
            name = plain(f"{path}.original")
            masks[name] = held[0](torch.ones_like(held.original)) != 0  # that of evaluation
            held.original.copy_(held[0](held.original))
            held[0] = nn.Identity()
    return masks


def _parameter(known: Collection[str], name: str) -> str:
    for candidate in (name, f"{name}.weight"):
        if candidate in known:
            return candidate
    raise DiagnosticsError(
        f"masks: {name!r} is no layer or parameter; there are: {', '.join(known)}"
    )


@torch.no_grad()
def _apply(name: str, weight: nn.Parameter, mask: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool or mask.shape != weight.shape:
        what = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise DiagnosticsError(
            f"masks: {name!r} is {what}; pass torch.bool {list(weight.shape)}, as the weight"
        )
    weight.copy_(torch.where(mask, weight, 0))


# --- outputs and their derivatives


def one_number(out: Tensor, output: int | str | None, samples: int, what: str) -> Tensor:
    """Pick one number a sample.

    Args:
        out: [samples] or [samples, ...].
        output: None where there is one number a sample; "sum"; or a column of [samples, columns].
        samples: how many there are.
        what: out is, for messages.

    Returns:
        [samples].

    Raises:
        DiagnosticsError: when there is no such number.
    """
    shape = list(out.shape)
    if not shape or shape[0] != samples:
        raise DiagnosticsError(f"{what} has shape {shape}, x has {samples} samples: pass one each")
    if out.numel() == samples:
        return out.reshape(samples)
    if output == "sum":
        return out.flatten(1).sum(1)
    if isinstance(output, int) and len(shape) == 2 and -shape[1] <= output < shape[1]:
        return out[:, output]
    raise DiagnosticsError(
        f"{what} has shape {shape}, several numbers a sample, and output={output!r}: pass "
        "output='sum' or the index of a column"
    )


def features(net: Network, x: Any, output: int | str | None, samples: int) -> tuple[Tensor, Tensor]:
    """Return outputs [samples] and tangent features [samples, active], in chunks of samples.

    Raises:
        DiagnosticsError: when outputs or derivatives aren't finite.
    """

    def single(weights: dict[str, Tensor], inputs: Any) -> Tensor:
        batch = compat.map_leaves(lambda t: t.unsqueeze(0), inputs)
        out = call(lambda *a, **k: torch.func.functional_call(net.model, weights, a, k), batch)
        return one_number(out, output, 1, "the output")[0]

    each = torch.func.vmap(torch.func.grad_and_value(single), in_dims=(None, 0))
    sizes = sum(w.numel() * w.element_size() for w in net.weights.values())
    chunk = max(1, CHUNK // max(1, sizes))
    rows, values = [], []
    for start in range(0, samples, chunk):
        part = compat.map_leaves(operator.itemgetter(slice(start, start + chunk)), x)
        with _plain_attention():
            grads, out = each(dict(net.weights), part)
        rows.append(torch.cat([_active(net, name, g) for name, g in grads.items()], 1))
        values.append(out)
    f, jacobian = torch.cat(values).double(), torch.cat(rows).double()
    for what, tensor in (("outputs", f), ("derivatives", jacobian)):
        if not bool(tensor.isfinite().all()):
            raise DiagnosticsError(f"the model's {what} hold NaN or infinity on x: nothing to rank")
    return f, jacobian


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Compute attention by operators that vmap knows; of the fused ones it warns."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _active(net: Network, name: str, grads: Tensor) -> Tensor:
    """[samples, *shape] -> [samples, active]."""
    flat, mask = grads.flatten(1), net.masks.get(plain(name))
    return flat if mask is None else flat[:, mask.flatten()]
