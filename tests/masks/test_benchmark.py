"""The benchmark of the solvers: it checks masks before it times, and writes what it printed."""

import importlib.util
import json
from types import ModuleType

import pytest
import torch

TINY = ["--sizes", "16", "--patterns", "2:4", "4:8", "--rounds", "2"]


@pytest.fixture(scope="module")
def bench(root) -> ModuleType:
    spec = importlib.util.spec_from_file_location("masks_bench", root / "benchmarks/masks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_tiny_run_prints_and_writes_every_solver(bench, tmp_path, capsys):
    path = tmp_path / "results" / "tiny.json"
    bench.main([*TINY, "--json", str(path)])
    written = json.loads(path.read_text())
    printed = capsys.readouterr().out
    methods = [row["method"] for row in written["rows"] if row["pattern"] == "4:8"]
    assert {"exact", "greedy", "entropic", "row-wise N:M", "linear program, HiGHS"} <= {*methods}
    assert len(written["rows"]) == 2 * len(methods)
    for row in written["rows"]:
        assert row["method"] in printed
        assert 0 < row["p20"] <= row["median"] <= row["p80"]
        assert 0.4 < row["retained"] < 1
        if row["method"].startswith(("exact", "linear", "min-cost")):
            assert row["of_best"] == pytest.approx(1)
    assert (written["torch"], written["threads"]) == (torch.__version__, torch.get_num_threads())


def test_nothing_is_timed_when_an_exact_mask_is_not_the_best(bench, monkeypatch):
    worst = {"exact": lambda w: bench.masks.transposable_mask(1 / w, 4, 8)}
    monkeypatch.setattr(bench, "whole", lambda *_: worst)
    monkeypatch.setattr(bench, "seconds", lambda _: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"exact at 4:8, N=16: tile \(0, 0\) keeps less than its"):
        bench.main(["--sizes", "16", "--patterns", "4:8"])


def test_other_ways_are_checked_too(bench, monkeypatch):
    monkeypatch.setattr(bench, "by_linear_program", lambda w, n: torch.eye(8, dtype=torch.bool))
    with pytest.raises(SystemExit, match=r"HiGHS at 4:8, N=8: tile \(0, 0\) holds 8 of the 32"):
        bench.main(["--sizes", "16", "--patterns", "4:8", "--rounds", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "1"], "--rounds 1: at least 2 are needed"),
        (["--patterns", "4:4"], "--patterns 4:4: write N:M, N kept of every M"),
        (["--sizes", "12", "--patterns", "4:8"], "--sizes 12: 4:8 needs a multiple of 8"),
    ],
)
def test_messages(bench, arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err
