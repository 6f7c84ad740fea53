"""With Inductor, the default: three steps of training equal those without it."""

import copy
from dataclasses import replace

import torch

from sparsefx import NM, Rule, Sampled, SparseConfig

# by top-k: Inductor's random numbers are not eager mode's
ALL_THREE = SparseConfig([Rule("*", NM(2, 4, transposable=True), grad_weight=Sampled(0.3))])


def steps(model, config, batches):
    """Train on the batches; return losses, gradients and weights."""
    compiled = torch.compile(
        model, backend="sparsefx", options={"config": config}, dynamic=len({*map(len, batches)}) > 1
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = {}
    for i, x in enumerate(batches):
        optimizer.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        found |= {f"{i} {name}": p.grad.clone() for name, p in model.named_parameters()}
        found[f"{i} loss"] = loss.detach()
        optimizer.step()
    return found | {name: p.detach() for name, p in model.named_parameters()}, compiled


def test_three_steps(kit):
    model = kit.CNN().double()
    batches = [torch.randn(6, 4, 6, 6, dtype=torch.float64) for _ in range(3)]
    wanted, _ = steps(copy.deepcopy(model), replace(ALL_THREE, codegen="aot_eager"), batches)
    got, compiled = steps(model, ALL_THREE, batches)
    kit.same(got, wanted, rtol=1e-9, atol=1e-11)
    assert {layer for layer, _ in kit.sparse(compiled)} == {"first", "second"}


def test_dynamic_batches(kit):
    config = SparseConfig(
        rules=[Rule("*", forward=Sampled(0.4), grad_weight=Sampled(0.5, min_k=2))]
    )
    model = kit.MLP().double()
    batches = [torch.randn(n, 16, dtype=torch.float64) for n in (5, 9, 30)]
    wanted, _ = steps(copy.deepcopy(model), replace(config, codegen="aot_eager"), batches)
    got, compiled = steps(model, config, batches)
    kit.same(got, wanted, rtol=1e-9, atol=1e-11)
    assert len(kit.records(compiled)) == 1
