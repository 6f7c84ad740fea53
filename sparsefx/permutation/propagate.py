"""Walk the graphs of a model and find which dimensions move together, and which must not move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparsefx import compat
from sparsefx.capture import Compilation, joint_graph, record_graphs
from sparsefx.config import SparseConfig
from sparsefx.permutation.flow import Flow, entries, fresh, place
from sparsefx.permutation.layers import Layer, layers_of
from sparsefx.permutation.maths import MATHS, pointwise
from sparsefx.permutation.moves import MOVES
from sparsefx.permutation.state import State, pin_unread_masks, states_of
from sparsefx.rewriting import INPUT

_RULES = {**MOVES, **MATHS}
_HARMLESS = {torch.ops.aten._assert_scalar.default, torch.ops.aten._assert_tensor_metadata.default}


@dataclass
class Model:
    """What is known of a model's tensors.

    Attributes:
        flow: the dimensions.
        states: parameters and buffers, by id.
        layers: products with a weight.
    """

    flow: Flow
    states: dict[int, State]
    layers: list[Layer] = field(default_factory=list)


def understand(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    keep_output_dense: bool,
    training: bool = True,
) -> Model:
    """Trace ``model`` in eval and in training mode and walk both graphs; modes are put back.

    Training mode counts too: what only it reads must agree.
    """
    known = Model(Flow(), states_of(model))
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole encoder layer
        for mode in (False, True) if training else (False,):
            model.train(mode)
            known.flow.training = mode
            _walk_all(known, model, args, kwargs, keep_output_dense)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, was in modes.items():
            module.training = was
    known.layers = [*_once(known.layers), *_unread(known.states.values())]
    pin_unread_masks(model, known.states)
    known.flow.tensors += [state.dims for state in known.states.values() if state.read]
    return known


def _once(layers: Sequence[Layer]) -> list[Layer]:
    """Name every weight once, however often it is read; a use that counts comes first."""
    found: dict[tuple[object, int], Layer] = {}
    for layer in layers:
        key = (layer.name if layer.weight is None else id(layer.weight), layer.dim)
        known = found.setdefault(key, layer)
        if known.reason and not layer.reason:
            found[key] = layer
    return list(found.values())


def _unread(states: Iterable[State]) -> list[Layer]:
    """Weights that no graph reads: unused, or used behind a graph break where Dynamo gave up."""
    reason = "no graph of the model reads its weight: it is unused, or Dynamo didn't trace it"
    return [
        Layer(state.name.rpartition(".")[0], state, 0, reason)
        for state in states
        if isinstance(state.tensor, nn.Parameter) and state.tensor.dim() > 1 and not state.read
    ]


def _walk_all(
    known: Model, model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], keep: bool
) -> None:
    given: dict[int, State] = {}  # by the Input that describes it
    keep_alive: list[Any] = []

    def seen(record: Compilation, tensors: Sequence[object]) -> None:
        for described, tensor in zip(record.inputs, tensors, strict=True):
            if id(tensor) in known.states:
                given[id(described)] = known.states[id(tensor)]
        keep_alive.append(record)

    with torch.no_grad():
        for record in record_graphs(model, SparseConfig(), args, kwargs, dynamic=False, seen=seen):
            graph = joint_graph(record)
            sources = {
                node: given[id(node.meta.get(INPUT))]
                for node in graph.graph.nodes
                if node.op == "placeholder" and id(node.meta.get(INPUT)) in given
            }
            _walk(known.flow, graph, sources)
            known.layers += layers_of(known.flow, graph, sources, keep)


def _walk(flow: Flow, graph: GraphModule, sources: dict[Node, State]) -> None:
    for node in graph.graph.nodes:
        flow.of_node[node] = _visit(flow, node, sources)
        flow.tensors += [dims for dims in entries(flow.of_node[node]) if dims]


def _visit(flow: Flow, node: Node, sources: dict[Node, State]) -> list[Any]:
    if node.op == "placeholder":
        if node in sources:
            sources[node].read = True
            return sources[node].dims
        return fresh(node.meta.get("val"), "it comes from an input of the model")
    if node.op == "output":
        flow.pin_all(node.all_input_nodes, "it reaches an output of the model")
        return []
    if node.op != "call_function":
        return fresh(node.meta.get("val"), "it holds a constant of the model's code")
    return _apply(flow, node)


def _apply(flow: Flow, node: Node) -> list[Any]:
    target: Any = node.target
    if target in _HARMLESS:
        return []
    tags = target.tags if isinstance(target, compat.OpOverload) else ()
    rule = _RULES.get(target)
    if torch.Tag.nondeterministic_seeded in tags and rule is None:
        if flow.training and not node.all_input_nodes:  # noise, alike for every channel
            return fresh(node.meta["val"])
    elif rule is None and torch.Tag.pointwise in tags and isinstance(node.meta["val"], Tensor):
        rule = pointwise
    if rule is None or not all(_has_plain_sizes(n) for n in (node, *node.all_input_nodes)):
        reason = f"{place(node)} isn't known to treat its channels alike"
        flow.pin_all(node.all_input_nodes, reason)
        return fresh(node.meta.get("val"), reason)
    return rule(flow, node)


def _has_plain_sizes(node: Node) -> bool:
    value = node.meta.get("val")
    for tensor in value if isinstance(value, list | tuple) else [value]:
        if isinstance(tensor, Tensor):
            sizes = tensor.shape
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                return False
    return True
