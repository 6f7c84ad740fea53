"""What a stored mask looks like in a graph: read by recognize_masks and by rewrite_masked.

    where(mask, w, 0)    where(drop, 0, w)    w * mask

in front of a product, with views and casts between. ``w`` follows from parameters, buffers and
constants; ``mask`` is a buffer, a constant or an input of its shape, cast, viewed, compared with
zero or negated, or a bool that follows from such buffers and constants alone. A parameter is no
mask, nor is what follows from an activation, nor what is broadcast.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx import compat, naming
from sparsefx.rewriting import CASTS, INPUT, arguments, value

aten = torch.ops.aten

SAME = CASTS | {
    aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default,
}  # fmt: skip
VIEWS = SAME | {
    aten.permute.default, aten.t.default, aten.transpose.int, aten.view.default,
    aten.reshape.default, aten._unsafe_view.default, aten.slice.Tensor, aten.select.int,
    aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default, aten.split.Tensor,
    aten.split_with_sizes.default, aten.unbind.int, operator.getitem,
}  # fmt: skip
_PARTS = SAME | {aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default}
_NEGATIONS = {aten.bitwise_not.default, aten.logical_not.default}
_COMPARISONS: dict[object, bool] = {
    aten.ne.Scalar: False,
    aten.eq.Scalar: True,
}  # with 0: whether it negates
_CONSTANTS: dict[object, int] = {
    aten.full.default: 1,
    aten.scalar_tensor.default: 0,
    aten.full_like.default: 1,
}


@dataclass(frozen=True)
class Mask:
    """Where a mask comes from: ``source`` is a placeholder, a constant or a bool of these."""

    source: Node
    negated: bool = False


@dataclass(frozen=True)
class MaskForm:
    """A mask that is applied to a weight.

    Attributes:
        node: the ``where`` or the product that applies it.
        weight: what is masked.
        bits: True where the weight acts, or where it is dropped if ``drops``; None for a product,
            where what it leaves nonzero acts.
        drops: see ``bits``.
        mask: where it comes from.
    """

    node: Node
    weight: Node
    bits: Node | None
    drops: bool
    mask: Mask


class MaskFinder:
    """Finds masks in one graph, whose inputs it knows apart."""

    def __init__(self, gm: GraphModule) -> None:
        """Read which nodes depend on activations, and which on parameters."""
        self._gm = gm
        nodes = list(gm.graph.nodes)
        self._active = naming.depending(nodes, {"input"})
        learned = naming.depending(nodes, {"input", "parameter"})
        self._fixed = naming.depending(nodes, {"buffer"}) - learned

    def find(self, operand: Node) -> MaskForm | None:
        """Follow views and casts of a product's operand to where a mask is applied to a weight."""
        for node in chain(operand):
            if node.target is aten.where.self:
                return self._selected(node)
            if node.target is aten.mul.Tensor:
                return self._multiplied(node)
        return None

    def _selected(self, node: Node) -> MaskForm | None:
        bits, kept, other = arguments(node)
        drops = not self._is_zero(other)
        if drops and not self._is_zero(kept):
            return None
        weight = other if drops else kept
        mask = self._mask(bits)
        if mask is None or not self._fits(weight, bits):
            return None
        mask = Mask(mask.source, mask.negated != drops)
        return MaskForm(node, weight, bits, drops, mask)

    def _multiplied(self, node: Node) -> MaskForm | None:
        left, right = arguments(node)[:2]
        if not isinstance(right, Node):
            return None
        found = [
            MaskForm(node, weight, None, False, mask)
            for weight, bits in ((left, right), (right, left))
            if self._fits(weight, bits) and (mask := self._mask(bits)) and self._has_zeros(mask)
        ]
        certain = [form for form in found if _is_bool(form.mask.source)] or found
        return certain[0] if len(certain) == 1 else None

    def _fits(self, weight: Node, bits: Node) -> bool:
        if weight in self._active and self.find(weight) is None:  # its own mask may be an input
            return False
        shape = tuple(value(weight).shape)
        return shape == tuple(value(bits).shape) and len(shape) > 1

    def _mask(self, node: Node) -> Mask | None:
        negated = False
        while True:
            if node.op == "placeholder":
                known = node.meta.get(INPUT)
                return None if known is None or known.kind == "parameter" else Mask(node, negated)
            if node.op == "get_attr":
                return Mask(node, negated)
            compared = node.target in _COMPARISONS and arguments(node)[1] == 0
            if node.target in _NEGATIONS and _is_bool(node):
                negated = not negated
            elif compared:
                negated = negated != _COMPARISONS[node.target]
            elif node.target not in VIEWS:
                computed = _is_bool(node) and node in self._fixed
                return Mask(node, negated) if computed else None
            node = arguments(node)[0]

    def _has_zeros(self, mask: Mask) -> bool:
        """Whether a factor may be called a mask: bool, or not known to hold no zero."""
        known = self.described(mask.source)
        density = known.density if known is not None else None
        return _is_bool(mask.source) or density is None or density < 1

    def described(self, source: Node) -> naming.Input | None:
        """Say what is known of a placeholder or a constant, its zeros included."""
        if source.op != "get_attr":
            return source.meta.get(INPUT)
        constant = self._constant(source)
        if constant is None or constant.dim() < 2:
            return None
        with compat.on_values():
            return naming.Input(source.name, "buffer", *naming.zeros_of(constant))

    def _constant(self, node: Node) -> Tensor | None:
        found = getattr(self._gm, str(node.target), None)
        return found if type(found) in (Tensor, torch.nn.Parameter) else None

    def _is_zero(self, node: Node) -> bool:
        while node.target in VIEWS | {aten.expand.default}:
            node = arguments(node)[0]
        if node.op == "get_attr":
            constant = self._constant(node)
            with compat.on_values():
                return constant is not None and constant.numel() == 1 and not constant.any()
        place = _CONSTANTS.get(node.target)
        return place is not None and arguments(node)[place] == 0


def chain(operand: Node) -> Iterator[Node]:
    """Yield a node and what it is a view or a cast of, outermost first."""
    yield operand
    while operand.op == "call_function" and operand.target in VIEWS:
        operand = arguments(operand)[0]
        yield operand


def _is_bool(node: Node) -> bool:
    return value(node).dtype == torch.bool


def axis_of(node: Node, axis: int | None, *, bits: bool = False) -> tuple[Node, int | None]:
    """Follow an axis of a view to what it is a view of: (that, its axis or None if unknown).

    Args:
        node: the view.
        axis: of the view.
        bits: follow negations and comparisons with zero as well.
    """
    while node.op == "call_function":
        if node.target in VIEWS:
            axis = None if axis is None else _axis_before(node, axis)
        elif not bits or node.target not in _NEGATIONS | _COMPARISONS.keys():
            break
        node = arguments(node)[0]
    return node, axis


def _axis_before(view: Node, axis: int) -> int | None:
    target, args = view.target, arguments(view)
    if target in _PARTS or target is operator.getitem:
        return axis
    rank = value(args[0]).dim()
    if target is aten.t.default:
        return rank - 1 - axis
    if target is aten.permute.default:
        return int(args[1][axis]) % rank
    if target is aten.transpose.int:
        one, two = (int(d) % rank for d in args[1:3])
        return {one: two, two: one}.get(axis, axis)
    if target in (aten.select.int, aten.unbind.int):  # unbind(x) is along axis 0
        gone = int(args[1]) % rank if len(args) > 1 else 0
        return axis + (gone <= axis)
    before, after = value(args[0]).shape, value(view).shape  # an axis in front of what is regrouped
    return axis if tuple(before[: axis + 1]) == tuple(after[: axis + 1]) else None
