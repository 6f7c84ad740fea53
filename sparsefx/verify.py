"""What must hold between passes: a graph that lints, with true metadata, that can be split."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from sparsefx.errors import PassError
from sparsefx.plan import Plan
from sparsefx.rewriting import PLAN, fake_result


def verify(gm: GraphModule, after: str) -> None:
    """Check ``gm``.

    Args:
        gm: the graph.
        after: the pass that ran last, for the message.

    Raises:
        PassError: naming the pass, the node and what doesn't hold.
    """
    gm.graph.lint()
    for node in gm.graph.nodes:
        plan = node.meta.get(PLAN)
        if plan is not None and not isinstance(plan, Plan):
            raise PassError(f"after {after}: {node.name} carries {plan!r} instead of a Plan")
        if node.op != "call_function":
            continue
        if "val" not in node.meta:
            raise PassError(f"after {after}: {node.format_node()} has no fake value")
        _check_order(node, after)
        _check_value(node, after)


def _check_order(node: Node, after: str) -> None:
    """The partitioner needs forward nodes that don't wait for the backward."""
    if node.meta.get("partitioner_tag") != "is_forward":
        return
    for source in node.all_input_nodes:
        if source.meta.get("partitioner_tag") == "is_backward":
            raise PassError(
                f"after {after}: forward node {node.name} reads backward node {source.name}"
            )


def _check_value(node: Node, after: str) -> None:
    """Sparse ops and what passes insert must compute what their metadata says."""
    claimed = node.meta["val"]
    if not isinstance(claimed, Tensor) or getattr(node.target, "namespace", "") != "sparsefx":
        return
    found: Any = fake_result(node.target, node.args, node.kwargs)
    same = tuple(found.shape) == tuple(claimed.shape) and found.dtype == claimed.dtype
    if not same:
        raise PassError(
            f"after {after}: {node.name} computes {found.dtype}{tuple(found.shape)}, but its "
            f"metadata says {claimed.dtype}{tuple(claimed.shape)}"
        )
