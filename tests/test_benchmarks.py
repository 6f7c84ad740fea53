"""The benchmark runs, checks values before it times, and writes what it printed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parent
TINY = ["--codegen", "aot_eager", "--rounds", "2", "--sizes", "40", "--ratios", "0.3"]


@pytest.fixture(scope="module")
def linear() -> ModuleType:
    spec = importlib.util.spec_from_file_location("linear", HERE.parent / "benchmarks/linear.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_prints_and_writes_every_contestant(linear, tmp_path, capsys):
    path = tmp_path / "results" / "tiny.json"
    linear.main([*TINY, "--json", str(path)])
    written = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert len(written["rows"]) == 4
    for row in written["rows"]:
        assert row["method"] in printed
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
    assert [row["ideal"] for row in written["rows"]] == pytest.approx(
        [1, 1 / 0.3, 3 / 1.6, 1 / 0.3]
    )
    assert written["rows"][0]["speedup"] == 1
    assert 0.3 < written["rows"][1]["kept"] < 1
    assert (written["torch"], written["threads"]) == (torch.__version__, torch.get_num_threads())


def test_the_layer_by_hand_is_exact_when_it_keeps_everything(linear):
    layer, x, grad = torch.nn.Linear(24, 17), torch.randn(9, 24), torch.randn(9, 17)
    by_hand = linear.copy_of(layer, linear.ByHand)
    by_hand.k = 24
    for found, expected in zip(
        linear.gradients(by_hand, x, grad), linear.gradients(layer, x, grad), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_nothing_is_timed_when_values_are_wrong(linear, monkeypatch):
    monkeypatch.setattr(linear, "sampled_product", lambda a, b, k: torch.zeros(len(a), b.shape[1]))
    monkeypatch.setattr(linear, "race", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"backward sampled, N=40, ratio=0.3: grad_input is off"):
        linear.main(TINY)


def test_permutation_keeps_more_and_says_how_much(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("perm", HERE.parent / "benchmarks/permutation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["perm"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    path = tmp_path / "perm.json"
    module.main(["--sizes", "32", "--patterns", "2:4", "3:8", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["weights"], row["pattern"]) for row in rows] == [
        ("normal", "2:4"),
        ("scaled", "2:4"),
        ("normal", "3:8"),
        ("scaled", "3:8"),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert row["before"] < row["after"] < 1
        assert f"{100 * row['after']:.2f}%" in printed
