"""What can be masked: which parameters of a model, under which rule, or why not.

Nothing here changes the model: what is wrong is found before a first parameter is touched.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.config import NM, Dense, Masked, Rule
from sparsefx.errors import SparsifierError
from sparsefx.sparsifiers.mask import Mask, is_sharded
from sparsefx.sparsifiers.unstructured import MaskPattern, P

Rules = Sequence[Rule | str | type] | None

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Target:
    """One weight that may carry a mask.

    Args:
        name: qualified name of the module, followed by the tensor's where that isn't "weight".
        module: the module that owns the weight.
        tensor_name: what the module calls it.
        kind: "linear", "conv", "conv1d" (Hugging Face's, stored [in, out]), "attention", or
            "transposed conv", which is reported and never masked.
        module_types: types of the module and of those around it, innermost first.
    """

    name: str
    module: nn.Module
    tensor_name: str
    kind: str
    module_types: tuple[type, ...] = ()

    @property
    def groups(self) -> int:
        """Groups of a convolution, else 1."""
        return self.module.groups if isinstance(self.module, _CONVS) else 1

    @property
    def axis(self) -> int:
        """The dimension of the stored weight along which N:M groups run."""
        return 0 if self.kind == "conv1d" else 1

    @property
    def weight(self) -> Tensor:
        """The parameter itself, behind its mask where it carries one."""
        if self.mask is None:
            found = self.module._parameters[self.tensor_name]
            assert found is not None
            return found
        return self.module.parametrizations[self.tensor_name].original  # type: ignore[union-attr,index,no-any-return]

    @property
    def mask(self) -> Mask | None:
        """The mask that sits on the weight, if any."""
        return next((p for p in self.parametrizations if isinstance(p, Mask)), None)

    @property
    def parametrizations(self) -> list[nn.Module]:
        """All that ``torch.nn.utils.parametrize`` has put on the weight."""
        if not nn.utils.parametrize.is_parametrized(self.module, self.tensor_name):
            return []
        return list(self.module.parametrizations[self.tensor_name])  # type: ignore[index]

    def matrix(self, w: Tensor) -> Tensor:
        """View a tensor of the weight's shape as [out, in/groups, *taps]."""
        return w.t() if self.kind == "conv1d" else w

    def unmatrix(self, t: Tensor) -> Tensor:
        """View [out, in/groups, *taps] in the weight's own layout again."""
        return t.t() if self.kind == "conv1d" else t


def find_targets(
    model: nn.Module, rules: Rules, pattern: P, more: Iterable[Target] = ()
) -> tuple[list[tuple[Target, P]], dict[str, str]]:
    """Decide which weights are masked, and with which pattern. Changes nothing.

    Args:
        model: any module; the plain one, before torch.compile, DDP and fully_shard.
        rules: None gives every supported layer ``pattern``. Otherwise the first entry that matches
            a layer decides: a :class:`sparsefx.Rule` (glob on the qualified name, type of the
            layer or of a module around it, or a predicate, called with the :class:`Target`;
            its ``forward`` is an NM, or ``Masked()`` where the pattern has no groups, or
            ``Dense()``), or a glob or a type, for a rule that says ``pattern``. Layers that no
            entry matches are left alone.
        pattern: for all that a rule doesn't say otherwise.
        more: weights of kinds that only the caller masks.

    Returns:
        The targets with their patterns, in the model's order, ``more`` last; and layer -> reason
        for those that are left dense.

    Raises:
        SparsifierError: an entry that is none of these or matches nothing; a layer that already
            carries a mask, is on the meta device, sharded or holds a NaN; no layer is left.
    """
    entries = _entries(rules, pattern)
    found: list[tuple[Target, P]] = []
    skipped: dict[str, str] = {}
    used: set[int] = set()
    owners = owners_of(model)
    for target in (*all_targets(model), *more):
        matching = [i for i, rule in enumerate(entries) if matches(rule, target)]
        used.update(matching)
        wanted = _wanted(entries[matching[0]], pattern) if matching else None
        reason = "" if matching else "no rule matches"
        if matching and wanted is None:
            reason = "the rule says Dense()"
        if wanted is not None:
            reason = _unfit(target, wanted, owners)
        if reason or wanted is None:
            skipped[target.name] = reason
        else:
            found.append((target, wanted))
    _check_rules(entries, used, found, skipped)
    for target, _ in found:
        _check_values(target)
    return found, skipped


def all_targets(model: nn.Module) -> Iterator[Target]:
    """Every weight of a kind that is known, each once, in the model's order."""
    for path, module in model.named_modules():
        if (kind := _kind(module)) is None:
            continue
        names = _ATTENTION if kind == "attention" else ("weight",)
        for tensor_name in names:
            if kind == "attention" and getattr(module, tensor_name, None) is None:
                continue
            name = path if tensor_name == "weight" else f"{path}.{tensor_name}".lstrip(".")
            yield Target(name or tensor_name, module, tensor_name, kind, _types(model, path))


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _CONVS):
        return "conv"
    if isinstance(module, _TRANSPOSED):
        return "transposed conv"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    for cls in type(module).__mro__:  # not imported: transformers is optional
        if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
            return "conv1d"
    return None


def _types(model: nn.Module, path: str) -> tuple[type, ...]:
    parts = path.split(".") if path else []
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts), -1, -1)]
    return tuple(type(module) for module in around)


def _entries(rules: Any, pattern: MaskPattern) -> list[Rule]:
    if rules is None:
        return [_entry("*", pattern)]
    if isinstance(rules, str | type | Rule) or not isinstance(rules, Sequence):
        raise SparsifierError(f"rules={rules!r} must be None or a list of Rule, glob or type")
    return [_entry(entry, pattern) for entry in rules]


def _wanted(rule: Rule, pattern: P) -> P | None:
    """What a rule says, None for nothing; ``Masked()`` stands for a pattern without groups."""
    if isinstance(rule.forward, Dense):
        return None
    return rule.forward if isinstance(pattern, NM) else pattern  # type: ignore[return-value]


def _entry(entry: object, pattern: MaskPattern) -> Rule:
    if isinstance(entry, str | type):
        return Rule(entry, forward=pattern if isinstance(pattern, NM) else Masked())
    if not isinstance(entry, Rule):
        raise SparsifierError(f"rules holds {entry!r}; pass a Rule, a glob on names or a type")
    if not isinstance(pattern, NM):
        if not isinstance(entry.forward, Masked | Dense):
            raise SparsifierError(
                f"rule {entry.match!r} says {entry.forward}; this sparsifier has masks of its own: "
                "say Masked() or Dense()"
            )
        return entry
    if not isinstance(entry.forward, NM | Dense):
        raise SparsifierError(
            f"rule {entry.match!r} says {entry.forward}; a sparsifier takes an NM or Dense()"
        )
    if isinstance(entry.forward, NM) and (
        entry.forward.decay or entry.forward.weight_grad != "dense"
    ):
        raise SparsifierError(
            f"rule {entry.match!r} says {entry.forward!r}: give decay and weight_grad to the "
            "sparsifier; in its rules NM says n, m and transposable"
        )
    return entry


def matches(rule: Rule, target: Target) -> bool:
    """Whether a rule speaks about a layer."""
    if isinstance(rule.match, str):
        return fnmatch.fnmatchcase(target.name, rule.match)
    if isinstance(rule.match, type):
        return any(issubclass(found, rule.match) for found in target.module_types)
    return bool(rule.match(target))  # type: ignore[arg-type]  # a predicate on a Target here


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """Names under which different modules own each parameter: more than one where it is tied."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    return owners


def _unfit(target: Target, pattern: MaskPattern, owners: dict[int, list[str]]) -> str:
    """Why a weight stays dense, or ""; a mask of ours on it is an error."""
    if target.kind == "transposed conv":
        return "transposed convolution"
    if target.mask is not None:
        raise SparsifierError(
            f"a sparsifier is already on layer {target.name!r}: squash() it first"
        )
    if others := target.parametrizations:
        return f"its weight is already parametrized by {type(others[0]).__name__}"
    weight = target.module._parameters.get(target.tensor_name)
    if weight is None:
        return (
            f"{target.tensor_name} is no parameter: something else computes it "
            "(torch.nn.utils.prune, weight_norm, spectral_norm); remove that first"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise SparsifierError(
            f"layer {target.name!r} is lazy and has no weight yet: run one batch first"
        )
    if len(names := owners[id(weight)]) > 1:
        return f"one parameter for {' and '.join(names)} (tied weights)"
    if weight.dtype not in _FLOATS:
        return f"dtype {weight.dtype} is not a real floating-point type"
    if target.kind == "conv" and target.groups > 1 and weight.shape[1] == 1:
        return "depthwise convolution: one input channel per group"
    return indivisible(target, weight, pattern) if isinstance(pattern, NM) else ""


def indivisible(target: Target, weight: Tensor, pattern: NM) -> str:
    """Why the sizes of a weight, as it is stored, don't suit a pattern, or ""."""
    out, depth = target.matrix(weight).shape[:2]
    shape = f"weight {tuple(weight.shape)}"
    if depth % pattern.m:
        what = "input channels per group" if target.kind == "conv" else "in_features"
        return f"{shape}: {what}={depth} is not a multiple of m={pattern.m}"
    if pattern.transposable and (width := out // target.groups) % pattern.m:
        what = "output channels per group" if target.kind == "conv" else "out_features"
        return f"{shape}: {what}={width} is not a multiple of m={pattern.m} (transposable)"
    return ""


def _check_rules(
    entries: list[Rule],
    used: set[int],
    found: list[tuple[Target, P]],
    skipped: dict[str, str],
) -> None:
    for i, rule in enumerate(entries):
        if i not in used and (found or skipped):
            names = ", ".join([*(target.name for target, _ in found), *skipped])
            raise SparsifierError(f"rule {rule.match!r} matches no layer; there are: {names}")
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise SparsifierError(
            f"no layer is left to sparsify ({why or 'the model has no linear or conv layer'})"
        )


def _check_values(target: Target) -> None:
    weight = target.weight
    if weight.device.type == "meta":
        raise SparsifierError(
            f"layer {target.name!r} is on the meta device: materialise it first "
            "(model.to_empty(device=...), then load or initialise its weights)"
        )
    if is_sharded(weight):
        raise SparsifierError(
            f"layer {target.name!r} is sharded already: construct the sparsifier first, then call "
            "fully_shard, then attach()"
        )
    if bool(weight.detach().isnan().any()):
        raise SparsifierError(
            f"layer {target.name!r} holds NaN in its weight {tuple(weight.shape)}: repair or "
            "reload it before sparsifying"
        )
