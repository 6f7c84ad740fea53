"""What you need to unit-test a pass, ours or your own: capture a graph, run it, look at it.

    gm = traced(torch.mm, torch.randn(3, 8), torch.randn(8, 5), plan=NM(2, 4))
    result = run_pass(rewrite_nm, gm)
    print(result.text)        # %0 = input() : float32[3, 8] ...
    result.skipped            # why a node was left alone
    gm(x, w)                  # runs

A whole model, forward and backward in one graph, with every layer named:

    joint = capture(model, x)
    run_pass(canonicalize, joint); run_pass(find_sites, joint)
    [(p.site.layer, p.site.role) for p in plans(joint)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule

from sparsefx import compat
from sparsefx.capture import joint_graph, record_graphs
from sparsefx.config import Dense, Pattern, SparseConfig
from sparsefx.passes.canonicalize import canonicalize
from sparsefx.passes.find_sites import find_sites
from sparsefx.plan import Decision, Plan, Role
from sparsefx.report.printer import diff, format_graph
from sparsefx.rewriting import PLAN, PassResult, plan_of
from sparsefx.verify import verify

__all__ = [
    "PassRun",
    "capture",
    "captures",
    "diff",
    "format_graph",
    "plans",
    "run_pass",
    "traced",
]


@dataclass(frozen=True)
class PassRun:
    """What one pass did to one graph.

    Attributes:
        before: the graph as text.
        text: the graph afterwards.
        modified: what the pass said.
        skipped: reason by node name.
    """

    before: str
    text: str
    modified: bool
    skipped: dict[str, str]

    @property
    def diff(self) -> str:
        """What changed, as a unified diff."""
        return diff(self.before, self.text)


def run_pass(function: Callable[[GraphModule], PassResult], gm: GraphModule) -> PassRun:
    """Run one pass on ``gm`` in place, check the graph, and return what happened.

    Args:
        function: a pass; bind its options with ``functools.partial``.
        gm: as :func:`traced` or :func:`capture` returned it.

    Raises:
        PassError: when the graph that the pass leaves doesn't hold.
        TypeError: when the pass returns something else than a PassResult.
    """
    before = format_graph(gm)
    result = function(gm)
    if not isinstance(result, PassResult):
        raise TypeError(f"{function!r} returned {result!r} instead of a PassResult")
    verify(gm, getattr(function, "__name__", "pass"))
    return PassRun(before, format_graph(gm), result.modified, dict(result.skipped))


def traced(
    function: Callable[..., Any],
    *args: Any,
    plan: Pattern | None = None,
    role: Role = "forward",
    derived: bool = False,
) -> GraphModule:
    """Trace a function to a graph of ATen operators with fake values.

    Args:
        function: of tensors.
        args: tensors and constants; tensors become inputs.
        plan: a pattern that every product in the graph is planned as.
        role: of these products.
        derived: whether they follow the forward's pattern instead of having their own.
    """
    gm = compat.trace_function(function, args)
    if plan is None:
        return gm
    canonicalize(gm)
    find_sites(gm)
    for node in gm.graph.nodes:
        found = plan_of(node)
        if found is not None:
            weight = found.site.weight or ("right" if found.site.kind != "bmm" else None)
            site = replace(found.site, role=role, weight=weight, has_backward=True, is_output=False)
            forward = plan if derived else Dense()
            node.meta[PLAN] = Plan(site, Decision(plan, derived=derived, forward=forward))
    return gm


def capture(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> GraphModule:
    """Capture the one graph of a model: forward and backward together where gradients are needed.

    Args:
        model: called with ``args`` and ``kwargs`` under the current grad mode.
        args: inputs.
        dynamic: whether sizes are symbolic, as for ``torch.compile``.
        kwargs: inputs by name.

    Raises:
        ValueError: when the model breaks into several graphs; see :func:`captures`.
    """
    found = captures(model, *args, dynamic=dynamic, **kwargs)
    if len(found) != 1:
        raise ValueError(f"{len(found)} graphs were captured instead of 1; use captures()")
    return found[0]


def captures(
    model: nn.Module | Callable[..., Any],
    *args: Any,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> list[GraphModule]:
    """Capture every graph of a model; nothing is compiled, the model runs once in eager mode."""
    records = record_graphs(model, SparseConfig(), args, kwargs, dynamic=dynamic)
    return [joint_graph(record) for record in records]


def plans(gm: GraphModule) -> list[Plan]:
    """Return the plans in a graph, in order."""
    return [plan for node in gm.graph.nodes if (plan := plan_of(node)) is not None]
