"""A model's graphs as Dynamo gives them, interpreted node by node: compiled once, run many times.

    Rewritten(config)   runs what a config makes of a model
    Observed(config)    runs the exact model; a probe sees, or replaces, every product

Both are torch.compile backends. The noise of sampling comes from a stream of its own, so that a
model's dropout is the same in every run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparsefx import compat, passes, pipeline
from sparsefx.capture import describe_inputs, name_inputs
from sparsefx.config import SparseConfig
from sparsefx.diagnostics.cuts import Cut, Rewriter, cut_out
from sparsefx.diagnostics.streams import Stream, draws_numbers
from sparsefx.errors import SparsefxError, SparsefxWarning
from sparsefx.plan import Decision, Plan, Role, Site
from sparsefx.rewriting import copy_graph_module, plan_of

_NOISE, _PRODUCT = "sparsefx_noise", "sparsefx_product"


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one layer.

    Attributes:
        layer: its name.
        sites: its products.
        decisions: what the config makes of each.
        cut: its products as a graph.
        failed: why the layer stays dense whatever is asked; "" if it doesn't.
    """

    layer: str
    sites: Mapping[Role, Site]
    decisions: Mapping[Role, Decision]
    cut: Cut
    failed: str = ""


Probe = Callable[[Call, Role, Mapping[str, Any], Callable[[], Tensor]], Tensor]


class Program:
    """A torch.compile backend: interprets the graphs of a model.

    Attributes:
        config: what is asked for.
        graphs: how many were compiled.
        plans: of every product of every graph, decided.
        stream: where the noise of sampling comes from.
        probe: told of each product as it is computed: (call, role, operands by the name of the
            cut's input, what computes the exact product) -> what the model goes on with.
    """

    def __init__(self, config: SparseConfig) -> None:
        """Compile nothing yet."""
        self.config = config
        self.graphs = 0
        self.plans: list[Plan] = []
        self.stream = Stream(0)
        self.probe: Probe | None = None

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """Compile one graph; called by Dynamo."""
        described = describe_inputs(gm, inputs)
        self.graphs += 1

        def rewrite(joint: GraphModule) -> None:
            name_inputs(joint, described)
            self.rewrite(joint)

        with compat.shown_to_the_user(SparsefxError):
            return compat.compile_eagerly(gm, inputs, rewrite, execute=self._execute)

    def rewrite(self, joint: GraphModule) -> None:
        """Edit a joint (or inference) graph."""
        raise NotImplementedError

    def _execute(self, graph: GraphModule) -> Callable[..., Any]:
        return lambda *args: _Run(graph, self).run(*args)


class Rewritten(Program):
    """What a config makes of a model."""

    def rewrite(self, joint: GraphModule) -> None:
        """Run the pipeline, and mark the noise that it put in."""
        before = {node.name for node in joint.graph.nodes if draws_numbers(node)}
        outcome = pipeline.run(joint, self.config)
        self.plans += outcome.plans
        for node in joint.graph.nodes:
            if draws_numbers(node) and node.name not in before:
                node.meta[_NOISE] = True


class Observed(Program):
    """The exact model, with every product in sight.

    Attributes:
        calls: layer calls in the order of the graphs, opaque products apart.
        rewriter: makes what patterns make of a call.
    """

    def __init__(self, config: SparseConfig) -> None:
        """Compile nothing yet."""
        super().__init__(config)
        self.calls: list[Call] = []
        self.rewriter = Rewriter()

    def rewrite(self, joint: GraphModule) -> None:
        """Mark the products; the pipeline runs on a copy, for what it decides."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SparsefxWarning)  # each call's row says so
            outcome = pipeline.run(copy_graph_module(joint), self.config)
        self.plans += outcome.plans
        decided = {(p.site.group, p.site.role): p for p in outcome.plans}
        passes.canonicalize(joint)
        passes.find_sites(joint)
        groups: dict[int, dict[Role, Node]] = {}
        for node in joint.graph.nodes:
            plan = plan_of(node)
            if plan is not None and plan.site.role != "other" and not plan.site.opaque:
                groups.setdefault(plan.site.group, {}).setdefault(plan.site.role, node)
        for group, nodes in groups.items():
            known = {role: decided[group, role] for role in nodes if (group, role) in decided}
            if "forward" in known and len(known) == len(nodes):
                self._add(nodes, known)

    def _add(self, nodes: Mapping[Role, Node], plans: Mapping[Role, Plan]) -> None:
        sites = {role: plan.site for role, plan in plans.items()}
        decisions = {role: p.decision for role, p in plans.items() if p.decision is not None}
        reasons = [d.reason for d in decisions.values() if " failed: " in d.reason]
        call = Call(
            sites["forward"].layer, sites, decisions, cut_out(nodes), next(iter(reasons), "")
        )
        self.calls.append(call)
        for role, node in nodes.items():
            node.meta[_PRODUCT] = call, role


class _Run(Interpreter):
    """One run of one graph of a program."""

    def __init__(self, graph: GraphModule, program: Program) -> None:
        super().__init__(graph)
        self._program = program

    def run_node(self, n: Node) -> Any:
        """Run a node: noise from its own stream, products past the probe."""
        if n.op != "call_function":
            return super().run_node(n)
        if n.meta.get(_NOISE):
            with self._program.stream.playing():
                return super().run_node(n)
        probe = self._program.probe
        if probe is None or _PRODUCT not in n.meta:
            return super().run_node(n)
        call, role = n.meta[_PRODUCT]
        values: dict[str, Any] = {}
        for operand, (name, turned) in zip(n.all_input_nodes, call.cut.feeds[role], strict=True):
            value = self.env[operand]
            values[name] = value.mT if turned else value
        return probe(call, role, values, lambda: super(_Run, self).run_node(n))
