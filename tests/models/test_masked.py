"""Hugging Face models that are masked already: one step by masked products equals eager's.

In float64, so that what differs is the order of summation alone; 1e-9 of the largest entry.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparsefx as sfx
from sparsefx import compat

CONFIG = sfx.SparseConfig(rules=[], codegen="aot_eager", strict=True, verify=True)


def _pruned(case: Any) -> list[str]:
    names = [
        name
        for name, module in case.model.named_modules()
        if (isinstance(module, nn.Linear | nn.Conv2d) or type(module).__name__ == "Conv1D")
        and name not in case.outputs
    ]
    for name in names:
        prune.random_unstructured(case.model.get_submodule(name), "weight", 0.5)
    return names


def _sparsified(case: Any) -> list[str]:
    sparsifier = sfx.sparsifiers.SRSTE(case.model, n=2, m=4)
    return list(sparsifier.layers)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("gpt2", _pruned),
        ("bert", _pruned),
        ("resnet", _pruned),
        ("gpt2", _sparsified),
        ("resnet", _sparsified),
    ],
)
def test_a_masked_model_takes_eagers_step(
    zoo: Callable[..., Any], run: Callable[..., Any], name: str, how: Callable[..., list[str]]
) -> None:
    case = zoo(name)
    masked = how(case)
    model = case.model.double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case.inputs.items()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    expected = run(model, model, inputs)
    model.load_state_dict(buffers, strict=False)
    compiled = torch.compile(model, backend="sparsefx", options={"config": CONFIG}, fullgraph=True)
    got = run(compiled, model, inputs)

    (record,) = compat.wrapper_of(compiled)._sparsefx
    served = {p.site.layer for p in record.outcome.plans if p.site.mask and not p.decision.dense}
    assert served == set(masked)
    assert got.tensors.keys() == expected.tensors.keys()
    for key, value in expected.tensors.items():
        bound = 1e-9 * max(1.0, value.abs().max().item())
        assert (got.tensors[key] - value).abs().max().item() <= bound, key
