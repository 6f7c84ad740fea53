"""Where a device has no kernel of ours, put the reference's ATen graph in an op's place.

    nm_mm(x, w, b, 2, 4, 0)                ->  the mask's arithmetic, where, addmm
    masked_mm(x, w.T, mask.T, b), stored   ->  addmm(b, x, where(mask, w, 0).T)
    masked_mm(x, p.T, (p != 0).T, b)       ->  addmm(b, x, p.T)

so that Inductor fuses the arithmetic and the partitioner sees what it can recompute. What a stored
mask keeps is made once, for forward and grad_input. An op whose reference can't be traced (a
transposable mask made by a loop over values) stays an opaque call.

Needs    the rewrites ran.
Keeps    values, shapes, provenance.
"""

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx import cost, ops
from sparsefx.config import Masked
from sparsefx.rewriting import (
    Failure,
    PassResult,
    SitesFailedError,
    Traced,
    arguments,
    emit,
    finish,
    flip,
    inline,
    is_backward,
    peel,
    plan_of,
    sites_failed,
    value,
)

aten = torch.ops.aten
Kept = dict[tuple[Node, Node], Node]  # (weight, mask), both as stored -> what acts
_MASKED = {ops.masked_mm, ops.masked_conv, ops.masked_conv_grad_input}


def inline_references(gm: GraphModule) -> PassResult:
    """Run the pass."""
    result = PassResult(gm)
    traced: Traced = {}
    kept: Kept = {}
    failures: list[Failure] = []
    for node in list(gm.graph.nodes):
        if not ops.is_sparse_op(node.target):
            continue
        reason = _opaque(node)
        if reason:
            result.skipped[node.name] = reason
            continue
        try:
            if _has_stored_mask(node):
                _inline_stored(node, kept, traced)
            else:
                inline(node, traced)
        except Exception as error:  # any error here must leave the site dense, not crash
            # told at once: its users still say which layer it serves
            failures += sites_failed("inline_references", [(node, error)]).failures
            continue
        result.modified = True
    if failures:
        raise SitesFailedError("inline_references", failures)
    if result.modified:
        finish(gm)
    return result


def _opaque(node: Node) -> str:
    device = next(value(n).device for n in node.all_input_nodes if isinstance(value(n), Tensor))
    kernel = ops.has_kernel(node.target, device.type) and not _forced(node)
    if kernel and not _left_to_inductor(node, device.type):
        return "the device has a kernel"
    if node.target is ops.after:
        return "it is there for the partitioner to see"
    if not ops.traceable(node.target, node.args):
        return "the reference loops over values"
    return ""


def _left_to_inductor(node: Node, device: str) -> bool:
    """Whether a device is better off without its kernel: where much is kept, and fused masks."""
    plan = plan_of(node)
    if node.target is ops.nm_mask and device == "cpu":
        w, _, m, _, transposable = arguments(node)
        weights = value(w).numel()
        return bool(transposable or m <= cost.MOST_FUSED or weights < cost.FEWEST_WEIGHTS)
    if node.target is ops.masked_mm and plan is not None and plan.decision is not None:
        decision = plan.decision
        return not cost.reads_kept(plan.site, decision.pattern, decision.lowering)
    return node.target is ops.masked_mm


def _forced(node: Node) -> bool:
    """Whether the rule forces the reference, kernel or not."""
    plan = plan_of(node)
    return bool(plan and plan.decision and plan.decision.lowering == "reference")


# --- stored masks


def _has_stored_mask(node: Node) -> bool:
    plan = plan_of(node)
    stored = plan is not None and plan.decision is not None
    return stored and node.target in _MASKED and isinstance(plan.decision.pattern, Masked)  # type: ignore[union-attr]


def _inline_stored(node: Node, kept: Kept, traced: Traced) -> None:
    """Give the product back its masked weight, which costs what it cost before."""
    x, w, mask, *rest = arguments(node)
    acting = _acting(node, w, mask, kept)
    if node.target is ops.masked_conv_grad_input:
        out = emit(node, ops.conv_grad_input, x, acting, *rest)
    elif node.target is ops.masked_conv:
        bias, stride, padding, dilation, groups = rest
        where = stride, padding, dilation, False, [0] * len(stride), groups
        out = emit(node, aten.convolution.default, x, acting, bias, *where)
    elif rest[0] is None:
        out = emit(node, aten.mm.default, x, acting)
    else:
        out = emit(node, aten.addmm.default, rest[0], x, acting)
    node.replace_all_uses_with(out)
    node.graph.erase_node(node)
    if out.target is ops.conv_grad_input:
        inline(out, traced)


def _acting(node: Node, w: Node, mask: Node, kept: Kept) -> Node:
    """Return ``where(mask, w, 0)``, made on the weight as it is stored."""
    (stored, flipped), (bits, flipped_too) = peel(w), peel(mask)
    if flipped != flipped_too:
        stored, bits, flipped = w, mask, False
    if bits.target is aten.ne.Scalar and bits.args == (stored, 0):
        return w  # it is masked already
    known = kept.get((stored, bits))
    if known is None or (is_backward(known) and not is_backward(node)):
        like = value(stored)
        zero = emit(node, aten.full.default, [], 0.0, dtype=like.dtype, device=like.device)
        args = (bits, stored, zero)
        if bits.target is aten.logical_not.default:
            args = (arguments(bits)[0], zero, stored)
        known = kept[stored, bits] = emit(node, aten.where.self, *args)
    return flip(node, known) if flipped else known
