"""Turn planned products into column-row sampled ones (Adelman et al., NeurIPS 2021).

    mm(x, w) | addmm(b, x, w)    ->  S = topk_mm_indices(x, w, k); sampled_mm(x, w, S, b)
      its grad_input             ->  sampled_mm_grad_input(g, w, S)
      its grad_weight            ->  sampled_mm_grad_weight(gather_columns(x, S), g, S)
    bmm, convolution             ->  likewise, channels of a convolution
    a gradient of its own        ->  sampled_mm over its own reduction axis; a convolution's over
                                     output channels (grad_input), over examples (grad_weight)
    a grad_weight that is chosen ->  S = topk_mm_indices(x.T, x, k); xs = gather_rows(x, S)
      by the input, or uniformly       in the forward; sampled_mm_weight(xs, g, S)

S is shown as top-k draws it; passes/drawing.py has the others.

Needs    select_sites ran.
Keeps    shapes, dtypes, strides, provenance.
Changes  values: pairs outside S act as zero, or are stood in for. S and its noise are drawn once,
         noise in the forward, and saved.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.config import Sampled
from sparsefx.passes.drawing import (
    Drawn,
    draw_channels,
    draw_columns,
    drawn_by,
    forward_of,
    hold,
)
from sparsefx.plan import Plan
from sparsefx.policy import sampled_exact
from sparsefx.rewriting import (
    PassResult,
    Skip,
    arguments,
    emit,
    flip,
    in_node_orientation,
    is_backward,
    peel,
    plan_of,
    rewrite_nodes,
    size,
)

aten = torch.ops.aten
Draws = dict[int, Drawn]  # group -> what its forward sampled


def rewrite_sampled(gm: GraphModule) -> PassResult:
    """Run the pass."""
    draws: Draws = {}
    for node in gm.graph.nodes:
        if (found := drawn_by(node)) is not None and (plan := plan_of(node)) is not None:
            draws[plan.site.group] = found
    rules: dict[object, Callable[..., Node | Skip | None]] = {
        aten.mm.default: _mm,
        aten.addmm.default: _mm,
        aten.bmm.default: _bmm,
        aten.convolution.default: _convolution,
        ops.conv_grad_input: _conv_grad_input,
        ops.conv_grad_weight: _conv_grad_weight,
    }
    return rewrite_nodes(gm, {target: partial(rule, draws) for target, rule in rules.items()})


def _planned(node: Node) -> tuple[Plan, Sampled, bool] | Skip | None:
    """The plan of a product that is sampled, its pattern, and whether its forward's S serves."""
    plan = plan_of(node)
    if plan is None or plan.decision is None or not isinstance(plan.decision.pattern, Sampled):
        return None
    pattern, derived = plan.decision.pattern, plan.decision.derived
    if not derived and (reason := sampled_exact(plan.site, pattern)):
        return Skip(reason)
    return plan, pattern, derived


# --- matrix products


def _mm(draws: Draws, mm: Node) -> Node | Skip | None:
    found = _planned(mm)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern, derived = found
    if derived:
        return _mm_gradient(draws[plan.site.group], mm, plan)
    bias, x, w = arguments(mm) if mm.target is aten.addmm.default else (None, *arguments(mm))
    if (rows := _rows_of_input(mm, x, plan, pattern)) is not None:
        xs, drawn = rows
        grad = flip(mm, x) if plan.flipped else w
        last = drawn.indices, plan.flipped, *drawn.tail()
        return emit(mm, ops.sampled_mm_weight, xs, grad, *last)
    drawn = draw_columns(mm, x, w, plan, pattern)
    if plan.site.role == "forward":
        draws[plan.site.group] = drawn
    return emit(mm, ops.sampled_mm, x, w, drawn.indices, bias, *drawn.pairs())


def _mm_gradient(drawn: Drawn, mm: Node, plan: Plan) -> Node:
    left, right = arguments(mm)
    if plan.site.role == "grad_input":  # g @ w.T, or w @ g.T
        grad, w = (flip(mm, right), left) if plan.flipped else (left, flip(mm, right))
        out = emit(mm, ops.sampled_mm_grad_input, grad, w, drawn.indices, *drawn.pairs())
        return in_node_orientation(mm, out, plan)
    x, grad = _input_and_grad(mm, left, right, plan)
    saved = _save(mm, drawn, ops.gather_columns, x, plan)
    last = size(mm, x, 1), plan.flipped, *drawn.tail()
    return emit(mm, ops.sampled_mm_grad_weight, saved, grad, drawn.indices, *last)


def _bmm(draws: Draws, bmm: Node) -> Node | Skip | None:
    found = _planned(bmm)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern, derived = found
    left, right = arguments(bmm)
    if derived:
        return _bmm_gradient(draws[plan.site.group], bmm, plan)
    if (rows := _rows_of_input(bmm, left, plan, pattern)) is not None:
        xs, drawn = rows
        grad = flip(bmm, left) if plan.flipped else right
        out = emit(bmm, ops.sampled_bmm_weight, xs, grad, drawn.indices, *drawn.tail())
        return in_node_orientation(bmm, out, plan)
    drawn = draw_columns(bmm, left, right, plan, pattern)
    if plan.site.role == "forward":
        draws[plan.site.group] = drawn
    return emit(bmm, ops.sampled_bmm, left, right, drawn.indices, *drawn.pairs())


def _bmm_gradient(drawn: Drawn, bmm: Node, plan: Plan) -> Node:
    left, right = arguments(bmm)
    if plan.site.role == "grad_input":
        grad, w = (flip(bmm, right), left) if plan.flipped else (left, flip(bmm, right))
        out = emit(bmm, ops.sampled_bmm_grad_input, grad, w, drawn.indices, *drawn.pairs())
        return in_node_orientation(bmm, out, plan)
    x, grad = _input_and_grad(bmm, left, right, plan)
    saved = _save(bmm, drawn, ops.gather_columns, x, plan)
    last = size(bmm, x, 2), *drawn.tail()
    out = emit(bmm, ops.sampled_bmm_grad_weight, saved, grad, drawn.indices, *last)
    return in_node_orientation(bmm, out, plan)


def _input_and_grad(node: Node, left: Node, right: Node, plan: Plan) -> tuple[Node, Node]:
    """(x, g) of x.T @ g, or of g.T @ x."""
    return (right, flip(node, left)) if plan.flipped else (flip(node, left), right)


def _save(node: Node, drawn: Drawn, op: object, x: Node, plan: Plan) -> Node:
    """Gather in the forward, right behind the draw, so that the partitioner saves M x k."""
    last = max(found for found in (drawn.indices, drawn.scale) if found is not None)
    like = forward_of(node, plan) or last
    return emit(like, op, x, drawn.indices, *drawn.pairs(), before=last.next)


# --- a grad_weight whose rows the input alone chooses: in the forward, which saves only these


def _rows_of_input(
    node: Node, left: Node, plan: Plan, pattern: Sampled
) -> tuple[Node, Drawn] | None:
    """Choose rows of x before the forward and gather them: (xs, what was drawn); None if late."""
    forward = _chosen_early(node, plan, pattern)
    if forward is None:
        return None
    x, turned = (node.args[1], True) if plan.flipped else peel(left)
    if not isinstance(x, Node) or is_backward(x) or not x < forward:
        return None
    rows = x if turned else flip(forward, x)
    # the gradient has no say: scores of the left operand alone
    drawn = draw_columns(forward, flip(forward, rows), rows, replace(plan, flipped=False), pattern)
    # whether to save these rows, or make them of what is kept anyway, is the partitioner's
    hold(forward, drawn.indices, drawn.scale)
    return emit(forward, ops.gather_rows, rows, drawn.indices, *drawn.pairs()), drawn


def _chosen_early(node: Node, plan: Plan, pattern: Sampled) -> Node | None:
    """The forward product, where a grad_weight's pairs can be chosen before it."""
    if plan.site.role != "grad_weight" or pattern.scores not in ("input", "uniform"):
        return None
    forward = forward_of(node, plan)
    return None if forward is None or is_backward(forward) else forward


# --- convolutions


def _convolution(draws: Draws, conv: Node) -> Node | Skip | None:
    found = _planned(conv)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern, _ = found
    x, w, bias, stride, padding, dilation, _, _, groups = arguments(conv)
    drawn = draws[plan.site.group] = draw_channels(conv, x, w, "in", groups, plan, pattern)
    where = stride, padding, dilation, groups
    return emit(conv, ops.sampled_conv, x, w, drawn.indices, bias, *where, *drawn.pairs())


def _conv_grad_input(draws: Draws, node: Node) -> Node | Skip | None:
    found = _planned(node)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern, derived = found
    grad, w, sizes, *where = arguments(node)
    if derived:
        drawn, op = draws[plan.site.group], ops.sampled_conv_grad_input
    else:
        drawn = draw_channels(node, grad, w, "out", where[-1], plan, pattern)
        op = ops.sampled_conv_input
    return emit(node, op, grad, w, drawn.indices, sizes, *where, *drawn.pairs())


def _conv_grad_weight(draws: Draws, node: Node) -> Node | Skip | None:
    found = _planned(node)
    if found is None or isinstance(found, Skip):
        return found
    plan, pattern, derived = found
    grad, x, sizes, *where = arguments(node)
    if derived:
        drawn = draws[plan.site.group]
        saved = _save(node, drawn, ops.gather_channels, x, plan)
        last = drawn.indices, sizes, *where, *drawn.tail()
        return emit(node, ops.sampled_conv_grad_weight, saved, grad, *last)
    forward = _chosen_early(node, plan, pattern)
    if forward is not None and not is_backward(x) and x < forward:
        drawn = draw_channels(forward, x, x, "batch", 1, plan, pattern)
        hold(forward, drawn.indices, drawn.scale)
        xs = emit(forward, ops.gather_examples, x, drawn.indices, *drawn.pairs())
        last = drawn.indices, sizes, *where, drawn.scale, drawn.rest, True
        return emit(node, ops.sampled_conv_weight, grad, xs, *last)
    drawn = draw_channels(node, x, grad, "batch", 1, plan, pattern)
    last = drawn.indices, sizes, *where, *drawn.pairs()
    return emit(node, ops.sampled_conv_weight, grad, x, *last)
