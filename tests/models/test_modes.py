"""The same models under autocast, with a dynamic batch, in inference, and through Inductor."""

import dataclasses
import json
from typing import Any

import pytest
import torch

from sparsefx import compat
from sparsefx.config import SparseConfig
from sparsefx.config import preset as preset_of

THREE = ["gpt2", "vit", "resnet"]


def _deterministic(preset: str) -> SparseConfig:
    """A preset with top-k for its random draws, so that its products can be computed by hand."""
    text = json.dumps(preset_of(preset).to_dict()).replace('"systematic"', '"topk"')
    return SparseConfig.from_dict(json.loads(text))


def _compile(model: torch.nn.Module, preset: str, codegen: str = "aot_eager", **more: Any) -> Any:
    config = dataclasses.replace(_deterministic(preset), codegen=codegen, strict=True)
    options = {"config": config}
    return torch.compile(model, backend="sparsefx", options=options, fullgraph=True, **more)


def _records(compiled: Any) -> Any:
    return compat.wrapper_of(compiled)._sparsefx


def _sparse_by_role(compiled: Any) -> dict[str, list[str]]:
    (record,) = _records(compiled)  # one compile of one graph
    assert record.outcome.failures == []
    found: dict[str, list[str]] = {"forward": [], "grad_input": [], "grad_weight": []}
    for plan in record.outcome.plans:
        if (plan.site.group, plan.site.role) in record.outcome.ops:
            found[plan.site.role].append(plan.site.layer)
    return {role: sorted(names) for role, names in found.items()}


def _errors(found: Any, wanted: Any) -> dict[str, float]:
    """Largest difference by name, as a share of the largest entry; gradients share one scale."""
    assert found.tensors.keys() == wanted.tensors.keys()
    gradients = [t.abs().max() for k, t in wanted.tensors.items() if k.startswith("gradient")]
    errors = {}
    for name, value in wanted.tensors.items():
        scale = max(gradients) if name.startswith("gradient") else value.abs().max()
        error = (found.tensors[name].double() - value.double()).abs().max()
        errors[name] = (error / scale.double()).item()
    return errors


@pytest.mark.parametrize("name", THREE)
def test_autocast(
    name: str, zoo: Any, run: Any, eager_reference: Any, expected_products: Any
) -> None:
    """bfloat16 products, float32 parameters: as close to float64 as the eager reference is.

    Plain 2:4, whose mask has a rule for the many ties of bfloat16 weights.
    """
    case = zoo(name)
    exact = eager_reference(case.to(torch.float64), "2:4")
    compiled = _compile(case.model, "2:4")
    with torch.autocast("cpu", torch.bfloat16):
        low = eager_reference(case, "2:4")
        found = run(compiled, case.model, case.inputs)
    assert _sparse_by_role(compiled) == expected_products(case, "2:4")
    (record,) = _records(compiled)
    sparse = [p.site for p in record.outcome.plans if not p.decision.dense]
    assert {site.dtype for site in sparse} == {"bfloat16"}
    ours, theirs = _errors(found, exact), _errors(low, exact)
    eps = torch.finfo(torch.bfloat16).eps
    for tensor, error in ours.items():
        assert error <= 4 * theirs[tensor] + 4 * eps, tensor
    assert sum(ours.values()) <= 2 * sum(theirs.values())


@pytest.mark.parametrize(("name", "preset"), [("gpt2", "all-three"), ("resnet", "all-three")])
def test_dynamic_batch(
    name: str, preset: str, zoo: Any, run: Any, eager_reference: Any, expected_products: Any
) -> None:
    """Two batch sizes, one compile: k follows the batch where the batch is what is sampled.

    Of 7 and 10 examples 2 and 3 are sampled: like any size, a k of 1 gets a graph of its own.
    """
    case = zoo(name).to(torch.float64)
    compiled = _compile(case.model, preset, dynamic=True)
    for batch in (7, 10):
        inputs = case.of_size(batch)
        wanted = eager_reference(case, preset, inputs)  # first: a run moves BatchNorm's buffers
        errors = _errors(run(compiled, case.model, inputs), wanted)
        assert max(errors.values()) <= 1e-9, (batch, errors)
    assert _sparse_by_role(compiled) == expected_products(case, preset)


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_inference(
    name: str, zoo: Any, run: Any, eager_reference: Any, expected_products: Any
) -> None:
    """Without gradients N:M still masks, and sampling is exact."""
    case = zoo(name).to(torch.float64)
    case.model.eval()
    masked = _compile(case.model, "2:4-transposable")
    sampled = _compile(case.model, "sampled-0.3")
    with torch.no_grad():
        errors = _errors(
            run(masked, case.model, case.inputs), eager_reference(case, "2:4-transposable")
        )
        dense = run(case.model, case.model, case.inputs)
        exact = _errors(run(sampled, case.model, case.inputs), dense)
    assert max(errors.values()) <= 1e-9, errors
    assert max(exact.values()) <= 1e-12, exact
    forward = expected_products(case, "2:4-transposable")["forward"]
    assert _sparse_by_role(masked) == {"forward": forward, "grad_input": [], "grad_weight": []}
    assert _sparse_by_role(sampled)["forward"] == []
    (record,) = _records(sampled)
    reasons = {p.decision.reason for p in record.outcome.plans if p.site.layer in forward}
    assert reasons == {"inference graph: exact unless Sampled(inference=True)"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "preset"), [("gpt2-small", "all-three")])
def test_inductor_agrees_with_aot_eager(name: str, preset: str, zoo: Any, run: Any) -> None:
    """Compiled for real: the same numbers as the same graphs run operator by operator."""
    case, twin = zoo(name).to(torch.float64), zoo(name).to(torch.float64)
    compiled = _compile(case.model, preset, codegen="inductor")
    plain = _compile(twin.model, preset)
    errors = _errors(run(compiled, case.model, case.inputs), run(plain, twin.model, twin.inputs))
    assert max(errors.values()) <= 1e-9, errors
    assert _sparse_by_role(compiled) == _sparse_by_role(plain)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mixtral", "grouped product"),
        ("mixtral-batched", "both operands are activations: N:M needs a weight"),
    ],
)
def test_experts_stay_dense_with_a_reason(
    name: str, reason: str, zoo: Any, run: Any, eager_reference: Any
) -> None:
    """Mixtral's own choice (grouped products) and the documented other one that is one graph.

    ``experts_implementation="eager"`` loops over the experts that were hit: many graphs.
    """
    case = zoo(name).to(torch.float64)
    compiled = _compile(case.model, "2:4-transposable")
    found = run(compiled, case.model, case.inputs)
    (record,) = _records(compiled)
    experts = [p for p in record.outcome.plans if p.site.layer.endswith("mlp.experts")]
    roles = [plan.site.role for plan in experts]
    assert [roles.count(r) for r in ("forward", "grad_input", "grad_weight")] == [4, 4, 4]
    assert all(p.decision.dense and p.decision.reason for p in experts)
    forward = [p.decision.reason for p in experts if p.site.role == "forward"]
    assert all(why.startswith(reason) for why in forward), forward
    errors = _errors(found, eager_reference(case, "2:4-transposable"))
    assert max(errors.values()) <= 1e-6, errors  # float32 inside: softmax, RMSNorm


def test_products_inside_attention_stay_dense_with_a_reason(zoo: Any, run: Any) -> None:
    """T5 learns its attention bias, for which this device takes attention apart; others don't."""
    case = zoo("t5")
    report = _compile(case.model, "sampled-0.3")
    run(report, case.model, case.inputs)
    (record,) = _records(report)
    inside = [p for p in record.outcome.plans if p.site.kind == "bmm"]
    assert {p.site.layer for p in inside} == {
        "encoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
    }
    assert {p.decision.reason for p in inside} == {
        "part of scaled_dot_product_attention, which other devices fuse"
    }
