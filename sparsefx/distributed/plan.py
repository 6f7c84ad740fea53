"""Which slices of which parameters travel: what the compiled graphs say, agreed on by all ranks."""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx import compat
from sparsefx.capture import Compilation
from sparsefx.config import Sampled
from sparsefx.distributed.entries import Finder, Plan, Sliced, count_of, texts_of
from sparsefx.distributed.slices import Cut, Slices, slices_of
from sparsefx.report.graphs import TracedGraph

_NOT_SAMPLED = "its gradient follows no sampled forward"
_DEVICE_INDEX = re.compile(r", index=\d+")  # each rank has its own


@dataclass
class Planner:
    """Makes plans for one model, and reads each compiled graph once.

    Attributes:
        model: whose parameters are planned for.
        compiled: functions and modules that were compiled around it.
    """

    model: nn.Module
    compiled: Sequence[Any] = ()

    def seen(self) -> tuple[object, ...]:
        """Return what a plan is made from."""
        return tuple(part for r, _ in self._records() for part in (r, r.outcome, r.config))

    def is_current(self, plan: Plan) -> bool:
        """Whether nothing was compiled since a plan was made."""
        seen = self.seen()
        same = len(seen) == len(plan.seen) and all(map(operator.is_, seen, plan.seen))
        return same and plan.known == self._known()

    def _known(self) -> frozenset[int]:
        return frozenset(map(id, self.model.parameters()))

    def plan(self) -> Plan:
        """Read what was compiled since, and plan."""
        plan = Plan(known=self._known(), seen=self.seen())
        tensors = _tensors(self.model)
        prefixes = list(dict.fromkeys(plain_name(name) for name, _ in self.model.named_modules()))
        found: dict[int, list[_Found]] = {}
        for record, own in self._records():
            slices = _read_once(record)
            for start, known in _places(record, prefixes, tensors):
                for name, tensor in known.items():
                    if name in slices:
                        one = _Found(slices[name], record, known, start, own)
                        found.setdefault(id(tensor), []).append(one)
        for name, param in self.model.named_parameters():
            entry = _entry(plain_name(name), param, found.get(id(param), []))
            if isinstance(entry, str):
                plan.whole[plain_name(name)] = entry
            else:
                plan.sliced[id(param)] = entry
        return plan

    def _records(self) -> list[tuple[Compilation, bool]]:
        """Return graphs compiled for this model (True), or for another that is compiled alike."""
        holders = [*filter(compat.is_compiled, self.model.modules()), *self.compiled]
        wrappers = [found for holder in holders if (found := compat.wrapper_of(holder)) is not None]
        alike = [other for wrapper in wrappers for other in compat.wrappers_like(wrapper)]
        own = {id(record) for wrapper in wrappers for record in _shelf(wrapper)}
        records = {id(record): record for wrapper in alike for record in _shelf(wrapper)}
        return [(record, key in own) for key, record in records.items()]


def _shelf(wrapper: Any) -> Sequence[Compilation]:
    return getattr(wrapper, "_sparsefx", ())


# --- whose parameters a graph names


def plain_name(name: str) -> str:
    """Return a name without what compiling put into it."""
    return name.replace("_orig_mod.", "").removesuffix("_orig_mod")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    return {plain_name(name): tensor for name, tensor in named.items()}


def _places(
    record: Compilation, prefixes: Sequence[str], tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Find the modules that a graph may have been compiled for: all its names and shapes fit.

    Behind a graph break, names begin at an inner module, and one graph serves all its instances.
    """
    shapes = _shapes(record)
    for prefix in prefixes if shapes else ():
        start = f"{prefix.rstrip('.')}." if prefix else ""
        known = {name: tensors.get(start + name) for name in shapes}
        if all(t is not None and t.shape == shapes[name] for name, t in known.items()):
            yield start, {name: tensor for name, tensor in known.items() if tensor is not None}


def _shapes(record: Compilation) -> dict[str, torch.Size]:
    """Return the shapes of a graph's parameters and buffers."""
    placeholders = record.gm.graph.find_nodes(op="placeholder")
    pairs = zip(record.inputs, placeholders, strict=True)
    values = {k.name: n.meta.get("example_value") for k, n in pairs if k.kind != "input"}
    return {name: found.shape for name, found in values.items() if isinstance(found, Tensor)}


# --- one graph

_READ: dict[int, tuple[weakref.ref[Compilation], dict[str, Slices | str]]] = {}


def _read_once(record: Compilation) -> dict[str, Slices | str]:
    """Read a graph, for as many plans as it serves."""
    for key in [key for key, (known, _) in _READ.items() if known() is None]:
        del _READ[key]
    if id(record) not in _READ:
        _READ[id(record)] = weakref.ref(record), _read(record)
    return _READ[id(record)][1]


def _read(record: Compilation) -> dict[str, Slices | str]:
    """Trace a graph again, where a forward in it is sampled, and read its slices."""
    nothing: dict[str, Slices | str] = {
        known.name: _NOT_SAMPLED for known in record.inputs if known.kind == "parameter"
    }
    if not record.grad or record.inference:
        return {}
    if record.outcome is not None and not any(map(_samples, record.outcome.plans)):
        return nothing
    trace = TracedGraph(record).trace
    done = [graph for name, graph in trace.stages if name == "cleanup"]
    if not trace.joint:
        return {}
    return nothing | (slices_of(done[-1], trace.results) if done else {})


def _samples(plan: Any) -> bool:
    decision = plan.decision
    return decision is not None and isinstance(decision.pattern, Sampled) and decision.derived


# --- one parameter


@dataclass(frozen=True)
class _Found:
    """What one graph says of a parameter, and which tensors it calls by which name."""

    slices: Slices | str
    record: Compilation
    tensors: Mapping[str, Tensor]
    start: str
    own: bool


def _entry(name: str, param: Tensor, found: Sequence[_Found]) -> Sliced | str:
    """Merge what all graphs say of a parameter; a reason where slices are of no use."""
    if type(param) not in (Tensor, nn.Parameter):
        return f"it is a {type(param).__name__}"
    found = [one for one in found if one.own] or found
    reasons = [one.slices for one in found if isinstance(one.slices, str)]
    sliced = [one for one in found if not isinstance(one.slices, str)]
    places = {(one.slices.axis, one.slices.groups) for one in sliced}  # type: ignore[union-attr]
    if len(places) != 1:
        return "it is sampled along two axes" if places else (reasons or [_NEVER_COMPILED])[0]
    ((axis, groups),) = places
    depth = param.shape[axis]
    levels = _levels(sliced)
    useful = [level for level in levels if count_of(level) < depth]
    if not useful:
        return f"{count_of(levels[0])} of {depth} slices are all of it"
    expected = bool(reasons) or len(useful) < len(levels)
    return Sliced(name, axis, groups, depth, useful, expected)


_NEVER_COMPILED = "no compiled graph computes its gradient"


def _levels(found: Sequence[_Found]) -> list[list[Finder]]:
    """Finders of each graph, from few slices to many; at the end those of all graphs."""
    each = [_largest([_finder(cut, one) for cut in one.slices.cuts]) for one in found]  # type: ignore[union-attr]
    each.sort(key=lambda finders: (count_of(finders), texts_of(finders)))
    each.append(_largest([finder for finders in each for finder in finders]))
    return list({tuple(texts_of(finders)): finders for finders in each}.values())


def _finder(cut: Cut, found: _Found) -> Finder:
    # Inductor adds up norms in another order, so that two that are nearly equal may change places
    spare = 1 if found.record.config.codegen == "inductor" else 0
    inputs = tuple(found.tensors[name] for name in cut.names)
    names = [found.start + name for name in cut.names]
    return Finder(cut, inputs, cut.k + spare, _DEVICE_INDEX.sub("", f"{cut.code} of {names}"))


def _largest(finders: Sequence[Finder]) -> list[Finder]:
    """Of finders that differ in their count alone the largest: the k largest scores are nested."""
    by_text: dict[str, Finder] = {}
    for finder in sorted(finders, key=lambda finder: (finder.text, finder.count)):
        by_text[finder.text] = finder
    return list(by_text.values())
