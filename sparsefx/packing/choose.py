"""Which layers are packed, with which pattern and which values, or why not. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sparsefx import masks
from sparsefx.config import NM, Dense, Masked, Rule
from sparsefx.errors import PackError
from sparsefx.packing.layout import dense_bytes, packed_bytes
from sparsefx.packing.modules import Packed
from sparsefx.sparsifiers.mask import Mask, is_sharded
from sparsefx.sparsifiers.targets import Target, all_targets, indivisible, matches, owners_of

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_OUT_PROJ = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention


@dataclass(frozen=True, eq=False)
class Choice:
    """A layer that can be packed.

    Attributes:
        target: the layer.
        n: kept of a group.
        m: size of a group.
        parameter: what the layer's weight is made of.
        weight: what acts, in the stored layout, masked.
        tied: names of all owners of the parameter, where there are several.
    """

    target: Target
    n: int
    m: int
    parameter: nn.Parameter
    weight: Tensor
    tied: tuple[str, ...] = ()


@dataclass
class Chosen:
    """What is packed, and why the rest isn't; ``order`` has all names in the model's order."""

    choices: list[Choice] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


class _Left(Exception):
    """No error: a layer that stays dense, with the reason."""


def choose(model: nn.Module, rules: Sequence[Rule] | None) -> Chosen:
    """Decide about every layer.

    Args:
        model: any module.
        rules: first match wins; None takes the patterns that weights hold.

    Raises:
        PackError: a layer is lazy, on the meta device or sharded.
    """
    owners, found = owners_of(model), Chosen()
    for target in all_targets(model):
        found.order.append(target.name)
        try:
            choice = _choice(target, rules, owners)
        except _Left as reason:
            found.skipped[target.name] = str(reason)
        else:
            found.choices.append(choice)
    _leave_half_tied(found)
    return found


def _choice(target: Target, rules: Sequence[Rule] | None, owners: dict[int, list[str]]) -> Choice:
    wanted = _wanted(target, rules)
    _check_kind(target)
    parameter, mask = _parts(target)
    _check_parameter(target, parameter)
    names = tuple(owners[id(parameter)])
    tied = names if len(names) > 1 else ()
    if tied and mask is not None:
        raise _Left(_tied(tied))
    stored = parameter.detach()
    weight = stored if mask is None else torch.where(mask, stored, 0)
    n, m, weight = _pattern(target, wanted, weight, masked=mask is not None)
    before, after = dense_bytes(stored), packed_bytes(target.matrix(stored), n, m)
    if after >= before:
        raise _Left(f"{n}:{m} would take {after} bytes, dense takes {before}")
    return Choice(target, n, m, parameter, weight, tied)


def _wanted(target: Target, rules: Sequence[Rule] | None) -> NM | Masked:
    """What the rules say of a layer's forward."""
    if rules is None:
        return Masked()
    rule = next((rule for rule in rules if matches(rule, target)), None)
    if rule is None:
        raise _Left("no rule matches")
    if isinstance(rule.forward, Dense):
        raise _Left("the rule says Dense()")
    if not isinstance(rule.forward, NM | Masked):
        raise _Left(f"the rule says {rule.forward}; only N:M weights can be packed")
    return rule.forward


# --- what the weight is made of


def _check_kind(target: Target) -> None:
    module = target.module
    if isinstance(module, Packed):
        raise _Left(f"packed already ({module.packing})")
    if target.kind == "transposed conv":
        raise _Left("transposed convolution")
    if target.kind == "attention" or type(module) is _OUT_PROJ:
        raise _Left("nn.MultiheadAttention reads this weight itself")


def _parts(target: Target) -> tuple[nn.Parameter, Tensor | None]:
    """The parameter and the mask on it: a sparsifier's, or that of torch.nn.utils.prune."""
    module, found = target.module, target.parametrizations
    if found and (len(found) > 1 or not isinstance(found[0], Mask)):
        kinds = " and ".join(type(part).__name__ for part in found)
        raise _Left(f"its weight is parametrized by {kinds}: remove that first")
    if len(_parametrized(module)) > bool(found):
        raise _Left("another of its tensors is parametrized: remove that first")
    if found:
        return cast(nn.Parameter, target.weight), cast(Mask, found[0]).mask
    if pruning_hook(module) is not None:
        original, mask = module._parameters["weight_orig"], module._buffers["weight_mask"]
        assert original is not None
        assert mask is not None
        return original, mask != 0
    weight = module._parameters.get("weight")
    if weight is None:
        raise _Left("its weight is no parameter: something else computes it; remove that first")
    return weight, None


def _parametrized(module: nn.Module) -> list[str]:
    if not nn.utils.parametrize.is_parametrized(module):
        return []
    return list(cast(nn.ModuleDict, module.parametrizations))


def pruning_hook(module: nn.Module) -> int | None:
    """Return the key of the hook by which torch.nn.utils.prune masks the weight, if any."""
    for key, hook in module._forward_pre_hooks.items():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            return key
    return None


def _check_parameter(target: Target, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise PackError(f"layer {target.name!r} is lazy, without a weight yet: run one batch first")
    if parameter.device.type == "meta":
        raise PackError(f"layer {target.name!r} is on the meta device: load its weights first")
    if is_sharded(parameter):
        raise PackError(f"layer {target.name!r} is sharded: pack before fully_shard, or unshard")
    if parameter.dtype not in _FLOATS:
        raise _Left(f"dtype {parameter.dtype} is not a real floating-point type")
    if not parameter.numel():
        raise _Left(f"weight {tuple(parameter.shape)} is empty")


# --- the pattern


def _pattern(
    target: Target, wanted: NM | Masked, weight: Tensor, *, masked: bool
) -> tuple[int, int, Tensor]:
    """(n, m, the weight that acts). A mask that the model has acts, whatever the rule says."""
    matrix = target.matrix(weight)
    if isinstance(wanted, NM) and (reason := indivisible(target, weight, wanted)):
        raise _Left(reason)
    if isinstance(wanted, NM) and not masked:
        if wanted.transposable:
            mask = masks.transposable_mask(matrix, wanted.n, wanted.m)
        else:
            mask = masks.nm_mask(matrix, wanted.n, wanted.m, 1)
        return wanted.n, wanted.m, torch.where(target.unmatrix(mask), weight, 0)
    if isinstance(wanted, NM) and masks.is_valid(matrix, wanted.n, wanted.m, dim=1):
        return wanted.n, wanted.m, weight
    held = masks.find_pattern(matrix, dim=1)
    if held is not None:
        return held.n, held.m, weight
    if masked:
        raise _Left("the zeros of its mask follow no N:M pattern")
    raise _Left("its weight holds no N:M pattern")


# --- tied weights


def _tied(names: Sequence[str]) -> str:
    return f"one parameter for {' and '.join(names)} (tied weights)"


def _leave_half_tied(found: Chosen) -> None:
    """Keep a tied weight only where all who share it are packed alike."""
    groups: dict[int, list[Choice]] = {}
    for choice in found.choices:
        groups.setdefault(id(choice.parameter), []).append(choice)
    for group in groups.values():
        alike = {(c.n, c.m, c.target.kind, c.target.groups) for c in group}
        if group[0].tied and (len(group) < len(group[0].tied) or len(alike) > 1):
            for choice in group:
                found.choices.remove(choice)
                found.skipped[choice.target.name] = _tied(choice.tied)
