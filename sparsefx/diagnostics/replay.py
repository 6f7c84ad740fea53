"""Every product of a training step with its operands, one at a time.

A model runs once through Dynamo; its joint graphs are then interpreted on the tensors and the
output gradients of that run. An interpreter drops what nobody needs any more, so no more is held
than a training step holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sparsefx import compat, passes
from sparsefx.capture import Compilation, joint_graph, remember
from sparsefx.config import SparseConfig
from sparsefx.diagnostics.running import Loss, loss_of, parameters_of
from sparsefx.errors import DiagnosticsError
from sparsefx.plan import Plan, Site
from sparsefx.rewriting import plan_of

Visit = Callable[[Plan, Node, tuple[Any, ...], Tensor], None]


@dataclass
class Step:
    """One call of one graph: what it was given, and the gradients of what it returned."""

    record: Compilation
    args: list[Any]
    outputs: list[Any] = field(default_factory=list)
    tangents: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Recorded:
    """The graphs' calls in order, and the squared norm of every parameter's gradient."""

    steps: list[Step]
    squares: dict[str, float]


def record_step(model: Any, batch: Any, config: SparseConfig, loss: Loss | None) -> Recorded:
    """Run forward and backward once, eagerly."""
    steps: list[Step] = []

    def keep(gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        record = remember(gm, example_inputs, config)

        def run(*args: Any) -> Any:
            step = Step(record, [a.detach() if isinstance(a, Tensor) else a for a in args])
            steps.append(step)
            outputs = gm.forward(*args)
            for place, out in enumerate(outputs):
                step.outputs.append(out.detach() if isinstance(out, Tensor) else out)
                if isinstance(out, Tensor) and out.requires_grad:
                    hook = partial(step.tangents.__setitem__, place)
                    out.register_hook(hook)  # type: ignore[no-untyped-call]
            return outputs

        return run

    compiled: Any = torch.compile(model, backend=keep)
    total = loss_of(compiled, batch, loss)
    named = parameters_of(model)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    squares = {
        name: float(g.double().square().sum()) if g is not None else 0.0
        for name, g in zip(named, found, strict=True)
    }
    return Recorded(steps, squares)


def visit_products(step: Step, config: SparseConfig, visit: Visit) -> list[Site]:
    """Call ``visit(plan, node, arguments, result)`` for every product that ``config`` samples.

    Returns:
        The forward products of the graph, in order; none where no gradient reached it.

    Raises:
        DiagnosticsError: for a graph whose outputs can't be told apart.
    """
    if not step.tangents:
        return []
    joint = joint_graph(step.record)
    passes.canonicalize(joint)
    passes.find_sites(joint)
    passes.select_sites(joint, config=config)
    _Visitor(joint, visit).run(*_values(joint, step), enable_io_processing=False)
    plans = (plan_of(node) for node in joint.graph.nodes)
    return [plan.site for plan in plans if plan is not None and plan.site.role == "forward"]


def _values(joint: GraphModule, step: Step) -> list[Any]:
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    wanted = [node for node in placeholders if node.name.startswith("tangents")]
    tangents = list(_in_order(step, len(wanted)))
    values: list[Any] = []
    for order, node in enumerate(placeholders):
        if node.name.startswith("tangents"):
            values.append(tangents.pop(0))
        else:
            values.append(step.args[compat.input_position(node, order)])
    return values


def _in_order(step: Step, count: int) -> list[Tensor]:
    """Gradients of the outputs that can have one; zeros where none came."""
    floating = [
        (place, out)
        for place, out in enumerate(step.outputs)
        if isinstance(out, Tensor) and (place in step.tangents or out.is_floating_point())
    ]
    if len(floating) != count:
        floating = [(place, out) for place, out in floating if place in step.tangents]
    if len(floating) != count:
        raise DiagnosticsError(
            f"a graph of the model returns {len(floating)} values with a gradient where its "
            f"backward takes {count}: return each tensor once"
        )
    return [step.tangents.get(place, torch.zeros_like(out)) for place, out in floating]


class _Visitor(Interpreter):
    def __init__(self, gm: GraphModule, visit: Visit) -> None:
        super().__init__(gm)
        self.visit = visit

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        plan = plan_of(n)
        if plan is not None and plan.decision is not None and not plan.decision.dense:
            args, _ = self.fetch_args_kwargs_from_env(n)
            self.visit(plan, n, args, result)
        return result
