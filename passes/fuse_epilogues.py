"""Give a product's activation to the kernel that makes the product.

    relu(nm_mm(x, w, b, n, m, dim, False))    ->  nm_mm_act(x, w, b, n, m, dim, False, "relu")

and so for gelu, its tanh form and silu, in the operators that these are traced to, views between
them or not; only where the device has a kernel for it (elsewhere Inductor fuses what is inlined),
and where nothing else reads what goes in: in an inference graph, or for a relu, whose derivative
reads its result. Where only arithmetic follows, as in a gated layer, Inductor activates there at no
cost, and it stays.

Needs    cleanup ran, the sparse ops are not inlined yet.
Keeps    values within rounding, shapes, provenance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparsefx import compat, ops
from sparsefx.ops.activated import ACTIVATIONS
from sparsefx.rewriting import PassResult, Skip, arguments, emit, plan_of, rewrite_nodes, value

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_PRODUCTS = {
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default
}  # fmt: skip
_SERVED = {torch.float32, torch.float16, torch.bfloat16}
Traced = dict[tuple[str, torch.dtype], GraphModule]


def fuse_epilogues(gm: GraphModule) -> PassResult:
    """Run the pass."""
    traced: Traced = {}
    rules: dict[object, Callable[[Node], Node | Skip | None]] = {
        ops.nm_mm: partial(_nm_mm, traced),
    }
    return rewrite_nodes(gm, rules)


def _nm_mm(traced: Traced, node: Node) -> Node | Skip | None:
    if not ops.has_kernel(ops.nm_mm_act, value(node).device.type):
        return None
    last = _behind_views(node)
    for name, function in ACTIVATIONS.items():
        found = _match(_graph(traced, name, function, last), last)
        if found is None:
            continue
        reason = _left(node, found)
        if reason:
            return Skip(f"{name}: {reason}")
        out = emit(node, ops.nm_mm_act, *arguments(node), name)
        found[-1].replace_all_uses_with(last)  # what is behind reads the product, activated
        return out
    return None


def _behind_views(node: Node) -> Node:
    """The last of the views that are each the only reader of what they view."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in _VIEWS:
        node = user
    return node


def _graph(traced: Traced, name: str, function: Callable[..., Any], source: Node) -> GraphModule:
    """The operators that an activation is traced to in a dtype."""
    key = name, value(source).dtype
    if key not in traced:
        gm = compat.trace_reference(lambda x: function(x), [value(source)])
        gm.graph.eliminate_dead_code()
        traced[key] = gm
    return traced[key]


def _match(pattern: GraphModule, source: Node) -> list[Node] | None:
    """Find a pattern's operators behind ``source``: it and they, in order, the result last."""
    at: dict[Node, Node] = {}
    for node in pattern.graph.nodes:
        if node.op == "placeholder":
            at[node] = source
        elif node.op == "call_function":
            wanted = map_arg((node.args, node.kwargs), lambda n: at[n])
            readers = [user for used in node.all_input_nodes for user in at[used].users]
            same = (u for u in readers if u.target is node.target and (u.args, u.kwargs) == wanted)
            if (found := next(same, None)) is None:
                return None
            at[node] = found
    return list(at.values())


def _wanted_in_memory(node: Node) -> bool:
    """Whether a product or a caller reads a value, behind views or not."""
    return any(
        user.op == "output"
        or user.target in _PRODUCTS
        or ops.is_sparse_op(user.target)
        or (user.target in _VIEWS | {aten.permute.default} and _wanted_in_memory(user))
        for user in node.users
    )


def _left(node: Node, found: list[Node]) -> str:
    """Why an activation stays by itself, or ""."""
    plan = plan_of(node)
    if any(user not in found for inner in found[:-1] for user in inner.users):
        return "what goes in is read elsewhere, such as by its derivative"
    if plan is not None and plan.decision is not None and plan.decision.lowering == "reference":
        return "the rule forces the reference"
    if not _wanted_in_memory(found[-1]):
        return "only arithmetic reads it, which Inductor fuses it with"
    if value(node).dtype not in _SERVED:
        return f"no kernel takes {value(node).dtype}"
    return ""
