"""One layer call cut out of a joint graph: its products alone, over inputs of their own.

    y = x @ w;  gx = g @ w.T;  gw = x.T @ g     ->     f(x, w, g) = y, gx, gw

Such a graph is rewritten by the very passes that rewrite a model, and runs operator by operator on
what a model's run feeds it: so what a layer's patterns do is seen without compiling anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from sparsefx import compat, passes
from sparsefx.config import NM, Sampled
from sparsefx.diagnostics.streams import Stream, draws_numbers
from sparsefx.plan import Decision, Plan, Role
from sparsefx.rewriting import PLAN, copy_graph_module, peel, plan_of

aten = torch.ops.aten
Feeds = tuple[tuple[str, bool], ...]  # for each operand of a node: the input, whether transposed
Decisions = Mapping[Role, Decision]


@dataclass(frozen=True)
class Cut:
    """The products of one layer call.

    Attributes:
        gm: from operands to products, in the order of ``feeds``; transposes are inside.
        feeds: by role, which input each operand of the model's node is.
        bias: by role, the input that is added to the product.
    """

    gm: GraphModule
    feeds: Mapping[Role, Feeds]
    bias: str | None


def cut_out(nodes: Mapping[Role, Node]) -> Cut:
    """Cut out products of one layer call; their nodes carry plans."""
    graph, inputs = Graph(), dict[Node, Node]()
    operands = {role: list(node.all_input_nodes) for role, node in nodes.items()}
    for operand in (operand for found in operands.values() for operand in found):
        root, _ = _root(operand)
        if root not in inputs:
            inputs[root] = graph.placeholder(f"operand_{len(inputs)}")
            inputs[root].meta = _facts(root)
    made: dict[Node, Node] = {}
    for role, node in nodes.items():
        for operand in operands[role]:
            if operand not in made:
                made[operand] = _view(graph, operand, inputs)
        copied = graph.node_copy(node, lambda n: made[n])
        made[node] = copied
    graph.output(tuple(made[node] for node in nodes.values()))
    feeds = {
        role: tuple((inputs[root].name, turned) for root, turned in map(_root, found))
        for role, found in operands.items()
    }
    gm = compat.lazy_graph_module(GraphModule({}, Graph()), graph)
    return Cut(gm, feeds, _bias(nodes["forward"], inputs))


def _root(operand: Node) -> tuple[Node, bool]:
    return peel(operand) if isinstance(operand.meta.get("val"), Tensor) else (operand, False)


def _facts(node: Node) -> dict[str, Any]:
    return {k: node.meta[k] for k in ("val", "partitioner_tag", "seq_nr") if k in node.meta}


def _view(graph: Graph, operand: Node, inputs: Mapping[Node, Node]) -> Node:
    root, turned = _root(operand)
    if not turned:
        return inputs[root]
    rank = operand.meta["val"].dim()
    order = [*range(rank - 2), rank - 1, rank - 2]
    view = graph.call_function(aten.permute.default, (inputs[root], order))
    view.meta = _facts(operand)
    return view


def _bias(forward: Node, inputs: Mapping[Node, Node]) -> str | None:
    places: dict[object, int] = {aten.addmm.default: 0, aten.convolution.default: 2}
    place = places.get(forward.target)
    found = None if place is None else forward.args[place]
    return inputs[_root(found)[0]].name if isinstance(found, Node) else None


# --- what patterns make of it


def changed(decision: Decision | None) -> bool:
    """Whether a decision changes what a product computes; a stored mask doesn't."""
    return decision is not None and isinstance(decision.pattern, NM | Sampled)


def is_random(decided: Mapping[Any, Decisions]) -> bool:
    """Whether what decisions make of some calls is drawn at random."""
    patterns = [d.pattern for decisions in decided.values() for d in decisions.values()]
    return any(isinstance(pattern, Sampled) and pattern.random for pattern in patterns)


def rewritten(cut: Cut, decisions: Decisions) -> GraphModule:
    """Rewrite a copy as the pipeline would; roles without a decision stay dense.

    Raises:
        SitesFailedError: by a pass, which in a pipeline would leave the layer dense.
    """
    gm = copy_graph_module(cut.gm)
    for node in gm.graph.nodes:
        plan = plan_of(node)
        if plan is not None:
            node.meta[PLAN] = Plan(plan.site, decisions.get(plan.site.role), plan.flipped)
    passes.rewrite_nm(gm)
    passes.rewrite_sampled(gm)
    return gm


class Rewriter:
    """Rewrites cuts; repeated layers only once."""

    def __init__(self) -> None:
        """Start with nothing known."""
        self._known: dict[object, GraphModule] = {}

    def __call__(self, cut: Cut, decisions: Decisions) -> GraphModule:
        """Return what :func:`rewritten` does."""
        key = _identity(cut), tuple((role, repr(d)) for role, d in decisions.items())
        if key not in self._known:
            self._known[key] = rewritten(cut, decisions)
        return self._known[key]


def _identity(cut: Cut) -> object:
    """What passes can see of a cut, names apart."""
    rows = []
    for node in cut.gm.graph.nodes:
        plan = plan_of(node)
        site = plan and replace(plan.site, layer="", group=0, source="", weight_name="", mask="")
        rows.append((str(node.target), _shown(node), repr(site), plan and plan.flipped))
    return tuple(rows)


def _shown(node: Node) -> str:
    found: Any = node.meta.get("val")
    strided = isinstance(found, Tensor) and found.layout == torch.strided
    facts = (found.shape, found.stride(), found.dtype, found.device) if strided else found
    return f"{node.name} {map_arg((node.args, node.kwargs), lambda n: n.name)} {facts}"


class Lazy:
    """Computes what is asked for, once, as its inputs come in; draws stay what they were."""

    def __init__(self, gm: GraphModule, roles: Sequence[Role], stream: Stream) -> None:
        """Take a cut, rewritten or not, and the stream of its random numbers."""
        self._values: dict[Node, Any] = {}
        self._inputs = {n.name: n for n in gm.graph.nodes if n.op == "placeholder"}
        results: Any = list(gm.graph.nodes)[-1].args[0]
        self._results = dict(zip(roles, results, strict=True))
        self._stream = stream

    def bind(self, values: Mapping[str, Any]) -> None:
        """Give inputs by name."""
        for name, value in values.items():
            if name in self._inputs:  # a pass may have dropped one
                self._values[self._inputs[name]] = value

    def result(self, role: Role) -> Tensor:
        """Return the product of a role, whose operands are bound."""
        found = self._value(self._results[role])
        assert isinstance(found, Tensor)
        return found

    def _value(self, node: Node) -> Any:
        if node not in self._values:
            args, kwargs = map_arg((node.args, node.kwargs), self._value)
            target: Any = node.target
            with torch.no_grad():
                if draws_numbers(node):
                    with self._stream.playing():
                        self._values[node] = target(*args, **kwargs)
                else:
                    self._values[node] = target(*args, **kwargs)
        return self._values[node]
