"""Undo what canonicalize split for nothing, and drop what nobody uses.

    conv_grad_input(g, w), conv_grad_weight(g, x)    ->  one convolution_backward(g, x, w)
    a lone one                                       ->  the ATen operators that it stands for

Needs    the rewrites ran: what is still dense stays dense.
Keeps    values within rounding.
"""

import operator

import torch
from torch.fx import GraphModule, Node

from sparsefx import ops
from sparsefx.rewriting import (
    PLAN,
    PassResult,
    arguments,
    emit,
    failing_at,
    finish,
    inline,
    plan_of,
    value,
)

aten = torch.ops.aten


def cleanup(gm: GraphModule) -> PassResult:
    """Run the pass."""
    result = PassResult(gm)
    halves: dict[object, Node] = {}
    for node in list(gm.graph.nodes):
        if node.target not in (ops.conv_grad_input, ops.conv_grad_weight):
            continue
        result.modified = True
        plan = plan_of(node)
        key = plan.site.group if plan is not None else node
        other = halves.pop(key, None)
        if other is not None and other.target is not node.target:
            with failing_at("cleanup", node):
                _join(other, node)
        else:
            halves[key] = node
    for node in halves.values():
        with failing_at("cleanup", node):
            inline(node)
    finish(gm)
    return result


def _join(first: Node, second: Node) -> None:
    """Both halves' operands exist where the later one stands; the earlier has later users only."""
    gi, gw = (first, second) if first.target is ops.conv_grad_input else (second, first)
    early = first if first in _before(second) else second
    late = second if early is first else first
    if any(user in _between(early, late) for user in early.users):
        inline(first)
        inline(second)
        return
    grad, w, _, *where = arguments(gi)
    x, groups = gw.args[1], where.pop()
    zeros = [0] * len(where[0])
    both = emit(
        late, aten.convolution_backward.default, grad, x, w, None, *where, False, zeros, groups,
        [True, True, False],
    )  # fmt: skip
    for index, half in enumerate((gi, gw)):
        item = emit(late, operator.getitem, both, index)
        item.meta[PLAN] = half.meta.get(PLAN)
        item.meta["val"] = value(half)
        half.replace_all_uses_with(item)
    for half in (gi, gw):
        half.graph.erase_node(half)


def _before(node: Node) -> set[Node]:
    found: set[Node] = set()
    for other in node.graph.nodes:
        if other is node:
            return found
        found.add(other)
    return found


def _between(early: Node, late: Node) -> set[Node]:
    return _before(late) - _before(early)
