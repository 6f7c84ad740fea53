"""Which elements of which parameters the compiler would multiply by zero.

A product that is planned as N:M reads its weight through views and casts of a parameter. The same
views of the parameter's element numbers say where each element of the mask belongs, so transposed,
sliced and stacked weights need no case of their own.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparsefx import naming, ops, pipeline
from sparsefx.capture import Compilation, record_graphs, trace_again
from sparsefx.config import NM, Sampled, SparseConfig
from sparsefx.errors import ExportError
from sparsefx.onnx.sampled import Product
from sparsefx.onnx.views import View
from sparsefx.plan import Plan
from sparsefx.rewriting import CASTS, INPUT, arguments, peel, plan_of, value

aten = torch.ops.aten

_SELECTIONS = CASTS | {
    aten.alias.default, aten.as_strided.default, aten.clone.default,
    aten.detach.default, aten.expand.default, aten.permute.default, aten.reshape.default,
    aten.select.int, aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.t.default,
    aten.transpose.int, aten.unbind.int, aten.unsqueeze.default, aten.view.default,
    aten._unsafe_view.default, operator.getitem,
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """One reader of a parameter.

    Attributes:
        layer: qualified name of the layer.
        op: the operator that reads it.
        index: int64, numbers of the elements that it reads, in the layout that it reads them in.
        mask: bool, the shape of ``index``: which of these act; None where all do.
        pattern: which zeros these are; None where there are none.
        dim: axis of ``index`` along which the groups run.
    """

    layer: str
    op: str
    index: Tensor
    mask: Tensor | None = None
    pattern: NM | None = None
    dim: int = 0

    def __str__(self) -> str:
        """Name the layer, the operator and the pattern, as messages do."""
        kind = "dense" if self.pattern is None else str(self.pattern)
        return f"{self.layer or 'the model'} ({self.op}, {kind})"


@dataclass
class Weight:
    """A parameter (or buffer) and all that reads it."""

    name: str
    tensor: Tensor
    uses: list[Use] = field(default_factory=list)

    @property
    def masked(self) -> list[Use]:
        """The uses that want zeros."""
        return [use for use in self.uses if use.mask is not None]

    def kept(self) -> Tensor:
        """Return the mask of the stored parameter: bool, its shape.

        Raises:
            ExportError: when two uses disagree about an element.
        """
        kept = torch.ones(self.tensor.numel(), dtype=torch.bool, device=self.tensor.device)
        for use in self.masked:
            kept[use.index[~use.mask]] = False  # type: ignore[operator]  # masked uses have a mask
        for use in self.uses:
            wanted = torch.tensor(True) if use.mask is None else use.mask
            if not bool((kept[use.index] == wanted.to(kept.device)).all()):
                self._refuse(use)
        return kept.view(self.tensor.shape)

    def _refuse(self, use: Use) -> None:
        other = next(u for u in self.masked if u is not use and not _agree(u, use))
        raise ExportError(
            f"parameter {self.name!r} is read by {other} and by {use}: one stored tensor can't "
            "hold both; give the two layers one pattern, or put a rule with forward=Dense() for "
            f"{other.layer!r} first"
        )


def _agree(one: Use, two: Use) -> bool:
    """Whether two uses keep the same of the elements that both read."""
    size = 1 + max(int(use.index.max()) if use.index.numel() else 0 for use in (one, two))
    views = []
    for use in (one, two):
        view = torch.full((size,), -1, dtype=torch.int8, device=use.index.device)
        view[use.index] = 1 if use.mask is None else use.mask.to(torch.int8)
        views.append(view)
    both = (views[0] >= 0) & (views[1] >= 0)
    return bool((views[0] == views[1])[both].all())


@dataclass
class Zeros:
    """What the config makes of a model's inference graphs.

    Attributes:
        weights: the parameters that get zeros.
        depth: sum of the reduction lengths of all products: how often a result was rounded.
        stored_masks: whether the model applies masks of its own, which leave zeros as well.
        products: every forward product, in the order of the graphs, and how it is sampled.
    """

    weights: list[Weight] = field(default_factory=list)
    depth: int = 0
    stored_masks: bool = False
    products: list[Product] = field(default_factory=list)


def find_zeros(model: nn.Module, args: Sequence[object], config: SparseConfig) -> Zeros:
    """Trace the inference graphs of ``model`` and find every parameter that gets zeros.

    Args:
        model: in eval mode; runs once.
        args: its inputs.
        config: decides, exactly as when compiling.

    Raises:
        ExportError: when a product wants what stored zeros can't express.
        PassError: under ``strict=True``.
    """
    weights = {
        id(tensor): Weight(name, tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    given: dict[int, Weight] = {}  # by the Input that describes it

    def seen(record: Compilation, tensors: Sequence[object]) -> None:
        for known, tensor in zip(record.inputs, tensors, strict=True):
            if id(tensor) in weights:
                given[id(known)] = weights[id(tensor)]

    zeros, readings = Zeros(), dict[int, list[_Reading]]()
    with torch.no_grad():
        for record in record_graphs(model, config, args, {}, seen=seen):
            found: list[_Decided] = []
            trace_again(record, lambda graph, found=found: found.append(_decide(graph, config)))  # type: ignore[misc]
            for decided in found:
                zeros.depth += decided.depth
                zeros.stored_masks |= any(plan.site.mask for plan in decided.plans.values())
                for weight, reading in _readings(decided, given):
                    readings.setdefault(id(weight), []).append(reading)
                zeros.products += _products(decided, given)
    for weight in given.values():
        found_here = readings.pop(id(weight), [])
        if any(reading.pattern is not None for reading in found_here):
            weight.uses = [_use(reading, weight.tensor) for reading in found_here]
            zeros.weights.append(weight)
    return zeros


@dataclass
class _Decided:
    """A graph after select_sites, before any rewrite, and what each forward product becomes."""

    gm: GraphModule
    plans: dict[int, Plan]

    @property
    def depth(self) -> int:
        sizes = [plan.site.shape[2] for plan in self.plans.values()]
        return sum(size for size in sizes if isinstance(size, int))

    def plan(self, node: Node) -> Plan | None:
        known = plan_of(node)
        if known is None or known.site.role != "forward":
            return None
        return self.plans.get(known.site.group)


def _decide(graph: GraphModule, config: SparseConfig) -> _Decided:
    """Run the whole pipeline, so that a layer whose rewrite fails or declines is dense here too."""
    stages: dict[str, GraphModule] = {}
    outcome = pipeline.run(graph, config, lambda name, gm, _: stages.__setitem__(name, gm))
    plans = {p.site.group: p for p in outcome.plans if p.site.role == "forward"}
    return _Decided(stages.get("select_sites", graph), plans)


@dataclass(frozen=True)
class _Reading:
    """A use that is found but not evaluated: ``user`` reads ``node``, a view of ``source``."""

    source: Node
    node: Node
    user: Node
    plan: Plan | None

    @property
    def pattern(self) -> NM | None:
        """The zeros that it wants."""
        found = self.plan.decision.pattern if self.plan and self.plan.decision else None
        return found if isinstance(found, NM) and _weight_operand(self.user) is self.node else None


def _readings(decided: _Decided, given: Mapping[int, Weight]) -> Iterator[tuple[Weight, _Reading]]:
    sources = {
        node: given[id(node.meta.get(INPUT))]
        for node in decided.gm.graph.nodes
        if node.op == "placeholder" and id(node.meta.get(INPUT)) in given
    }
    for node in decided.gm.graph.nodes:
        if (plan := decided.plan(node)) is not None and plan.decision is not None:
            _refuse_other_than_zeros(node, plan, sources)
    for source, weight in sources.items():
        for node, user in _readers(source):
            yield weight, _Reading(source, node, user, decided.plan(user))


def _refuse_other_than_zeros(node: Node, plan: Plan, sources: Container[Node]) -> None:
    """Say no to what no stored zeros can express."""
    assert plan.decision is not None
    pattern, layer = plan.decision.pattern, plan.site.layer
    if isinstance(pattern, NM) and (reason := _not_stored(_weight_operand(node), sources)):
        raise ExportError(
            f"the weight of {layer!r} ({pattern}) {reason}, so there is no tensor to store zeros "
            "in; bake it into a parameter (parametrize.remove_parametrizations does) or put a "
            f"rule with forward=Dense() for {layer!r} first"
        )


def _products(decided: _Decided, given: Mapping[int, Weight]) -> Iterator[Product]:
    """Every forward product, with the parameter that its weight is made of."""
    for node in decided.gm.graph.nodes:
        if (plan := decided.plan(node)) is not None:
            pattern = plan.decision.pattern if plan.decision else None
            known = plan.site.weight in ("right", "both") and not plan.flipped
            source = _parameter_of(_weight_operand(node), given) if known else None
            yield Product(
                parameter=source.name if source is not None else "",
                layer=plan.site.layer,
                pattern=pattern if isinstance(pattern, Sampled) else None,
                weight_left=plan.site.weight == "left" or plan.flipped,
            )


def _parameter_of(operand: Node, given: Mapping[int, Weight]) -> Weight | None:
    """The parameter that an operand is a view of, or is computed from alone, as by a mask."""
    if operand.op == "call_function":
        found = [_parameter_of(source, given) for source in operand.all_input_nodes]
        return next((weight for weight in found if weight is not None), None)
    weight = given.get(id(operand.meta.get(INPUT)))
    return weight if weight is not None and isinstance(weight.tensor, nn.Parameter) else None


def _weight_operand(node: Node) -> Node:
    """The right operand of a product, or the weight of a convolution."""
    return arguments(node)[2 if node.target is aten.addmm.default else 1]  # type: ignore[no-any-return]


def _not_stored(operand: Node, sources: Container[Node]) -> str:
    """Why an operand isn't part of a stored tensor, or ""."""
    while operand.op == "call_function" and operand.target in _SELECTIONS:
        operand = arguments(operand)[0]
    if operand.op == "call_function":
        return f"is computed while the model runs (by {naming.op_name(operand.target)})"
    return "" if operand in sources else f"is no parameter of this model ({operand.name})"


def _readers(source: Node) -> Iterator[tuple[Node, Node]]:
    """Every (view of ``source``, the node that does something with it)."""
    for user in source.users:
        if user.op == "call_function" and user.target in _SELECTIONS:
            yield from _readers(user)
        else:
            yield source, user


def _use(reading: _Reading, tensor: Tensor) -> Use:
    node, user, plan, pattern = reading.node, reading.user, reading.plan, reading.pattern
    op = "output" if user.op == "output" else naming.op_name(user.target)
    view = View(reading.source, tensor)
    if pattern is None or plan is None:
        layer = plan.site.layer if plan is not None else naming.layer_of(user, None)
        return Use(layer, op, view.index(node))
    # as rewrite_nm does: groups along K, which a stored matrix holds where the views leave it
    stored, flipped = (node, False) if plan.site.kind == "conv" else peel(node)
    dim = 1 if plan.site.kind == "conv" else value(stored).dim() - 2 + flipped
    mask = ops.nm_mask(view.value(stored), pattern.n, pattern.m, dim, pattern.transposable)
    return Use(plan.site.layer, op, view.index(stored), mask, pattern, dim)
