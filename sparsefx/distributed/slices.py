"""Read from a joint graph which slices of a weight's gradient can hold anything but zeros.

    S = topk_mm_indices(x, w.t(), k, "right")                     a function of w alone
    grad_w = sampled_mm_grad_weight(xs, grad, S, K, True)         zero outside the columns S

The nodes behind S are cut out as a graph of their own, which finds S again from the parameters: the
operators, casts and groups are those of the forward, whatever they were.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from sparsefx import compat, ops
from sparsefx.naming import Input, op_name
from sparsefx.rewriting import INPUT, arguments, value

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A graph that finds indices again: ``graph(k, *inputs)``.

    Attributes:
        graph: returns S, [k] or [groups, k].
        names: of its inputs, parameters and buffers of the model that was compiled.
        k: how many indices the forward used in each group.
        code: of the graph.
    """

    graph: GraphModule
    names: tuple[str, ...]
    k: int
    code: str


@dataclass(frozen=True)
class Slices:
    """Where a gradient may be non-zero: slices along an axis, in each group of axis 0.

    Attributes:
        axis: of the parameter.
        groups: how many parts of axis 0 have indices of their own; 1 where the axis has one set.
        cuts: what finds the indices; the slices of all of them together.
    """

    axis: int
    groups: int
    cuts: tuple[Cut, ...]


class _DenseError(Exception):
    """Why no slices are known; never leaves this file."""


def slices_of(joint: GraphModule, results: int) -> dict[str, Slices | str]:
    """Return the slices of every parameter's gradient, by name; a reason where it has none.

    Args:
        joint: forward and backward in one graph, every sparse product one op, inputs named.
        results: how many of its outputs belong to the forward.
    """
    *_, output = joint.graph.nodes
    grads: Any = output.args[0]
    primals = [n for n in joint.graph.find_nodes(op="placeholder") if INPUT in n.meta]
    found: dict[str, Slices | str] = {}
    for order, grad in enumerate(grads[results:]):
        if not isinstance(grad, Node) or order >= len(primals):
            continue
        known: Input = primals[order].meta[INPUT]
        if known.kind == "parameter":
            try:
                found[known.name] = _follow(grad)
            except _DenseError as reason:
                found[known.name] = str(reason)
    return found


# --- from a gradient back to the product that made it


def _follow(node: Node) -> Slices:
    if node.target is ops.sampled_mm_grad_weight:
        _, _, indices, _, transposed, *rest = arguments(node)
        return _slices(1 if transposed else 0, 1, indices, rest)
    if node.target is ops.sampled_conv_grad_weight:
        indices, groups = arguments(node)[2], arguments(node)[7]
        return _slices(1, groups, indices, arguments(node)[8:])
    if node.target is ops.sampled_mm_grad_input:  # of w @ x, the left operand's gradient
        return _slices(1, 1, arguments(node)[2], arguments(node)[4:])
    rule = _THROUGH.get(node.target)
    if rule is None:
        raise _DenseError(f"its gradient comes from {op_name(node.target)}, not a sampled product")
    return rule(node)


def _slices(axis: int, groups: int, indices: Node, rest: Any) -> Slices:
    if any(rest):
        raise _DenseError("the mean of the other pairs reaches all of it (estimator='topk_mean')")
    return Slices(axis, groups, (_cut(indices),))


def _same(node: Node) -> Slices:
    """What works on each value alone, and leaves a zero a zero."""
    source = arguments(node)[0]
    if value(source).shape != value(node).shape:
        raise _DenseError(f"its gradient is reshaped by {op_name(node.target)}")
    return _follow(source)


def _permuted(node: Node) -> Slices:
    inner = _follow(arguments(node)[0])
    rank = value(node).dim()
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [d % rank for d in arguments(node)[1]]
    elif rank == 2:
        order = [1, 0]
    if inner.groups > 1 and order != sorted(order):
        raise _DenseError("the gradient of a grouped convolution is permuted")
    return Slices(order.index(inner.axis), inner.groups, inner.cuts)


def _sum(node: Node) -> Slices:
    """A weight that several products use: the slices of all of them."""
    left, right = (_follow(side) for side in arguments(node)[:2])
    if (left.axis, left.groups) != (right.axis, right.groups):
        raise _DenseError("it is sampled along two axes")
    return Slices(left.axis, left.groups, left.cuts + right.cuts)


def _kept_by_mask(node: Node) -> Slices:
    """where(mask, grad, 0), of a weight that the model masks."""
    _, kept, other = arguments(node)
    if other.target not in (aten.scalar_tensor.default, aten.full.default) or any(
        isinstance(arg, int | float) and arg for arg in other.args
    ):
        raise _DenseError("its gradient comes from where, not a sampled product")
    return _follow(kept)


_THROUGH: dict[object, Callable[[Node], Slices]] = {
    aten.permute.default: _permuted,
    aten.t.default: _permuted,
    aten.add.Tensor: _sum,
    aten.where.self: _kept_by_mask,
} | dict.fromkeys(
    [
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default,
        aten.detach.default, aten.clone.default, aten._to_copy.default, aten.neg.default,
        aten.mul.Scalar, aten.mul.Tensor, aten.div.Scalar, aten.div.Tensor,
        torch.ops.prims.convert_element_type.default,
    ],
    _same,
)  # fmt: skip


# --- from indices back to parameters

_SCORED = {"topk_mm_indices": 3, "mm_scores": 2, "topk_conv_indices": 5, "conv_scores": 4}
_COUNTED = {"topk_mm_indices": 2, "topk_conv_indices": 2, "topk_indices": 1, "mass_indices": 1}


def _cut(indices: Node) -> Cut:
    graph = Graph()
    cut = _Cutting(graph, graph.placeholder("k"))
    graph.output(cut.copy(indices))
    names = tuple(name for name, _ in cut.inputs.values())
    root = indices.graph.owning_module
    assert root is not None, "a graph that a pass returned has its module"
    module = GraphModule(root, graph)
    return Cut(module, names, int(value(indices).shape[-1]), module.code)


class _Cutting:
    """One cut in progress: what was copied, and which inputs it needs."""

    def __init__(self, graph: Graph, k: Node) -> None:
        self.graph, self.k = graph, k
        self.copies: dict[Node, Node] = {}
        self.inputs: dict[Node, tuple[str, Node]] = {}

    def copy(self, node: Node) -> Node:
        if node in self.copies:
            return self.copies[node]
        if node.op == "placeholder":
            made = self._input(node)
        elif node.op == "get_attr":
            made = self.graph.get_attr(str(node.target))
        else:
            made = self._call(node)
        self.copies[node] = made
        return made

    def _input(self, node: Node) -> Node:
        known = node.meta.get(INPUT)
        if known is None or known.kind == "input":
            raise _DenseError("its indices depend on activations: use scores='weight'")
        place = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.inputs[node] = known.name, place
        return place

    def _call(self, node: Node) -> Node:
        target, name = node.target, op_name(node.target)
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise _DenseError(f"its indices are drawn at random ({name}): use estimator='topk'")
        args = list(node.args)
        if name in _SCORED:
            args = self._without_the_other(node, args, args[_SCORED[name]])
        if name in _COUNTED:
            args[_COUNTED[name]] = self.k
        mapped = torch.fx.node.map_arg(tuple(args), self._copied)
        kwargs = torch.fx.node.map_arg(dict(node.kwargs), self._copied)
        assert callable(target), node.format_node()
        return self.graph.call_function(target, mapped, kwargs)

    def _copied(self, node: Node) -> Node:
        return node if node is self.k or node.graph is self.graph else self.copy(node)

    def _without_the_other(self, node: Node, args: list[Any], scores: Any) -> list[Any]:
        """Put zeros of one row in the place of operands that have no say in the scores."""
        ignored = {"right": (0,), "left": (1,), "uniform": (0, 1)}.get(scores, ())
        for place in ignored:
            args[place] = self._zeros(args[place], self._shape(node, args, place))
        return args

    def _shape(self, node: Node, args: list[Any], place: int) -> list[Any]:
        shape = list(value(args[place]).shape)
        kept = 1
        if "conv" not in op_name(node.target):
            kept = len(shape) - 1 - place
        elif place == 1:
            return shape
        return [size if d == kept else 1 for d, size in enumerate(shape)]

    def _zeros(self, like: Node, shape: list[Any]) -> Node:
        found: Tensor = value(like)
        shape = [compat.settled(size) for size in shape]
        if not all(isinstance(size, int) for size in shape):
            raise _DenseError("the number of its slices is not known when compiling")
        options: dict[str, Any] = {"dtype": found.dtype, "device": found.device}
        return self.graph.call_function(aten.full.default, (shape, 0), options)
