"""The command line on Hugging Face models: inputs by name, outputs in classes of their own."""

import json
import sys
import types

import torch

from sparsefx.cli import main
from sparsefx.cli.bench import loss_of


def test_explain_says_what_must_be_sparse(zoo, expected_products, monkeypatch, capsys):
    case, module = zoo("gpt2-small"), types.ModuleType("shelf")
    vars(module)["model"] = case.model
    monkeypatch.setitem(sys.modules, "shelf", module)
    words = ["explain", "shelf:model", "--input", "input_ids=int64[2,9]:3..95", "--config", "2:4"]
    assert main([*words, "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    for role, layers in expected_products(case, "2:4").items():
        assert sorted(s["layer"] for s in sites if s["role"] == role and s["decision"]) == layers


def test_bench_finds_the_loss_in_their_outputs(zoo):
    for name in ("gpt2-small", "resnet-small"):
        case = zoo(name)
        outputs = case.model(**case.inputs)
        loss = loss_of(outputs)
        torch.testing.assert_close(loss, outputs.logits.float().sum())
        loss.backward()
        assert all(p.grad is not None for p in case.model.parameters())
