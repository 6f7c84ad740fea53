"""Turn products of a masked weight into masked products, with the mask that the model stores.

    mm(x, permute(where(mask, w, 0)))       ->  masked_mm(x, permute(w), permute(mask))
    mm(x, permute(p)), p = w * mask         ->  masked_mm(x, permute(p), permute(p != 0))
    its grad_input, mm(g, where(...))       ->  masked_mm(g, w, mask)
    convolution, conv_grad_input            ->  masked_conv, masked_conv_grad_input

A product keeps its own result as the weight, and acts where that isn't zero: so a factor that is a
scale, or NaN under a zero, computes what it did.

Needs    recognize_masks and select_sites ran.
Keeps    values, shapes, dtypes, strides, provenance.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.config import Masked
from sparsefx.passes.mask_forms import SAME, MaskFinder, MaskForm
from sparsefx.plan import Plan
from sparsefx.rewriting import (
    PassResult,
    Skip,
    arguments,
    emit,
    flip,
    in_node_orientation,
    peel,
    plan_of,
    rewrite_nodes,
    value,
)

aten = torch.ops.aten
Pair = tuple[Node, Node]  # a weight and where it acts, alike in shape

GONE = "its weight is not read through the mask that its forward reads"


def rewrite_masked(gm: GraphModule) -> PassResult:
    """Run the pass."""
    finder, pairs = MaskFinder(gm), dict[Node, Pair]()
    rules: dict[object, Callable[..., Node | Skip | None]] = {
        aten.mm.default: _mm,
        aten.addmm.default: _mm,
        aten.convolution.default: _convolution,
        ops.conv_grad_input: _conv_grad_input,
    }
    bound = {target: partial(rule, _Masks(finder, pairs)) for target, rule in rules.items()}
    return rewrite_nodes(gm, bound)


class _Masks:
    """Takes masked operands apart, each view of a weight and its mask made once."""

    def __init__(self, finder: MaskFinder, pairs: dict[Node, Pair]) -> None:
        self._finder, self._pairs = finder, pairs

    def of(self, anchor: Node, operand: Node) -> Pair | None:
        root, flipped = peel(operand)
        form = self._finder.find(root)
        if form is None:
            return None
        w, bits = self._pair(root, form)
        return (flip(anchor, w), flip(anchor, bits)) if flipped else (w, bits)

    def _pair(self, node: Node, form: MaskForm) -> Pair:
        """Take apart ``node``, the masked weight or a view of it, right behind it."""
        if node not in self._pairs:
            self._pairs[node] = _taken_apart(node, form, self._pair)
        return self._pairs[node]


def _taken_apart(node: Node, form: MaskForm, inner: Callable[[Node, MaskForm], Pair]) -> Pair:
    place = node.next
    if form.bits is None:
        return node, emit(node, aten.ne.Scalar, node, 0, before=place)
    if node is form.node:
        bits = form.bits
        if form.drops:
            negated = bits.target in (aten.bitwise_not.default, aten.logical_not.default)
            undone = arguments(bits)[0] if negated else None
            if undone is None or value(undone).dtype != torch.bool:
                undone = emit(node, aten.logical_not.default, bits, before=place)
            bits = undone
        return form.weight, bits
    source, *rest = arguments(node)
    w, bits = inner(source, form)
    kept = bits
    if node.target not in SAME:
        kept = emit(node, node.target, bits, *rest, before=place, **node.kwargs)
    return emit(node, node.target, w, *rest, before=place, **node.kwargs), kept


def _planned(node: Node) -> Plan | None:
    plan = plan_of(node)
    if plan is None or plan.decision is None or not isinstance(plan.decision.pattern, Masked):
        return None
    return plan


def _mm(masks: _Masks, mm: Node) -> Node | Skip | None:
    plan = _planned(mm)
    if plan is None:
        return None
    bias, x, w = arguments(mm) if mm.target is aten.addmm.default else (None, *arguments(mm))
    if plan.flipped:  # the node is (x @ w).T, written w.T @ x.T
        x, w = w, x
    pair = masks.of(mm, w)
    if pair is None:
        return Skip(GONE)
    if plan.flipped:
        x, pair = flip(mm, x), (flip(mm, pair[0]), flip(mm, pair[1]))
    return in_node_orientation(mm, emit(mm, ops.masked_mm, x, *pair, bias), plan)


def _convolution(masks: _Masks, conv: Node) -> Node | Skip | None:
    if _planned(conv) is None:
        return None
    x, w, bias, stride, padding, dilation, _, _, groups = arguments(conv)
    pair = masks.of(conv, w)
    if pair is None:
        return Skip(GONE)
    return emit(conv, ops.masked_conv, x, *pair, bias, stride, padding, dilation, groups)


def _conv_grad_input(masks: _Masks, node: Node) -> Node | Skip | None:
    if _planned(node) is None:
        return None
    grad, w, *where = arguments(node)
    pair = masks.of(node, w)
    if pair is None:
        return Skip(GONE)
    return emit(node, ops.masked_conv_grad_input, grad, *pair, *where)
