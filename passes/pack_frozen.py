"""Pack the weights of an inference graph, which depend on parameters and constants alone.

    nm_mm(x, w.T, b, n, m, 0)                   ->  values, codes = nm_pack(w, n, m)
                                                    nm_packed_mm(x, values, codes, b, n, m)
    masked_mm(x, w.T, mask.T, b), transposable  ->  the same, of where(mask, w, 0)

Inductor's freezing, if ``torch._inductor.config.freezing`` is on, computes ``nm_pack`` when it
compiles, and keeps the result in the weight's place; without it each call packs anew.

Needs    rewrite_nm ran, share_masks didn't.
Keeps    values within rounding, shapes, provenance.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.config import NM
from sparsefx.rewriting import (
    PassResult,
    Skip,
    arguments,
    emit,
    flip,
    peel,
    plan_of,
    rewrite_nodes,
    value,
)

aten = torch.ops.aten
Rule = Callable[[Node, NM], Node | Skip]


def pack_frozen(gm: GraphModule, *, freeze: bool = True) -> PassResult:
    """Run the pass.

    Args:
        gm: edited in place.
        freeze: whether weights are frozen; nothing is done where they aren't.
    """
    rules: dict[object, Rule] = {
        ops.nm_mm: _nm_mm,
        ops.masked_mm: _masked_mm,
        ops.nm_conv: _conv,
        ops.masked_conv: _conv,
    }
    return rewrite_nodes(gm, {op: partial(_frozen, rule, freeze) for op, rule in rules.items()})


def _frozen(rule: Rule, freeze: bool, node: Node) -> Node | Skip | None:
    plan = plan_of(node)
    if not freeze or plan is None or plan.decision is None or plan.site.role != "forward":
        return None
    if plan.site.has_backward:
        return Skip("freeze=True packs no weight of a training graph: call it under no_grad()")
    if plan.decision.lowering not in (None, "cpp", "triton"):
        forced = plan.decision.lowering
        return Skip(f"freeze=True packs nothing where a rule says lowering={forced!r}")
    pattern = plan.decision.pattern
    if not isinstance(pattern, NM):
        return Skip("freeze=True packs no stored mask, whose pattern may change: use sparsefx.pack")
    return rule(node, pattern)


def _nm_mm(node: Node, pattern: NM) -> Node:
    x, w, bias, *_ = arguments(node)
    return _packed_mm(node, x, w, bias, pattern)


def _masked_mm(node: Node, pattern: NM) -> Node | Skip:
    """A transposable mask is also one along K alone."""
    x, w, mask, bias = arguments(node)
    (stored, flipped), (bits, flipped_too) = peel(w), peel(mask)
    if flipped != flipped_too:
        return Skip("freeze=True: weight and mask are not stored alike")
    like = value(stored)
    zero = emit(node, aten.full.default, [], 0.0, dtype=like.dtype, device=like.device)
    kept = emit(node, aten.where.self, bits, stored, zero)
    return _packed_mm(node, x, flip(node, kept) if flipped else kept, bias, pattern)


def _conv(node: Node, pattern: NM) -> Skip:
    return Skip("freeze=True packs linear layers only; sparsefx.pack also packs convolutions")


def _packed_mm(node: Node, x: Node, w: Node, bias: Node | None, pattern: NM) -> Node:
    """Multiply by w [K, N], packed as [N, K]."""
    n, m = pattern.n, pattern.m
    packed = emit(node, ops.nm_pack, flip(node, w), n, m)
    values, codes = (emit(node, operator.getitem, packed, place) for place in (0, 1))
    return emit(node, ops.nm_packed_mm, x, values, codes, bias, n, m)
