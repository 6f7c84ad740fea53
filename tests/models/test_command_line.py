"""The command line on Hugging Face models: inputs by name, outputs in classes of their own."""

import json
import sys
import types

import pytest

from sparsefx.cli import main

INPUTS = {
    "gpt2-small": "input_ids=int64[2,9]:3..95",
    "resnet-small": "pixel_values=float32[4,3,24,24]:-1..1",
}


@pytest.mark.parametrize("name", INPUTS)
def test_explain_says_what_must_be_sparse(name, zoo, expected_products, monkeypatch, capsys):
    case, module = zoo(name), types.ModuleType("shelf")
    vars(module)["model"] = case.model
    monkeypatch.setitem(sys.modules, "shelf", module)
    words = ["explain", "shelf:model", "--input", INPUTS[name], "--config", "2:4", "--json"]
    assert main(words) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    for role, layers in expected_products(case, "2:4").items():
        assert sorted(s["layer"] for s in sites if s["role"] == role and s["decision"]) == layers


def test_bench_finds_the_loss_of_a_model_of_theirs(zoo, monkeypatch, capsys, tmp_path):
    case, module = zoo("gpt2-small"), types.ModuleType("shelf")
    vars(module)["model"] = case.model
    monkeypatch.setitem(sys.modules, "shelf", module)
    config = tmp_path / "c.json"
    config.write_text('{"codegen": "aot_eager", "rules": [{"match": "*.mlp.*"}]}')
    words = [
        "bench",
        "shelf:model",
        "--input",
        INPUTS["gpt2-small"],
        "--config",
        str(config),
        "--json",
    ]
    assert main([*words, "--rounds", "2", "--warmup", "1"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["products"]["sparse"] == 0
    assert data["products"]["all"] > 6
    assert data["dense"]["median_ms"] > 0
