"""Turn planned products into column-row sampled ones (Adelman et al., NeurIPS 2021).

    mm(x, w) | addmm(b, x, w)    ->  S = topk_mm_indices(x, w, k); sampled_mm(x, w, S, b)
      its grad_input             ->  sampled_mm_grad_input(g, w, S)
      its grad_weight            ->  sampled_mm_grad_weight(gather_columns(x, S), g, S)
    bmm, convolution             ->  likewise, channels of a convolution
    a gradient of its own        ->  sampled_mm over its own reduction axis; a convolution's over
                                     output channels (grad_input), over examples (grad_weight)

Needs    select_sites ran.
Keeps    shapes, dtypes, strides, provenance.
Changes  values: pairs outside S act as zero. S is drawn once, in the forward, and saved.
"""

import math
import operator
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from sparsefx import ops
from sparsefx.config import Sampled
from sparsefx.plan import Plan
from sparsefx.policy import sampled_exact
from sparsefx.rewriting import (
    PassResult,
    Skip,
    arguments,
    emit,
    flip,
    in_node_orientation,
    plan_of,
    rewrite_nodes,
    size,
    value,
)

aten = torch.ops.aten
_INDICES = {
    ops.sampled_mm: 2, ops.sampled_bmm: 2, ops.sampled_conv: 2,
}  # fmt: skip


def rewrite_sampled(gm: GraphModule) -> PassResult:
    """Run the pass."""
    indices: dict[int, Node] = {}  # group -> what its forward sampled
    for node in gm.graph.nodes:
        if node.target in _INDICES and (plan := plan_of(node)) is not None:
            indices[plan.site.group] = node.args[_INDICES[node.target]]
    rules: dict[object, Callable[..., Node | Skip | None]] = {
        aten.mm.default: _mm,
        aten.addmm.default: _mm,
        aten.bmm.default: _bmm,
        aten.convolution.default: _convolution,
        ops.conv_grad_input: _conv_grad_input,
        ops.conv_grad_weight: _conv_grad_weight,
    }
    return rewrite_nodes(gm, {target: partial(rule, indices) for target, rule in rules.items()})


Indices = Mapping[int, Node]


def _planned(node: Node) -> tuple[Plan, Sampled] | Skip | None:
    plan = plan_of(node)
    if plan is None or plan.decision is None or not isinstance(plan.decision.pattern, Sampled):
        return None
    pattern = plan.decision.pattern
    if not plan.decision.derived and (reason := sampled_exact(plan.site, pattern)):
        return Skip(reason)
    return plan, pattern


def _draw(node: Node, op: object, *args: object) -> Node:
    indices = emit(node, op, *args)
    # recomputing a draw in the backward would sample anew: silently wrong gradients
    indices.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return indices


def _count(node: Node, depth: int | Node, pattern: Sampled) -> int | Node:
    """Pairs kept: min(K, max(min_k, int(ratio * K))), in the graph where K is symbolic."""
    if isinstance(depth, int):
        return pattern.k(depth)
    exact = emit(node, operator.mul, emit(node, torch.sym_float, depth), pattern.ratio)
    least = emit(node, torch.sym_max, emit(node, math.trunc, exact), pattern.min_k)
    return emit(node, torch.sym_min, least, depth)


def _side(plan: Plan, pattern: Sampled) -> str:
    """Which operand's norms score: the weight's, which a transposed product has on the left."""
    if pattern.scores == "product":
        return "product"
    left = plan.flipped != (plan.site.role == "forward" and plan.site.weight == "left")
    return "left" if left else "right"


def _mm(indices: dict[int, Node], mm: Node) -> Node | Skip | None:
    found = _planned(mm)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern = found
    if plan.decision is not None and plan.decision.derived:
        return _mm_gradient(indices[plan.site.group], mm, plan)
    bias, x, w = arguments(mm) if mm.target is aten.addmm.default else (None, *arguments(mm))
    k = _count(mm, size(mm, x, 1), pattern)
    drawn = _draw(mm, ops.topk_mm_indices, x, w, k, _side(plan, pattern))
    if plan.site.role == "forward":
        indices[plan.site.group] = drawn
    return emit(mm, ops.sampled_mm, x, w, drawn, bias)


def _mm_gradient(drawn: Node, mm: Node, plan: Plan) -> Node:
    left, right = arguments(mm)
    if plan.site.role == "grad_input":  # g @ w.T, or w @ g.T
        grad, w = (flip(mm, right), left) if plan.flipped else (left, flip(mm, right))
        out = emit(mm, ops.sampled_mm_grad_input, grad, w, drawn)
        return in_node_orientation(mm, out, plan)
    # x.T @ g, or g.T @ x
    x, grad = (right, flip(mm, left)) if plan.flipped else (flip(mm, left), right)
    saved = _save(drawn, ops.gather_columns, x)
    depth = size(mm, x, 1)
    return emit(mm, ops.sampled_mm_grad_weight, saved, grad, drawn, depth, plan.flipped)


def _save(drawn: Node, op: object, x: Node) -> Node:
    """Gather in the forward, right behind the draw, so that the partitioner saves M x k."""
    return emit(drawn, op, x, drawn, before=drawn.next)


def _bmm(indices: dict[int, Node], bmm: Node) -> Node | Skip | None:
    found = _planned(bmm)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern = found
    left, right = arguments(bmm)
    if plan.decision is None or not plan.decision.derived:
        k = _count(bmm, size(bmm, left, 2), pattern)
        drawn = _draw(bmm, ops.topk_mm_indices, left, right, k, _side(plan, pattern))
        if plan.site.role == "forward":
            indices[plan.site.group] = drawn
        return emit(bmm, ops.sampled_bmm, left, right, drawn)
    drawn = indices[plan.site.group]
    if plan.site.role == "grad_input":
        grad, w = (flip(bmm, right), left) if plan.flipped else (left, flip(bmm, right))
        return in_node_orientation(bmm, emit(bmm, ops.sampled_bmm_grad_input, grad, w, drawn), plan)
    x, grad = (right, flip(bmm, left)) if plan.flipped else (flip(bmm, left), right)
    saved = _save(drawn, ops.gather_columns, x)
    out = emit(bmm, ops.sampled_bmm_grad_weight, saved, grad, drawn, size(bmm, x, 2))
    return in_node_orientation(bmm, out, plan)


def _conv_side(pattern: Sampled) -> str:
    return "product" if pattern.scores == "product" else "right"


def _convolution(indices: dict[int, Node], conv: Node) -> Node | Skip | None:
    found = _planned(conv)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern = found
    x, w, bias, stride, padding, dilation, _, _, groups = arguments(conv)
    k = _count(conv, size(conv, w, 1), pattern)
    drawn = _draw(conv, ops.topk_conv_indices, x, w, k, "in", groups, _conv_side(pattern))
    indices[plan.site.group] = drawn
    return emit(conv, ops.sampled_conv, x, w, drawn, bias, stride, padding, dilation, groups)


def _conv_grad_input(indices: dict[int, Node], node: Node) -> Node | Skip | None:
    found = _planned(node)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern = found
    grad, w, sizes, stride, padding, dilation, groups = arguments(node)
    where = stride, padding, dilation, groups
    if plan.decision is not None and plan.decision.derived:
        drawn = indices[plan.site.group]
        return emit(node, ops.sampled_conv_grad_input, grad, w, drawn, sizes, *where)
    outputs = value(w).shape[0] // groups
    drawn = _draw(
        node, ops.topk_conv_indices, grad, w, _count(node, outputs, pattern), "out", groups,
        _conv_side(pattern),
    )  # fmt: skip
    return emit(node, ops.sampled_conv_input, grad, w, drawn, sizes, *where)


def _conv_grad_weight(indices: dict[int, Node], node: Node) -> Node | Skip | None:
    found = _planned(node)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern = found
    grad, x, sizes, *where = arguments(node)
    if plan.decision is not None and plan.decision.derived:
        drawn = indices[plan.site.group]
        saved = _save(drawn, ops.gather_channels, x)
        return emit(node, ops.sampled_conv_grad_weight, saved, grad, drawn, sizes, *where)
    k = _count(node, size(node, x, 0), pattern)
    drawn = _draw(node, ops.topk_conv_indices, x, grad, k, "batch", 1, _conv_side(pattern))
    return emit(node, ops.sampled_conv_weight, grad, x, drawn, sizes, *where)
