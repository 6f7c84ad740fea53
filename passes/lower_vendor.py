"""Give 2:4 products on a GPU to the vendor's library for sparse tensor cores.

    masked_mm(x, w.T, mask.T, b), forward     ->  nm24_mm(x, nm24_compress(w, mask), w.T, mask.T, b)
    masked_mm(g, w, mask, None), grad_input   ->  nm24_mm(g, nm24_compress(w.T, mask.T), w, mask)
    nm_mm(x, w.T, b, 2, 4, 0), forced         ->  as the first, with its mask made apart

The first two are of a transposable mask, which is one along K in both. Each form is compressed
where it is first used: what only the backward reads is compressed there, from a mask and a weight
that are there anyway, so nothing more is saved. Unless a rule says lowering="vendor", a product is
left as it is where it has too few rows to pay (sparsefx/cost/vendor.py).

Needs    share_masks ran.
Keeps    values within rounding, shapes, provenance.
"""

from __future__ import annotations

from functools import partial

from torch.fx import GraphModule, Node

from sparsefx import compat, cost, ops
from sparsefx.config import NM
from sparsefx.ops.semi_structured import misfit
from sparsefx.plan import Plan
from sparsefx.rewriting import (
    PassResult,
    Skip,
    arguments,
    emit,
    flip,
    is_backward,
    peel,
    plan_of,
    rewrite_nodes,
    value,
)

Packed = dict[tuple[Node, Node, bool], Node]  # (weight, mask) as stored, whether flipped


def lower_vendor(gm: GraphModule) -> PassResult:
    """Run the pass."""
    packed: Packed = {}
    return rewrite_nodes(
        gm, {ops.masked_mm: partial(_masked_mm, packed), ops.nm_mm: partial(_nm_mm, packed)}
    )


def _masked_mm(packed: Packed, node: Node) -> Node | Skip | None:
    plan = _planned(node)
    if plan is None or not plan.decision.pattern.transposable:  # type: ignore[union-attr]
        return None  # a shared row-wise mask has a kernel that makes it in registers
    x, w, mask, bias = arguments(node)
    if reason := _declined(plan, x, w):
        return Skip(reason)
    if peel(w)[1] != peel(mask)[1]:
        return Skip("2:4 by the vendor's library: weight and mask are not stored alike")
    return _product(packed, node, x, w, mask, bias)


def _nm_mm(packed: Packed, node: Node) -> Node | Skip | None:
    """A row-wise mask is one along K in the forward alone."""
    plan = _planned(node)
    x, w, bias, *_, dim, _ = arguments(node)
    if plan is None or dim != 0 or plan.decision.lowering != "vendor":  # type: ignore[union-attr]
        return None
    if reason := _declined(plan, x, w):
        return Skip(reason)
    root, flipped = peel(w)
    mask = emit(node, ops.nm_mask, root, 2, 4, 1 if flipped else 0, False)
    return _product(packed, node, x, w, flip(node, mask) if flipped else mask, bias)


def _planned(node: Node) -> Plan | None:
    """The plan of a 2:4 product on a GPU that no rule forces to run another way."""
    plan = plan_of(node)
    if plan is None or plan.decision is None or plan.site.device != "cuda":
        return None
    pattern = plan.decision.pattern
    if not isinstance(pattern, NM) or (pattern.n, pattern.m) != (2, 4):
        return None
    return plan if plan.decision.lowering in (None, "vendor") else None


def _declined(plan: Plan, x: Node, w: Node) -> str:
    """Why a product stays as it is, or ""."""
    library = compat.semi_structured_library(value(w).device)
    depth, cols = map(compat.settled, value(w).shape)
    if not isinstance(depth, int) or not isinstance(cols, int):
        return "2:4 by the vendor's library: the weight's sizes are not known when compiling"
    if reason := misfit(cols, depth, value(w).dtype, library):
        return f"2:4 by the vendor's library: {reason}"
    assert plan.decision is not None
    return "" if plan.decision.lowering == "vendor" else _few(x)


def _few(x: Node) -> str:
    rows = value(x).shape[0]
    if not compat.has_size(rows):
        return "2:4 by the vendor's library: how many rows it multiplies depends on data"
    if cost.vendor_pays(compat.size_hint(rows)):
        return ""
    return (
        f"2:4 by the vendor's library: {compat.size_hint(rows)} rows are too few to pay by others' "
        'measurements; lowering="vendor" in the rule forces it'
    )


def _product(packed: Packed, node: Node, x: Node, w: Node, mask: Node, bias: Node | None) -> Node:
    compressed = _compressed(packed, node, w, mask)
    return emit(node, ops.nm24_mm, x, compressed, w, mask, bias)


def _compressed(packed: Packed, node: Node, w: Node, mask: Node) -> Node:
    """Compress the transpose of w, once in the forward, or once in the backward."""
    (stored, flipped), (bits, _) = peel(w), peel(mask)
    known = packed.get((stored, bits, flipped))
    if known is None or (is_backward(known) and not is_backward(node)):
        turned = flip(node, w), flip(node, mask)
        known = packed[stored, bits, flipped] = emit(node, ops.nm24_compress, *turned)
    return known
