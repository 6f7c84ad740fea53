"""Make each mask once.

    nm_mask(w, ...), nm_mask(w, ...)           ->  one nm_mask(w, ...)
    nm_mm(x, w, b, ...), nm_mm(g, w.T, ...)    ->  masked_mm(x, w, mask, b),
                                                   masked_mm(g, w.T, mask.T)

The second only where the device has no kernel that makes a mask in registers, which is then free,
and where a mask has several uses, or the product has a kernel that reads what it keeps.

Needs    nothing; does nothing in a graph without N:M products.
Keeps    values, shapes, provenance.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial

from torch.fx import GraphModule, Node

from sparsefx import cost, ops
from sparsefx.rewriting import (
    PassResult,
    arguments,
    emit,
    finish,
    flip,
    peel,
    plan_of,
    rewrite_nodes,
    value,
)

Key = tuple[Node, int, int, int, bool]


def share_masks(gm: GraphModule) -> PassResult:
    """Run the pass."""
    uses = Counter(key for node in gm.graph.nodes if (key := _mask_key(node)) is not None)
    rules: dict[object, Callable[[Node], Node | None]] = {
        ops.nm_mm: partial(_separate_mm, uses),
        ops.nm_conv: partial(_separate_conv, uses),
        ops.nm_conv_grad_input: partial(_separate_conv_grad_input, uses),
    }
    result = rewrite_nodes(gm, rules)
    merged = _merge(gm)
    result.modified = result.modified or merged
    return result


def _mask_key(node: Node) -> Key | None:
    """Which mask a node makes: (stored weight, n, m, axis, transposable)."""
    if node.target is ops.nm_mask:
        return node.args[0], *node.args[1:]  # type: ignore[return-value]
    if node.target is ops.nm_mm:
        root, flipped = peel(node.args[1])  # type: ignore[arg-type]
        n, m, dim, transposable = arguments(node)[3:]
        return root, n, m, 1 - dim if flipped else dim, transposable
    if node.target in (ops.nm_conv, ops.nm_conv_grad_input):
        return node.args[1], *node.args[-4:]  # type: ignore[return-value]
    return None


def _separates(uses: Counter[Key], node: Node) -> Key | None:
    key = _mask_key(node)
    if key is None or ops.has_kernel(node.target, value(node).device.type):
        return None
    return key if uses[key] > 1 or _reads_kept(node) else None


def _reads_kept(node: Node) -> bool:
    plan = plan_of(node)
    if node.target is not ops.nm_mm or plan is None or plan.decision is None:
        return False
    return cost.reads_kept(plan.site, plan.decision.pattern, plan.decision.lowering)


def _separate_mm(uses: Counter[Key], node: Node) -> Node | None:
    key = _separates(uses, node)
    if key is None:
        return None
    x, w, bias, *_ = arguments(node)
    mask = emit(node, ops.nm_mask, *key)
    mask = flip(node, mask) if peel(w)[1] else mask
    return emit(node, ops.masked_mm, x, w, mask, bias)


def _separate_conv(uses: Counter[Key], node: Node) -> Node | None:
    key = _separates(uses, node)
    if key is None:
        return None
    x, w, bias, *where = arguments(node)[:7]
    return emit(node, ops.masked_conv, x, w, emit(node, ops.nm_mask, *key), bias, *where)


def _separate_conv_grad_input(uses: Counter[Key], node: Node) -> Node | None:
    key = _separates(uses, node)
    if key is None:
        return None
    grad, w, *where = arguments(node)[:7]
    return emit(node, ops.masked_conv_grad_input, grad, w, emit(node, ops.nm_mask, *key), *where)


def _merge(gm: GraphModule) -> bool:
    first: dict[Key, Node] = {}
    merged = False
    for node in list(gm.graph.nodes):
        if node.target is not ops.nm_mask:
            continue
        key = _mask_key(node)
        assert key is not None
        if key in first:
            node.replace_all_uses_with(first[key])
            gm.graph.erase_node(node)
            merged = True
        else:
            first[key] = node
    if merged:
        finish(gm)
    return merged
