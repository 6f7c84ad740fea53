"""The benchmark of masks that keep little runs, checks values, and counts what is multiplied."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

TINY = ["--codegen", "aot_eager", "--rounds", "2", "--batches", "8", "--sizes", "256", "256"]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks/high_sparsity.py"
    spec = importlib.util.spec_from_file_location("benchmark_high_sparsity", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run(benchmark, tmp_path, capsys):
    path = tmp_path / "tiny.json"
    rows = benchmark.main([*TINY, "--densities", "0.1", "--json", str(path)])
    assert [row.macs for row in rows] == [1, 1, pytest.approx((2 + 3 * 0.1) / 5)]
    printed, written = capsys.readouterr().out, json.loads(path.read_text())
    for row in written["rows"]:
        assert row["method"] in printed
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
    assert [row["method"] for row in written["upkeep"]] == ["SET", "RigL"]
    assert all(row["round"] > 0 for row in written["upkeep"])


def test_other_values_are_not_timed(benchmark):
    models = [benchmark.mlp(8, 8) for _ in range(2)]
    for model in models:
        (model(benchmark.torch.ones(2, 8)) * 0).sum().backward()
    models[1][0].weight.grad += 1
    results = zip(("masked, torch.compile", "masked, sparsefx"), models, strict=True)
    one = benchmark.torch.ones(())
    with pytest.raises(SystemExit, match=r"masked, sparsefx: off by .* \(allowed: 1e-4\)"):
        benchmark.check({name: (lambda: one, model, 1.0) for name, model in results})


def test_one_round_is_too_few(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--rounds", "1"])
    assert "--rounds 1: at least 2 are needed" in capsys.readouterr().err
