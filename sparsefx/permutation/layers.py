"""The products of a graph that N:M could mask: which weight, summed over which dimension."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sparsefx import naming
from sparsefx.permutation.axes import Dim, pin
from sparsefx.permutation.flow import Flow, argument, axis_of, shape_of
from sparsefx.permutation.state import State

aten = torch.ops.aten

_WEIGHT = {  # operator -> place of the right operand, and its dimension that is summed over
    aten.mm.default: (1, 0),
    aten.addmm.default: (2, 0),
    aten.bmm.default: (1, 1),
    aten.baddbmm.default: (2, 1),
    aten.convolution.default: (1, 1),
}
_SAME = {
    aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}  # fmt: skip
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}
_THROUGH = _SAME | {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.unsqueeze.default, aten.slice.Tensor, aten.select.int,
}  # fmt: skip


@dataclass(eq=False)
class Layer:
    """A product with a weight.

    Attributes:
        name: qualified name of the layer.
        weight: the parameter; None where it isn't read as it is.
        dim: the dimension of the parameter that is summed over.
        reason: why it isn't counted; "" where it is.
    """

    name: str
    weight: State | None
    dim: int = 0
    reason: str = ""

    @property
    def summed(self) -> Dim:
        """The dimension that is summed over."""
        assert self.weight is not None
        return self.weight.dims[self.dim]


def layers_of(
    flow: Flow, graph: GraphModule, sources: dict[Node, State], keep_output_dense: bool
) -> list[Layer]:
    """Return the products of an activation with a weight; a computed weight is pinned.

    Args:
        flow: after the graph was walked.
        graph: it.
        sources: which placeholder is which parameter.
        keep_output_dense: leave out the product that feeds the model's output.
    """
    nodes = list(graph.graph.nodes)
    active = _activations(nodes, sources)
    last = _last_products(nodes) if keep_output_dense else set()
    found = []
    for node in nodes:
        spot = _WEIGHT.get(node.target)
        if spot is None or node.op != "call_function":
            continue
        left: Any = node.args[spot[0] - 1]
        right: Any = node.args[spot[0]]
        if right in active or left not in active:
            continue
        found.append(_layer(flow, node, right, spot[1], sources, node in last))
    return found


def _layer(
    flow: Flow, node: Node, right: Node, dim: int, sources: dict[Node, State], is_last: bool
) -> Layer:
    origin = _origin(right, dim)
    name = naming.layer_of(node, naming.weight_of(right))
    if origin is None or origin[0] not in sources:
        reason = f"the weight of {name} is computed, not read as it is stored"
        for side in flow.dims(right):
            pin(side, reason)
        return Layer(name, None, 0, reason)
    state, axis = sources[origin[0]], origin[1]
    name = naming.layer_of(node, state.name)
    name = state.name if name == node.name else name  # a parameter of the model itself
    if is_last:
        reason = "it feeds the model's output (keep_output_dense=True)"
    elif node.target is aten.convolution.default and node.args[6]:
        reason = "it is a transposed convolution, which stays dense"
    else:
        reason = ""
    return Layer(name, state, axis, reason)


def _origin(node: Node, dim: int) -> tuple[Node, int] | None:
    """Follow a weight back to where it is stored, through what keeps ``dim`` a dimension."""
    while node.op == "call_function":
        source: Any = node.args[0]
        if node.target in _SAME or (node.target in _VIEWS and shape_of(source) == shape_of(node)):
            pass
        elif node.target is aten.permute.default:
            order: Any = node.args[1]
            dim = order[dim] % len(order)
        elif node.target in (aten.t.default, aten.transpose.int):
            dim = _before_transpose(node, dim)
        elif node.target is aten.slice.Tensor and axis_of(node, 1, "dim", _rank(node)) != dim:
            pass
        elif node.target is aten.select.int and _rank(source) > _rank(node):
            gone = axis_of(node, 1, "dim", _rank(source))
            dim += dim >= gone
        elif str(node.target) == "<built-in function getitem>" and _splits_other(source, dim):
            source = source.args[0]
        else:
            return None
        node = source
    return (node, dim) if node.op == "placeholder" else None


def _rank(node: Node) -> int:
    return len(shape_of(node))


def _before_transpose(node: Node, dim: int) -> int:
    rank = _rank(node)
    one, two = (axis_of(node, i, f"dim{i - 1}", rank, i - 1) for i in (1, 2))
    return {one: two, two: one}.get(dim, dim)


def _splits_other(node: Node, dim: int) -> bool:
    if node.target not in (aten.split.Tensor, aten.split_with_sizes.default):
        return False
    rank = len(shape_of(node.args[0]))
    return axis_of(node, 2, "dim", rank) != dim


def _activations(nodes: Iterable[Node], sources: dict[Node, State]) -> set[Node]:
    found: set[Node] = set()
    for node in nodes:
        given = node.op == "placeholder" and node not in sources
        if given or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _last_products(nodes: list[Node]) -> set[Node]:
    """Products that reach an output through views and casts alone and feed no other product."""
    feeds: set[Node] = set()
    for node in reversed(nodes):
        if any(user.target in _WEIGHT or user in feeds for user in node.users):
            feeds.add(node)
    last: set[Node] = set()
    for step in nodes[-1].all_input_nodes:
        while step.op == "call_function" and step.target in _THROUGH:
            step = argument(step, 0, "self")
        if step.target in _WEIGHT and step not in feeds:
            last.add(step)
    return last
