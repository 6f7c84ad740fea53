"""The passes in order, and what happens when one fails: a site goes dense, never wrong.

A run works on a copy of the graph; the graph that was given changes only when all went well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from torch.fx import GraphModule

from sparsefx import compat, cost, naming, ops, passes
from sparsefx.config import Dense, GraphPass, SparseConfig
from sparsefx.errors import PassError, SparsefxWarning
from sparsefx.lowering import check_forced
from sparsefx.plan import Decision, Plan
from sparsefx.rewriting import (
    PassResult,
    SitesFailedError,
    copy_graph_module,
    plan_of,
)
from sparsefx.verify import verify

_PACKED = (
    "its weight is packed: once, if torch._inductor.config.freezing is on while it compiles, else "
    "at every call"
)
Pass = Callable[[GraphModule], PassResult]
Observer = Callable[[str, GraphModule, PassResult], None]


@dataclass
class Outcome:
    """What a run of the pipeline decided and did.

    Attributes:
        plans: a plan with its decision for every product of the dense graph.
        ops: the sparse op that serves a product, by (group, role).
        failures: reasons of passes that failed as a whole.
    """

    plans: list[Plan] = field(default_factory=list)
    ops: dict[tuple[int, str], str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass
class _Exclusions:
    """What earlier attempts taught: nodes, layers and user passes to leave alone."""

    nodes: set[str] = field(default_factory=set)
    groups: dict[int, str] = field(default_factory=dict)
    passes: dict[GraphPass, str] = field(default_factory=dict)


def build(config: SparseConfig, exclusions: _Exclusions | None = None) -> list[tuple[str, Pass]]:
    """Return the passes in the order in which they run."""
    known = exclusions or _Exclusions()
    packed = config.freeze and compat.freezing()
    weighed = partial(cost.unprofitable, packed=packed)
    unprofitable = weighed if config.select == "profitable" else None
    own = [function for function in config.passes if function not in known.passes]
    return [
        ("canonicalize", partial(passes.canonicalize, excluded=known.nodes)),
        ("find_sites", partial(passes.find_sites, excluded=known.nodes)),
        ("recognize_masks", partial(passes.recognize_masks, failed=known.groups)),
        (
            "select_sites",
            partial(
                passes.select_sites,
                config=config,
                failed=known.groups,
                unprofitable=unprofitable,
            ),
        ),
        ("rewrite_nm", passes.rewrite_nm),
        ("rewrite_masked", passes.rewrite_masked),
        ("rewrite_sampled", passes.rewrite_sampled),
        ("pack_frozen", partial(passes.pack_frozen, freeze=config.freeze)),
        ("share_masks", passes.share_masks),
        ("lower_vendor", passes.lower_vendor),
        *((getattr(function, "__name__", "pass"), function) for function in own),
        ("cleanup", passes.cleanup),
        ("sum_rows", partial(passes.sum_rows, excluded=known.nodes)),
        ("fuse_epilogues", passes.fuse_epilogues),
        ("inline_references", passes.inline_references),
    ]


def run(gm: GraphModule, config: SparseConfig, observe: Observer | None = None) -> Outcome:
    """Rewrite ``gm`` in place.

    Args:
        gm: a joint or inference graph of ATen operators.
        config: what is asked for.
        observe: called after each pass of the attempt that holds, with (name, graph, result).

    Returns:
        What became of every product.

    Raises:
        PassError: under ``strict=True``, naming pass, node and layer.
        ConfigError: for a lowering that a rule forces and that a product does not have.
    """
    known, failures = _Exclusions(), []
    while True:
        work = copy_graph_module(gm)
        stages: list[tuple[str, GraphModule, PassResult]] = []
        outcome = Outcome()
        running = ""
        try:
            for running, function in build(config, known):
                result = function(work)
                if not isinstance(result, PassResult):
                    raise TypeError(f"returned {result!r} instead of a PassResult")
                if config.verify:
                    verify(work, running)
                _learn(outcome, running, work, result)
                if observe is not None:
                    stages.append((running, copy_graph_module(work), result))
        except Exception as error:  # whatever a pass raises, the model must still run, dense
            message = _message(running, error, work)
            if config.strict:
                raise PassError(message) from error
            failures.append(message)
            if function in config.passes:
                known.passes[function] = message
            elif not (isinstance(error, SitesFailedError) and _exclude(known, error)):
                return _all_dense(gm, config, failures)
            continue
        break
    check_forced(outcome.plans, outcome.ops)
    outcome.failures = failures
    if config.passes or any(plan.decision and not plan.decision.dense for plan in outcome.plans):
        gm.graph = work.graph
    for name, graph, result in stages:
        if observe is not None:
            observe(name, graph, result)
    _warn(failures)
    return outcome


def _learn(outcome: Outcome, name: str, gm: GraphModule, result: PassResult) -> None:
    """Collect the decisions once they are made, and the ops before they are inlined."""
    if name == "select_sites":
        found = (plan_of(node) for node in gm.graph.nodes)
        outcome.plans = [plan for plan in found if plan is not None]
    elif name in ("rewrite_nm", "rewrite_masked", "rewrite_sampled"):
        for node in gm.graph.nodes:
            plan = plan_of(node)
            if plan is not None and node.name in result.skipped:
                _decline(outcome, plan, result.skipped[node.name])
    elif name == "pack_frozen":
        for node in gm.graph.nodes:
            plan = plan_of(node)
            if plan is not None and node.target is ops.nm_packed_mm:
                _annotate(outcome, plan, _PACKED)
            elif plan is not None and node.name in result.skipped:
                _annotate(outcome, plan, result.skipped[node.name])
    elif name == "lower_vendor":
        for node in gm.graph.nodes:
            plan = plan_of(node)
            if plan is not None and node.name in result.skipped:
                _annotate(outcome, plan, result.skipped[node.name])
    elif name == "cleanup":
        for node in gm.graph.nodes:
            plan = plan_of(node)
            if plan is not None and ops.is_sparse_op(node.target):
                key = plan.site.group, plan.site.role
                outcome.ops[key] = node.target.name().rpartition("::")[2]


def _decline(outcome: Outcome, plan: Plan, reason: str) -> None:
    for i, other in enumerate(outcome.plans):
        if (other.site.group, other.site.role) == (plan.site.group, plan.site.role):
            outcome.plans[i] = other.decided(Decision(Dense(), reason))


def _annotate(outcome: Outcome, plan: Plan, note: str) -> None:
    for i, other in enumerate(outcome.plans):
        same = (other.site.group, other.site.role) == (plan.site.group, plan.site.role)
        if same and other.decision is not None:
            notes = "; ".join(filter(None, (other.decision.note, note)))
            outcome.plans[i] = other.decided(replace(other.decision, note=notes))


def _message(name: str, error: Exception, gm: GraphModule) -> str:
    """Name pass, node and layer; a node that has no plan yet is named by its module stack."""
    if not isinstance(error, SitesFailedError):
        return f"{name} failed: {type(error).__name__}: {error} (in the whole graph)"
    nodes = {node.name: node for node in gm.graph.nodes}
    return "; ".join(
        f"{name} failed at node {f.node!r} of layer "
        f"{f.layer or naming.layer_of(nodes[f.node], None)!r}: {f.error}"
        for f in error.failures
    )


def _exclude(known: _Exclusions, error: SitesFailedError) -> bool:
    """Leave the failing layers alone from now on, or the node; False if nothing new was learned."""
    new = False
    for failure in error.failures:
        group = -1 if failure.group is None else failure.group
        if group >= 0 and group not in known.groups:
            known.groups[group] = f"{error.pass_name} failed: {failure.error}"
            new = True
        elif failure.node not in known.nodes:  # it is no product, or fails beside a dense one too
            known.nodes.add(failure.node)
            new = True
    return new


def _all_dense(gm: GraphModule, config: SparseConfig, failures: list[str]) -> Outcome:
    """Leave ``gm`` as it is; name its products if at least finding them works."""
    outcome = Outcome(failures=failures)
    work = copy_graph_module(gm)
    try:
        passes.canonicalize(work)
        passes.find_sites(work)
    except Exception as error:  # the pass that fails may be one of these two
        failures.append(f"the products could not be listed: {type(error).__name__}: {error}")
    found = (plan_of(node) for node in work.graph.nodes)
    decision = Decision(Dense(), failures[0])
    outcome.plans = [plan.decided(decision) for plan in found if plan is not None]
    _warn(failures)
    return outcome


def _warn(failures: list[str]) -> None:
    if failures:
        warnings.warn(
            "sparsefx left products dense: "
            + "; ".join(dict.fromkeys(failures))
            + " (strict=True raises instead)",
            SparsefxWarning,
            stacklevel=3,
        )
