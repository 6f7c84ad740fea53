"""Turn planned products into N:M-masked ones.

    mm(x, w) | addmm(b, x, w)         ->  nm_mm(x, w, b, n, m, 0)       groups along K
    mm(g, w.T), its grad_input        ->  nm_mm(g, w.T, None, n, m, 1)  the same groups, along N
    bmm(x, w), weights in a batch     ->  nm_bmm(x, w, n, m, 1)           groups along K
    bmm(g, w.mT), its grad_input      ->  nm_bmm(g, w.mT, n, m, 2)
    convolution, conv_grad_input      ->  nm_conv, nm_conv_grad_input
    any of these, transposable        ->  masked_*(..., nm_mask(w, n, m, ...)): one mask for both
    a weight's gradient dw            ->  where(mask, dw, 0)                 weight_grad="masked"
                                          dw + decay * where(mask, 0, w)     decay (SR-STE)

Needs    select_sites ran.
Keeps    shapes, dtypes, strides, provenance.
Changes  values: weights outside the mask act as zero.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.config import NM, Dense
from sparsefx.plan import Plan
from sparsefx.policy import nm_illegal
from sparsefx.rewriting import (
    CASTS,
    PLAN,
    PassResult,
    Skip,
    arguments,
    emit,
    finish,
    flip,
    in_node_orientation,
    peel,
    plan_of,
    rewrite_nodes,
    value,
    wrap,
)

aten = torch.ops.aten


def rewrite_nm(gm: GraphModule) -> PassResult:
    """Run the pass."""
    wrapped = _wrap_weight_gradients(gm)
    result = rewrite_nodes(
        gm,
        {
            aten.mm.default: _mm,
            aten.addmm.default: _mm,
            aten.bmm.default: _bmm,
            aten.convolution.default: _convolution,
            ops.conv_grad_input: _conv_grad_input,
        },
    )
    if wrapped and not result.modified:
        finish(gm)
    result.modified = result.modified or wrapped
    return result


def _planned(node: Node) -> tuple[Plan, NM] | Skip | None:
    plan = plan_of(node)
    if plan is None or plan.decision is None or not isinstance(plan.decision.pattern, NM):
        return None
    if not plan.decision.derived and (reason := nm_illegal(plan.site, plan.decision.pattern)):
        return Skip(reason)
    return plan, plan.decision.pattern


def _mm(mm: Node) -> Node | Skip | None:
    found = _planned(mm)
    if found is None or isinstance(found, Skip):
        return found
    plan, nm = found
    bias, x, w = arguments(mm) if mm.target is aten.addmm.default else (None, *arguments(mm))
    if plan.flipped:  # the node is (x @ w).T, written w.T @ x.T
        x, w = flip(mm, w), flip(mm, x)
    # a derived grad_input has the forward's groups, which run along its own N
    dim = 1 if plan.decision is not None and plan.decision.derived else 0
    if nm.transposable:
        out = emit(mm, ops.masked_mm, x, w, _mask(mm, w, nm, dim), bias)
    else:
        out = emit(mm, ops.nm_mm, x, w, bias, nm.n, nm.m, dim, False)
    return in_node_orientation(mm, out, plan)


def _bmm(bmm: Node) -> Node | Skip | None:
    found = _planned(bmm)
    if found is None or isinstance(found, Skip):
        return found
    plan, nm = found
    x, w = arguments(bmm)
    if plan.flipped:
        x, w = flip(bmm, w), flip(bmm, x)
    dim = 2 if plan.decision is not None and plan.decision.derived else 1
    out = emit(bmm, ops.nm_bmm, x, w, nm.n, nm.m, dim, False)
    return in_node_orientation(bmm, out, plan)


def _mask(anchor: Node, w: Node, nm: NM, dim: int) -> Node:
    """The mask of a matrix, made on the weight as it is stored, so that every use finds it."""
    root, flipped = peel(w)
    along = 1 - dim if flipped else dim
    mask = emit(anchor, ops.nm_mask, root, nm.n, nm.m, along, nm.transposable)
    return flip(anchor, mask) if flipped else mask


def _convolution(conv: Node) -> Node | Skip | None:
    found = _planned(conv)
    if found is None or isinstance(found, Skip):
        return found
    _, nm = found
    x, w, bias, stride, padding, dilation, _, _, groups = arguments(conv)
    where = stride, padding, dilation, groups
    if nm.transposable:
        mask = emit(conv, ops.nm_mask, w, nm.n, nm.m, 1, True)
        return emit(conv, ops.masked_conv, x, w, mask, bias, *where)
    return emit(conv, ops.nm_conv, x, w, bias, *where, nm.n, nm.m, 1, False)


def _conv_grad_input(node: Node) -> Node | Skip | None:
    found = _planned(node)
    if found is None or isinstance(found, Skip):
        return found
    plan, nm = found
    grad, w, *where = arguments(node)
    assert plan.decision is not None
    if nm.transposable:
        mask = emit(node, ops.nm_mask, w, nm.n, nm.m, 1, True)
        return emit(node, ops.masked_conv_grad_input, grad, w, mask, *where)
    dim = 1 if plan.decision.derived else 0
    return emit(node, ops.nm_conv_grad_input, grad, w, *where, nm.n, nm.m, dim, False)


# --- the weight's gradient


def _wrap_weight_gradients(gm: GraphModule) -> bool:
    """Mask and decay where the gradient is whole: after its last cast and transpose."""
    decayed: set[Node] = set()
    modified = False
    forwards = {
        plan.site.group: node
        for node in gm.graph.nodes
        if (plan := plan_of(node)) is not None and plan.site.role == "forward"
    }
    for node in list(gm.graph.nodes):
        plan = plan_of(node)
        if plan is None or plan.site.role != "grad_weight" or plan.decision is None:
            continue
        nm = plan.decision.forward
        if not isinstance(nm, NM) or not (nm.decay or nm.weight_grad == "masked"):
            continue
        modified = _wrap(node, plan, nm, forwards[plan.site.group], decayed) or modified
        node.meta[PLAN] = replace(plan, decision=replace(plan.decision, forward=Dense()))
    return modified


def _wrap(node: Node, plan: Plan, nm: NM, forward: Node, decayed: set[Node]) -> bool:
    conv = plan.site.kind == "conv"
    w = arguments(forward)[2 if forward.target is aten.addmm.default else 1]
    assert isinstance(w, Node)
    operand, flipped = (w, False) if conv else peel(w)
    dim = 1 if conv else value(operand).dim() - 2 + flipped  # of the stored weight
    param, last, turned = operand, node, plan.flipped
    while param.target in CASTS or _views_nothing(param):
        param = arguments(param)[0]
    while (following := _only_view_or_cast(last)) is not None:
        last, turned = following, turned != (following.target is aten.permute.default)
    if value(last).dtype != value(param).dtype:
        param = operand  # the gradient leaves the graph in the product's own dtype
    first_use = param not in decayed
    decayed.add(param)
    if nm.weight_grad != "masked" and not first_use:
        return False  # SR-STE decays a weight once, however often it is used
    upright = turned == flipped or conv  # last has the layout of the stored weight
    wrap(last, partial(_epilogue, last, param, operand, nm, dim, upright, first_use))
    return True


def _only_view_or_cast(node: Node) -> Node | None:
    """The one user of a gradient, if it only transposes or casts it."""
    users = list(node.users)
    if len(users) != 1:
        return None
    if _views_nothing(users[0]):
        return users[0]
    if users[0].target not in CASTS | {aten.permute.default}:
        return None
    if users[0].target is aten.permute.default and peel(users[0])[0] is users[0]:
        return None  # some other permutation
    return users[0]


def _views_nothing(node: Node) -> bool:
    """Whether a view has the shape of what it views, as matmul leaves them around a bmm."""
    if node.target not in (aten.view.default, aten.expand.default):
        return False
    return tuple(value(node).shape) == tuple(value(arguments(node)[0]).shape)


def _epilogue(
    grad: Node,
    param: Node,
    operand: Node,
    nm: NM,
    dim: int,
    upright: bool,
    decays: bool,
    add: Callable[..., Node],
) -> Node:
    mask = add(ops.nm_mask, operand, nm.n, nm.m, dim, nm.transposable)
    rank = value(grad).dim()
    turn = [*range(rank - 2), rank - 1, rank - 2]
    mask = mask if upright else add(aten.permute.default, mask, turn)
    stored = param if upright else add(aten.permute.default, param, turn)
    zero = add(aten.full.default, [], 0.0, dtype=value(grad).dtype, device=value(grad).device)
    out = grad
    if nm.weight_grad == "masked":
        out = add(aten.where.self, mask, out, zero)
    if nm.decay and decays:
        outside = add(aten.where.self, mask, zero, stored)
        out = add(aten.add.Tensor, out, add(aten.mul.Tensor, outside, nm.decay))
    return out
