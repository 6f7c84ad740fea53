"""Give every site its decision: the policy applied to what find_sites found.

Needs    find_sites ran.
Adds     Plan.decision, by group, so that a layer's products are decided together.
Keeps    the graph itself.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch.fx import GraphModule, Node

from sparsefx.config import Dense, SparseConfig
from sparsefx.plan import Decision, Plan, Role
from sparsefx.policy import Profitable, decide
from sparsefx.rewriting import PLAN, PassResult, failing_at, plan_of


def select_sites(
    gm: GraphModule,
    *,
    config: SparseConfig,
    failed: Mapping[int, str] | None = None,
    unprofitable: Profitable | None = None,
) -> PassResult:
    """Run the pass.

    Args:
        gm: the graph, with sites.
        config: whose rules are applied.
        failed: reason by group for layers that must stay dense.
        unprofitable: see :func:`sparsefx.policy.decide`.
    """
    result = PassResult(gm)
    groups: dict[int, dict[Role, Node]] = {}
    for node in gm.graph.nodes:
        plan = plan_of(node)
        if plan is None:
            continue
        if plan.site.role == "other":
            _decide(node, plan, Decision(Dense(), _UNPAIRED), result)
        else:
            groups.setdefault(plan.site.group, {}).setdefault(plan.site.role, node)
    for group, nodes in groups.items():
        plans = {role: node.meta[PLAN] for role, node in nodes.items()}
        if "forward" not in plans:
            continue
        with failing_at("select_sites", nodes["forward"]):  # a predicate may raise
            decisions = decide(
                {role: plan.site for role, plan in plans.items()},
                config,
                failed=(failed or {}).get(group, ""),
                unprofitable=unprofitable,
            )
        for role, node in nodes.items():
            _decide(node, plans[role], decisions[role], result)
    return result


_UNPAIRED = "a backward product that belongs to no forward product of this graph"


def _decide(node: Node, plan: Plan, decision: Decision, result: PassResult) -> None:
    if plan.decision != decision:
        node.meta[PLAN] = replace(plan, decision=decision)
        result.modified = True
    if decision.reason:
        result.skipped[node.name] = decision.reason
