"""Weights packed in place, and back: all layers that were chosen, or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsefx import compat, ops
from sparsefx.config import SparseConfig, as_config
from sparsefx.errors import PackError
from sparsefx.packing.choose import Choice, Chosen, choose, pruning_hook
from sparsefx.packing.layout import (
    Packing,
    dense_bytes,
    is_channels_last,
    packed_bytes,
    to_matrix,
    unpacked,
)
from sparsefx.packing.modules import (
    CODES,
    PATTERN,
    VALUES,
    Packed,
    is_product,
    packed_class,
)
from sparsefx.packing.report import PackedLayer, PackReport


class _Buffers(NamedTuple):
    values: Tensor
    codes: Tensor
    pattern: Tensor


@torch.no_grad()
def pack(
    model: nn.Module, config: SparseConfig | str | Mapping[str, Any] | None = None
) -> PackReport:
    """Replace weights by their packed N:M form, in place, for inference.

    ``weight`` goes; buffers ``weight_values``, ``weight_codes`` and ``weight_pattern`` come, so
    that memory and state_dict shrink to n/m plus 1 to 8 bits for each kept weight. Linear layers
    (and transformers' Conv1D) then run ``sparsefx.ops.nm_packed_mm``; convolutions, and layers
    whose class has a forward of its own, unpack their weight at each call. A packed layer has no
    gradient: it runs under ``torch.no_grad()`` or ``torch.inference_mode()``. The model takes state
    dicts of models packed alike, and can be copied, pickled and compiled.

    Args:
        model: the plain one, before torch.compile, DDP and ``fully_shard``. Masks of
            ``sparsefx.sparsifiers`` and of ``torch.nn.utils.prune`` are packed and taken off; a
            sparsifier is of no use afterwards.
        config: None packs every layer whose weight holds an N:M pattern already, and no value
            changes. Otherwise the config's rules say which: the first that matches the layer's name
            (or type; a predicate gets a :class:`sparsefx.sparsifiers.targets.Target`) and has an NM
            as its forward. Its mask is applied to a weight without a mask of its own: what lies
            outside is lost. ``Masked()`` takes the pattern that the weight holds. ``config=None``
            of the compiler, and ``keep_output_dense``, mean nothing here: only rules count.

    Returns:
        For each layer the pattern and bytes, or why it stays dense.

    Raises:
        PackError: no layer can be packed, or one is lazy, sharded or on the meta device; the
            model is as it was.
        ConfigError: for a bad config.
    """
    _check_model(model)
    rules = None if config is None else as_config(config).effective_rules()
    chosen = choose(model, rules)
    if not chosen.choices:
        why = "; ".join(f"{name}: {reason}" for name, reason in chosen.skipped.items())
        raise PackError(f"no layer can be packed ({why or 'there is no linear or conv layer'})")
    buffers = _buffers(chosen.choices)
    with _all_or_none([choice.target.module for choice in chosen.choices]):
        for choice in chosen.choices:
            _swap(choice, buffers[id(choice.parameter)])
    return _report(chosen)


@torch.no_grad()
def unpack(model: nn.Module) -> nn.Module:
    """Give packed layers their weight back, as a plain parameter: the reverse of :func:`pack`.

    Kept weights come back to the bit, the others as +0; ``requires_grad`` and memory format are
    those of before, and weights that were one parameter are one again. A sparsifier's mask does not
    come back.

    Args:
        model: changed in place; nothing happens to what isn't packed.

    Returns:
        The model.
    """
    layers = [module for module in model.modules() if isinstance(module, Packed)]
    shared: dict[tuple[str, ...], list[tuple[Packed, nn.Parameter]]] = {}
    weights = [_parameter(layer, shared) for layer in layers]
    with _all_or_none(cast(Sequence[nn.Module], layers)):
        for layer, weight in zip(layers, weights, strict=True):
            _restore(layer, weight)
    return model


def _check_model(model: object) -> None:
    if compat.is_compiled(model):
        raise PackError("model is compiled: pack the plain model, then compile it")
    if not isinstance(model, nn.Module):
        raise PackError(f"model is {type(model).__name__}; pass an nn.Module")


@contextmanager
def _all_or_none(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules back as they were when anything goes wrong."""
    parts = [part for module in modules for part in module.modules()]  # their masks, too
    before = [(type(part), _one_level(part)) for part in parts]
    try:
        yield
    except BaseException:
        for part, (cls, held) in zip(parts, before, strict=True):
            part.__class__ = cls
            vars(part).clear()
            vars(part).update(held)
        raise


def _one_level(module: nn.Module) -> dict[str, Any]:
    held = vars(module).items()
    return {key: copy.copy(entry) if isinstance(entry, dict) else entry for key, entry in held}


# --- there


def _buffers(choices: list[Choice]) -> dict[int, _Buffers]:
    """Pack each parameter once."""
    made: dict[int, _Buffers] = {}
    for choice in choices:
        if id(choice.parameter) in made:
            continue
        matrix = to_matrix(choice.weight, choice.target.kind)
        values, codes = ops.nm_pack(matrix, choice.n, choice.m)
        pattern = torch.tensor([choice.n, choice.m], dtype=torch.int16, device=values.device)
        made[id(choice.parameter)] = _Buffers(values, codes, pattern)
    return made


def _swap(choice: Choice, buffers: _Buffers) -> None:
    module = choice.target.module
    _take_weight_off(module)
    packing = Packing(
        layer=choice.target.name,
        n=choice.n,
        m=choice.m,
        kind=choice.target.kind,
        shape=tuple(choice.weight.shape),
        channels_last=is_channels_last(choice.parameter),
        requires_grad=choice.parameter.requires_grad,
        tied=choice.tied,
    )
    for name, buffer in zip((VALUES, CODES, PATTERN), buffers, strict=True):
        module.register_buffer(name, buffer)
    module.__class__ = packed_class(type(module))
    cast(Packed, module).packing = packing


def _take_weight_off(module: nn.Module) -> None:
    """Remove the parameter, and the mask on it; no tensor is written to."""
    if parametrize.is_parametrized(module, "weight"):
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    if (key := pruning_hook(module)) is not None:
        del module._forward_pre_hooks[key], module._buffers["weight_mask"]
        del module._parameters["weight_orig"], module.weight
        return
    del module._parameters["weight"]


def _report(chosen: Chosen) -> PackReport:
    by_name = {choice.target.name: choice for choice in chosen.choices}
    seen: set[int] = set()
    layers = []
    for name in chosen.order:
        if name in by_name:
            layers.append(_row(by_name[name], first=id(by_name[name].parameter) not in seen))
            seen.add(id(by_name[name].parameter))
        else:
            layers.append(PackedLayer(name, "", 0, 0, chosen.skipped[name]))
    return PackReport(tuple(layers))


def _row(choice: Choice, *, first: bool) -> PackedLayer:
    module = choice.target.module
    after = packed_bytes(choice.target.matrix(choice.weight), choice.n, choice.m)
    after += cast(Packed, module).weight_pattern.nbytes
    note = "" if is_product(cast(Packed, module).original) else "unpacked at each call"
    if not first:
        note = "shares that of a layer before it"
    pattern, before = f"{choice.n}:{choice.m}", dense_bytes(choice.parameter)
    return PackedLayer(choice.target.name, pattern, before, after if first else 0, note=note)


# --- and back


def _parameter(
    layer: Packed, shared: dict[tuple[str, ...], list[tuple[Packed, nn.Parameter]]]
) -> nn.Parameter:
    """The weight of a layer; of tied layers that still hold the same, one for all."""
    packing = layer.packing
    others = shared.setdefault(packing.tied, []) if packing.tied else []
    for other, weight in others:
        if torch.equal(other.weight_values, layer.weight_values) and torch.equal(
            other.weight_codes, layer.weight_codes
        ):
            return weight
    weight = nn.Parameter(
        unpacked(layer.weight_values, layer.weight_codes, packing), packing.requires_grad
    )
    others.append((layer, weight))
    return weight


def _restore(layer: Packed, weight: nn.Parameter) -> None:
    module = cast(nn.Module, layer)
    original = layer.original
    for name in (VALUES, CODES, PATTERN):
        del module._buffers[name]
    del module.packing
    module.__class__ = original
    rest = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update(weight=weight, **rest)
