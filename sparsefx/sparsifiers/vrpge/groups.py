"""Which parameters one gate covers: a filter and its bias, or all that write one channel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.permutation.axes import Axis, Dim, settle, size_of
from sparsefx.permutation.places import places
from sparsefx.permutation.propagate import Model, understand
from sparsefx.sparsifiers.mask import is_sharded
from sparsefx.sparsifiers.targets import Target
from sparsefx.sparsifiers.unstructured import Unstructured

Targets = list[tuple[Target, Unstructured]]
UNITS = ("filter", "hidden", "head", "block")


@dataclass(frozen=True, eq=False)
class Member:
    """A parameter, and the gate of each coordinate of one of its dimensions.

    Attributes:
        target: the parameter.
        dim: the dimension that gates act along.
        unit: int64 [its size], the number of the gate within the group.
    """

    target: Target
    dim: int
    unit: Tensor

    def spread(self, gates: Tensor) -> Tensor:
        """Return a group's gates, bool [units], in a shape that broadcasts over the parameter."""
        shape = [1] * self.target.weight.dim()
        shape[self.dim] = len(self.unit)
        return gates[self.unit.to(gates.device)].reshape(shape)


@dataclass(eq=False)
class Group:
    """Gates that number the channels of one axis.

    Attributes:
        name: of its first layer.
        size: how many gates.
        axis: the channels in the model's graph; None where they are known from the layer alone.
        unit: int64 [channels], the gate of each.
        members: the weights of layers.
        beside: vectors and other parameters that carry the same channels.
        reason: why the channels can't be left out of a step; "" where they can.
    """

    name: str
    size: int
    axis: Axis | None
    unit: Tensor
    members: list[Member] = field(default_factory=list)
    beside: list[Member] = field(default_factory=list)
    reason: str = ""


@dataclass
class Grouped:
    """What :func:`group_units` found.

    Attributes:
        groups: in the model's order.
        exempt: layer -> why it carries no gates.
        known: the model's graph, where inputs were given.
    """

    groups: list[Group]
    exempt: dict[str, str]
    known: Model | None


def group_units(
    model: nn.Module,
    targets: Targets,
    unit: str,
    block: int,
    keep_output: bool,
    inputs: tuple[Sequence[Any], Mapping[str, Any]] | None,
) -> Grouped:
    """Tie the units that can only go together; without inputs each layer is on its own.

    Args:
        model: the plain model; it is traced where inputs are given.
        targets: the layers that rules allow.
        unit: one of ``UNITS``.
        block: output channels of one gate, for ``unit="block"``.
        keep_output: leave out the layer that the model's output comes from.
        inputs: positional and keyword arguments of the model.
    """
    known = None
    if inputs is not None:
        known = understand(model, inputs[0], dict(inputs[1]), False, training=False)
    exempt = _exempt(targets, unit, keep_output, known)
    run = block if unit == "block" else 1
    found: dict[object, Group] = {}
    for target, _ in targets:
        if target.name not in exempt:
            _add(found, target, known, run)
    groups = list(found.values())
    for group in groups:
        if known is not None and group.axis is not None:
            group.beside += _others(model, known, group)
        else:
            group.beside += _biases(group)
    return Grouped(groups, exempt, known)


def _exempt(targets: Targets, unit: str, keep_output: bool, known: Model | None) -> dict[str, str]:
    exempt = {}
    writers: Counter[Dim] = Counter()  # a pinned axis has none that counts
    if known is not None:
        rows = [_rows(target, known) for target, _ in targets]
        writers.update(dim for dim in rows if isinstance(dim, Axis) and not dim.reason)
    for target, _ in targets:
        attention = target.kind == "attention"
        if attention != (unit == "head"):
            exempt[target.name] = f"it has no units of the kind {unit!r}"
        elif unit == "hidden" and target.kind == "conv":
            exempt[target.name] = "hidden units are those of linear layers"
        elif known is not None and keep_output and "output of the model" in _pinned(target, known):
            exempt[target.name] = "it writes the model's output (keep_output=True)"
        elif unit == "hidden" and known is not None and writers[_rows(target, known)] != 1:
            exempt[target.name] = "its outputs are not read by layers alone (unit='hidden')"
    if known is None and keep_output and targets and targets[-1][0].kind != "attention":
        exempt[targets[-1][0].name] = "it is the last layer (keep_output=True)"
    return exempt


def row_dim(target: Target) -> int:
    """Return the dimension of a stored weight that numbers its outputs."""
    return 1 if target.kind == "conv1d" else 0


def _rows(target: Target, known: Model) -> Dim:
    return settle(known.states[id(target.weight)].dims[row_dim(target)])


def _pinned(target: Target, known: Model) -> str:
    rows = _rows(target, known)
    return rows.reason if isinstance(rows, Axis) else ""


def _add(found: dict[object, Group], target: Target, known: Model | None, run: int) -> None:
    rows = target.weight.shape[row_dim(target)]
    if target.kind == "attention":
        width: int = target.module.embed_dim  # type: ignore[assignment]
        heads: int = target.module.num_heads  # type: ignore[assignment]
        unit = torch.arange(rows) % width // (width // heads)
        key, axis, reason = target.module, None, "its channels are counted in heads by its code"
    else:
        unit = torch.arange(rows) // run
        key, axis, reason = _axis(target, known)
    if key not in found:
        found[key] = Group(target.name, int(unit[-1]) + 1, axis, unit, reason=reason)
    found[key].members.append(Member(target, row_dim(target), unit))


def _axis(target: Target, known: Model | None) -> tuple[Any, Axis | None, str]:
    if known is None:
        return target, None, "args= was not given: who reads its channels is not known"
    rows = _rows(target, known)
    if not isinstance(rows, Axis):
        return target, None, "its channels are read in parts"
    return (target, None, rows.reason) if rows.reason else (rows, rows, "")


def _biases(group: Group) -> Iterator[Member]:
    done: set[int] = set()
    for member in group.members:
        module = member.target.module
        name = "in_proj_bias" if member.target.kind == "attention" else "bias"
        vector = module._parameters.get(name)
        if vector is not None and id(vector) not in done:
            done.add(id(vector))
            target = Target(f"{member.target.name}.{name}", module, name, "vector")
            unit = torch.arange(len(vector))
            if member.target.kind == "attention":
                width, heads = module.embed_dim, module.num_heads
                unit = unit % width // (width // heads)  # type: ignore[operator]
                yield Member(target, 0, unit)
            else:
                yield Member(target, 0, member.unit)


def _others(model: nn.Module, known: Model, group: Group) -> Iterator[Member]:
    """Every other parameter that carries the axis where nothing sums over it."""
    assert group.axis is not None
    mine = {id(member.target.weight) for member in group.members}
    sums = _summed(known)
    for state in known.states.values():
        if not isinstance(state.tensor, nn.Parameter) or not state.read or id(state.tensor) in mine:
            continue
        for dim, made_of in enumerate(state.dims):
            if (id(state.tensor), dim) in sums:
                continue
            unit = units_along(made_of, group)
            if unit is not None and not is_sharded(state.tensor):
                path, _, key = state.name.rpartition(".")
                yield Member(
                    Target(state.name, model.get_submodule(path), key, "vector"), dim, unit
                )


def _summed(known: Model) -> set[tuple[int, int]]:
    """Return (id of a weight, dimension) of whatever a product sums over."""
    return {(id(one.weight.tensor), one.dim) for one in known.layers if one.weight is not None}


def units_along(dim: Dim, group: Group) -> Tensor | None:
    """Return the gate of each coordinate of a dimension; None where it isn't all of the axis."""
    found = [place for place in places(dim) if place.axis is group.axis]
    covered = sum(len(place.positions) for place in found)
    if not found or covered != size_of(dim):
        return None
    unit = torch.empty(size_of(dim), dtype=torch.int64)
    for place in found:
        unit[place.positions] = group.unit[place.local]
    return unit


# --- what a unit costs


def costs_of(groups: Sequence[Group], budget: str, uses: Mapping[str, int]) -> Tensor:
    """Return what each gate counts towards the budget, float64 [n], 1 on average.

    Args:
        groups: of all gates.
        budget: "count" (1 each), "parameters" or "flops": of the unit's own rows, all inputs there.
        uses: layer -> how often its weight is used in a forward pass, for "flops".
    """
    parts = []
    for group in groups:
        cost = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            weight = member.target.weight
            row = weight.numel() / weight.shape[member.dim]
            often = uses[member.target.name] if budget == "flops" else 1
            cost += torch.bincount(member.unit, minlength=group.size) * (row * often)
        parts.append(torch.ones_like(cost) if budget == "count" else cost)
    costs = torch.cat(parts)
    return costs / costs.mean()


def count_uses(
    model: nn.Module, targets: Sequence[Target], inputs: tuple[Sequence[Any], Mapping[str, Any]]
) -> dict[str, int]:
    """Return layer -> multiply-accumulates per weight in one eval pass over the inputs."""
    uses = dict.fromkeys((target.name for target in targets), 0)
    flags = {module: module.training for module in model.modules()}
    handles = []
    for target in targets:

        def seen(module: nn.Module, args: Any, out: Any, target: Target = target) -> None:
            if target.kind == "attention":  # it never calls the module of its output projection
                if target.tensor_name in ("in_proj_weight", "q_proj_weight"):
                    path = target.name.removesuffix(target.tensor_name)
                    uses[f"{path}out_proj"] += out[0].numel() // module.embed_dim
                uses[target.name] += out[0].numel() // module.embed_dim
            else:
                uses[target.name] += out.numel() // target.weight.shape[row_dim(target)]

        handles.append(target.module.register_forward_hook(seen))
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs[0], **inputs[1])
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in flags.items():
            module.training = flag
    return uses
