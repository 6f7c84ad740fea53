"""Write a pass, test it alone, plug it in.

    python examples/03_own_pass.py

The pass clips the gradients of weights, entry by entry, where the product that computes them was
sampled. It stands in the backward graph, so no hook and no change to the model is needed.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import sparsefx as sfx
from sparsefx.passes import rewrite_sampled
from sparsefx.rewriting import PassResult, finish, plan_of, wrap
from sparsefx.testing import run_pass, traced

LIMIT = 1e-3
clamp = torch.ops.aten.clamp.default

# --- 1. the pass: what it looks at, what it leaves alone and why, what it puts in


def clip_gradients(gm: GraphModule) -> PassResult:
    """Weight gradient dw = sampled(...)  ->  clamp(dw, -LIMIT, LIMIT)."""
    result = PassResult(gm)
    for node in list(gm.graph.nodes):
        plan = plan_of(node)  # what the products are: layer, role, shape, decision
        if plan is None or plan.decision is None or plan.site.role != "grad_weight":
            continue
        if plan.decision.dense:
            result.skipped[node.name] = f"{plan.site.layer}: {plan.decision.reason}"
        elif not any(user.target is clamp for user in node.users):  # a second run does nothing
            wrap(node, lambda add, dw=node: add(clamp, dw, -LIMIT, LIMIT))
            result.modified = True
    if result.modified:
        finish(gm)
    return result


# --- 2. its tests: the smallest graph, what changed, what didn't, why not


def gradient(x: Tensor, grad: Tensor) -> Tensor:
    return x.t() @ grad


def test_it_clips_once():
    x, grad = torch.randn(8, 5), torch.randn(8, 3)
    gm = traced(gradient, x, grad, plan=sfx.Sampled(0.5), role="grad_weight")
    run_pass(rewrite_sampled, gm)
    sampled = gm(x, grad)
    run = run_pass(clip_gradients, gm)  # also checks the graph that the pass leaves
    assert run.modified
    assert "clamp(" in run.text
    torch.testing.assert_close(gm(x, grad), sampled.clamp(-LIMIT, LIMIT))
    assert not run_pass(clip_gradients, gm).modified
    return run


def test_it_says_why_not():
    gm = traced(
        gradient, torch.randn(8, 5), torch.randn(8, 3), plan=sfx.Dense(), role="grad_weight"
    )
    run = run_pass(clip_gradients, gm)
    assert not run.modified
    assert len(run.skipped) == 1
    return run


# --- 3. plugged in: it runs after sparsefx's own rewrites


class Net(nn.Module):
    """An MLP."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


def largest_gradients(model: nn.Module, x: Tensor, config: sfx.SparseConfig) -> dict[str, float]:
    model.zero_grad()
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    compiled(x).square().mean().backward()
    named = model.named_parameters()
    return {name: p.grad.abs().max().item() for name, p in named if name.endswith("weight")}


def main() -> None:
    torch.manual_seed(0)
    print("What the pass does to the smallest graph:\n")
    print(test_it_clips_once().diff)
    test_it_says_why_not()

    model, x = Net(), torch.randn(16, 32)
    rules = [sfx.Rule("fc*", grad_weight=sfx.Sampled(0.5))]
    plain = sfx.SparseConfig(rules=rules, codegen="aot_eager")
    own = dataclasses.replace(plain, passes=[clip_gradients], verify=True)

    print(f"\nThe largest gradient of each weight, as it is and clipped at {LIMIT:g}:\n")
    before, after = (largest_gradients(model, x, config) for config in (plain, own))
    for name in before:
        print(f"  {name:<11} {before[name]:.5f}  {after[name]:.5f}")
    print("\n  out.weight's product is dense (keep_output_dense), so the pass leaves it alone.")

    print("\nThe report counts it among the passes:\n")
    report = sfx.explain(model, config=own)(x)
    print(" ", " > ".join(name for name, _ in report.stages[0]))


if __name__ == "__main__":
    main()
