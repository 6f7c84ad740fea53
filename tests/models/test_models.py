"""Hugging Face models as they come: one graph, the expected sparse products, the right numbers.

Numbers are compared with the eager reference of conftest.py twice. In float64, where the bound is
the rounding of another order of summation: 1e-9 of the largest entry, or 1e-6 where the model
itself computes in float32 inside (softmax, RMSNorm). Sampled ones in float32 too, where the bound
is derived: four times what the reference loses in float32 against its own float64 twin, plus a few
roundings of the largest value. Both need the same sampled sets in both precisions, which is
asserted first.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

import sparsefx
from sparsefx import compat, ops
from sparsefx.config import preset as preset_of
from sparsefx.plan import Plan
from sparsefx.rewriting import PassResult

MODELS = ["gpt2", "bert", "llama", "vit", "resnet", "convnext", "t5", "mixtral"]
CALCULATES_IN_FLOAT32 = {"llama", "t5", "mixtral"}
TRIED = [
    *((model, "sampled-0.3") for model in MODELS),
    *((model, "2:4-transposable") for model in ("gpt2", "llama", "resnet", "mixtral")),
    *(
        (model, preset)
        for model in ("gpt2", "resnet")
        for preset in ("2:4", "4:8-transposable", "sampled-backward-0.3", "all-three")
    ),
    ("gpt2-eager-attention", "all-three"),
]


def _deterministic(preset: str) -> sparsefx.SparseConfig:
    """A preset with top-k for its random draws, so that its products can be computed by hand."""
    text = json.dumps(preset_of(preset).to_dict()).replace('"systematic"', '"topk"')
    return sparsefx.SparseConfig.from_dict(json.loads(text))


def _config(preset: str, **more: Any) -> sparsefx.SparseConfig:
    return dataclasses.replace(_deterministic(preset), codegen="aot_eager", strict=True, **more)


def _compile(model: torch.nn.Module, preset: str, **more: Any) -> Any:
    counted: list[Counter[str]] = []

    def count(gm: GraphModule) -> PassResult:
        names = [node.target.name() for node in gm.graph.nodes if ops.is_sparse_op(node.target)]
        counted.append(Counter(names))
        return PassResult(gm)

    config = _config(preset, passes=(count,), verify=True)
    compiled = torch.compile(
        model, backend="sparsefx", options={"config": config}, fullgraph=True, **more
    )
    return compiled, counted


def _plans(compiled: Any) -> list[Plan]:
    (record,) = compat.wrapper_of(compiled)._sparsefx  # one graph
    assert record.outcome.failures == []
    return record.outcome.plans


def _sparse_products(compiled: Any) -> dict[str, list[str]]:
    plans = _plans(compiled)
    (record,) = compat.wrapper_of(compiled)._sparsefx
    found: dict[str, list[str]] = {"forward": [], "grad_input": [], "grad_weight": []}
    for plan in plans:
        site = plan.site
        assert ((site.group, site.role) in record.outcome.ops) == (not plan.decision.dense)
        assert plan.decision.dense == bool(plan.decision.reason)
        if not plan.decision.dense:
            found[site.role].append(site.layer)
    return {role: sorted(names) for role, names in found.items()}


_NO_PRODUCTS = {
    "nm_mask", "topk_mm_indices", "topk_conv_indices", "gather_columns", "gather_channels",
    "conv_grad_input", "conv_grad_weight",
}  # fmt: skip


def _largest(tensors: dict[str, torch.Tensor]) -> float:
    gradients = [t.abs().max().item() for k, t in tensors.items() if k.startswith("gradient")]
    return max(gradients, default=0.0)


def _assert_equal(found: Any, wanted: Any, *, share: float) -> None:
    assert found.tensors.keys() == wanted.tensors.keys()
    gradients = _largest(wanted.tensors)
    for name, value in wanted.tensors.items():
        # a gradient that vanishes (of a key's bias) is noise of the others' size
        scale = gradients if name.startswith("gradient") else value.abs().max().item()
        error = (found.tensors[name].double() - value.double()).abs().max().item()
        assert error <= share * scale, f"{name}: {error:.2e} of {scale:.2e}"


def _assert_close(found: Any, low: Any, high: Any, eps: float) -> None:
    """Within four times what the reference itself loses, and 64 roundings."""
    assert len(low.choices) == len(high.choices)
    assert all((a == b).all() for a, b in zip(low.choices, high.choices, strict=True))
    assert found.tensors.keys() == low.tensors.keys()
    gradients = _largest(high.tensors)
    for name, value in high.tensors.items():
        lost = (low.tensors[name].double() - value).abs().max().item()
        scale = gradients if name.startswith("gradient") else value.abs().max().item()
        error = (found.tensors[name].double() - value).abs().max().item()
        allowed = 4 * lost + 64 * eps * scale
        assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize(("name", "preset"), TRIED)
def test_equals_an_eager_reference(
    name: str,
    preset: str,
    zoo: Callable[..., Any],
    run: Callable[..., Any],
    eager_reference: Callable[..., Any],
    expected_products: Callable[..., Any],
) -> None:
    single = zoo(name)
    double = single.to(torch.float64)
    wanted = eager_reference(double, preset)
    compiled, counted = _compile(double.model, preset)
    found = run(compiled, double.model, double.inputs)
    products = expected_products(double, preset)
    assert sum(map(len, products.values())) > 0
    assert _sparse_products(compiled) == products
    in_graph = {op: n for op, n in counted[0].items() if op.partition("::")[2] not in _NO_PRODUCTS}
    assert sum(in_graph.values()) == sum(map(len, products.values()))
    names = {name for role in products.values() for name in role} - set(double.matmuls)
    assert names <= set(wanted.called)
    assert len(wanted.called) == len(set(wanted.called))
    _assert_equal(found, wanted, share=1e-6 if name in CALCULATES_IN_FLOAT32 else 1e-9)
    if preset == "sampled-0.3":  # masks are chosen alike in every precision
        low = eager_reference(single, preset)
        compiled, _ = _compile(single.model, preset)
        in_single = run(compiled, single.model, single.inputs)
        _assert_close(in_single, low, wanted, torch.finfo(torch.float32).eps)
