"""Real models under every estimator: one graph, exact where it should be, right on average."""

from typing import Any

import pytest
import torch

import sparsefx as sfx

PAIRS = [
    ("resnet", "systematic"), ("bert", "bernoulli"),
]  # fmt: skip


def compiled(case: Any, rule: sfx.Rule) -> Any:
    torch._dynamo.reset()
    config = sfx.SparseConfig([rule], codegen="aot_eager", strict=True)
    return torch.compile(case.model, backend="sparsefx", options={"config": config}, fullgraph=True)


@pytest.mark.parametrize(("name", "estimator"), PAIRS)
def test_gradients_are_finite_near_and_of_the_rule_alone(
    name: str, estimator: str, zoo: Any, run: Any
) -> None:
    case = zoo(name)
    exact = run(case.model, case.model, case.inputs).tensors
    pattern = sfx.Sampled(0.5, estimator=estimator)
    model = compiled(case, sfx.Rule("*", grad_input=pattern, grad_weight=pattern))
    torch.manual_seed(0)
    found = run(model, case.model, case.inputs).tensors
    torch.testing.assert_close(found["logits"], exact["logits"], rtol=1e-4, atol=1e-4)
    assert found.keys() == exact.keys()
    assert all(torch.isfinite(value).all() for value in found.values())
    report = sfx.explain(model)
    sampled = [row for row in report.sites if row.decision is not None]
    assert {row.role for row in sampled} == {"grad_input", "grad_weight"}
    assert all(row.flops_executed < row.flops_dense for row in sampled if estimator != "bernoulli")
    # a sampled weight's gradient has changed, the output layer's has not
    weights = {row.weight for row in sampled if row.role == "grad_weight" and row.weight}
    changed = [
        name for name in weights
        if not torch.allclose(found[f"gradient of {name}"], exact[f"gradient of {name}"])
    ]  # fmt: skip
    assert len(changed) >= 0.9 * len(weights) > 0


@pytest.mark.parametrize("name", ["resnet"])
def test_all_pairs_are_exact(name: str, zoo: Any, run: Any) -> None:
    case = zoo(name)
    exact = run(case.model, case.model, case.inputs).tensors
    pattern = sfx.Sampled(1.0, estimator="systematic")
    rule = sfx.Rule("*", forward=pattern, grad_input=pattern, grad_weight=pattern)
    found = run(compiled(case, rule), case.model, case.inputs).tensors
    for key, value in exact.items():
        if key.startswith("buffer"):
            continue  # a second run moved them on
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("scores", ["input"])
def test_weight_gradients_are_right_on_average(scores: str, zoo: Any, run: Any) -> None:
    """Only grad_weight is sampled, so each weight's gradient is unbiased by itself."""
    case, draws = zoo("gpt2"), 40
    exact = run(case.model, case.model, case.inputs).tensors
    model = compiled(
        case, sfx.Rule("*", grad_weight=sfx.Sampled(0.4, estimator="systematic", scores=scores))
    )
    keys = [key for key in exact if key.startswith("gradient") and exact[key].dim() == 2]
    total = {key: [] for key in keys}
    torch.manual_seed(0)
    for _ in range(draws):
        found = run(model, case.model, case.inputs).tensors
        for key in keys:
            off = (found[key] - exact[key]).double().flatten()
            total[key].append(off)
    noisy = 0
    for key in keys:
        off = torch.stack(total[key])
        if float(off.norm()) <= 1e-3 * float(exact[key].norm()):
            continue  # embeddings: not products
        noisy += 1
        error = off.mean(0).norm() / (off.std(0).norm() / draws**0.5)
        assert float(error) < 1.7, key  # 1 for a mean of zero, sqrt(draws) for a bias
    assert noisy >= 4
