"""Rows for a CUDA device: every step on the CPU with tiny sizes, and how they end."""

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[1]
HERE = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """The scripts import each other as files of one folder."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))
    for name in [n for n, m in sys.modules.items() if str(HERE) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def script(name: str) -> ModuleType:
    return __import__(name)


ROWS = [
    ("lin24", "lin24_fwd", "sparsefx 2:4"),
    ("lin24", "lin24_train", "sparsefx 2:4"),
    ("block24", "vit_block24", "sparsefx 2:4"),
    ("device_masks", "mask_compress", "sparsefx, masked copy"),
    ("device_masks", "tmask_2_4_exact", "sparsefx op, exact"),
    ("device_masks", "tmask_nm", "entropic"),
    ("device_sampled", "crs_fwd", "sparsefx, forward sampled"),
    ("device_sampled", "crs_wgrad_train", "sparsefx, grad_weight sampled"),
    ("device_sampled", "gather_gemm", "sampled_mm_weight"),
    ("device_nm", "nm_decode", "nm_packed_mm"),
    ("device_nm", "masked_gemm", "sparsefx nm_mm"),
]


@pytest.mark.parametrize(("name", "row", "ours"), ROWS)
def test_a_dry_run_takes_every_step_of_a_row(name, row, ours, tmp_path, capsys):
    path = tmp_path / "row.json"
    module = script(name)
    script("gpu").main(module.ROWS, module.__doc__, [row, "--dry-run", "--json", str(path)])
    found = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert found["device"] == "cpu"
    assert found["commit"]
    assert found["dry_run"]
    assert found["replaced"]
    for block in found["cases"]:
        assert min(one["speedup"] for one in block["rows"] if one["dense"]) <= 1
        assert all(0 < one["p20"] <= one["median"] <= one["p80"] for one in block["rows"])
    first = {one["method"]: one for one in found["cases"][0]["rows"]}
    assert first[ours]["ours"]
    assert ours in printed
    assert "dry run: sizes are tiny" in printed
    assert all(one["rounding"] < 1e-2 for one in first.values() if one["rounding"] is not None)


def test_every_device_row_is_run_by_its_name():
    rows = {name: row for name, rows in script("run").ROWS.items() for row in rows if row.share}
    assert sorted(rows) == sorted(row for _, row, _ in ROWS)
    for name, row, _ in ROWS:
        assert (rows[row].script, rows[row].arguments) == (f"{name}.py", (row,))


def field(**extra):
    parts = script("cases")
    x = torch.ones(4)
    work = partial(torch.add, x, x)
    dense = parts.Contestant("dense", work, dense=True)
    return parts.Field([dense, parts.Contestant("mine", work, ours=True)], **extra)


def dry(**changes):
    parts = script("cases")
    return parts.Setting("cpu", **{"dry": True, "rounds": 2, **changes})


def test_goals_are_told_as_met_or_missed():
    gpu, parts = script("gpu"), script("cases")
    rows = [
        {"method": "dense", "dense": True, "median": 3.0},
        {"method": "slow dense", "dense": True, "median": 9.0},
        {"method": "peer", "dense": False, "median": 1.0},
        {"method": "mine", "dense": False, "median": 2.0},
    ]
    goals = [
        parts.Goal("mine", 1.5),
        parts.Goal("mine", 0.9, "peer"),
        parts.Goal("mine", at_most=2.5),
        parts.Goal("mine", at_most=1.5),
        parts.Goal("mine", 1.0, "not there"),
    ]
    found = [gpu.reached(goal, rows) for goal in goals]
    assert found.pop() is None
    assert [gpu.told(goal) for goal in found] == [
        "mine: 1.50 x dense, goal 1.5: met",
        "mine: 0.50 x peer, goal 0.9: MISSED",
        "mine: 2.000 ms, goal 2.5 ms: met",
        "mine: 2.000 ms, goal 1.5 ms: MISSED",
    ]


def test_a_row_stops_at_its_share_and_says_what_it_left_out():
    gpu, parts = script("gpu"), script("cases")
    cases = [parts.Case(name, lambda s: field()) for name in ("first", "second", "third")]
    found = gpu.run_row("row", cases, dry(seconds=0.0))
    assert [block["case"] for block in found["cases"]] == ["first"]
    assert found["left_out"] == ["second", "third"]


def test_quick_takes_half_the_cases(tmp_path):
    gpu, parts = script("gpu"), script("cases")
    cases = [parts.Case(name, lambda s: field()) for name in ("first", "second", "third")]
    arguments = ["row", "--dry-run", "--quick"]
    found = gpu.main({"row": lambda s: cases}, "rows", arguments)
    assert [block["case"] for block in found["cases"]] == ["first", "second"]
    assert found["left_out"] == ["third (--quick)"]


def test_a_case_that_fails_ends_the_row_with_the_others_measured(tmp_path, capsys):
    gpu, parts = script("gpu"), script("cases")

    def broken(s):
        raise RuntimeError("device said no\nand more")

    path = tmp_path / "row.json"
    cases = [parts.Case("bad", broken), parts.Case("good", lambda s: field())]
    with pytest.raises(SystemExit, match="row: failed: bad"):
        gpu.main({"row": lambda s: cases}, "rows", ["row", "--dry-run", "--json", str(path)])
    blocks = json.loads(path.read_text())["cases"]
    assert blocks[0]["notes"] == ["FAILED: RuntimeError: device said no"]
    assert len(blocks[1]["rows"]) == 2
    assert "FAILED: RuntimeError: device said no" in capsys.readouterr().out


def test_wrong_values_are_not_timed_and_ours_end_the_row():
    parts = script("cases")
    x = torch.randn(4, 4)
    notes: list[str] = []
    peer, mine = (parts.Contestant(name, x.clone, ours=name == "mine") for name in ("peer", "mine"))
    assert not parts.judged(peer, 1.1 * x, x.double(), x.double(), 4, notes)
    assert "peer: off by 1.00e-01" in notes[0]
    with pytest.raises(SystemExit, match=r"mine: off by 1.00e-01 .* nothing is timed"):
        parts.judged(mine, 1.1 * x, x.double(), x.double(), 4, notes)
    assert parts.judged(mine, x, x.double(), 2 * x.double(), 4, notes)
    assert (mine.rounding, mine.error) == (0, pytest.approx(0.5))


def test_a_peer_that_refuses_is_named_and_ours_may_not():
    parts = script("cases")

    def refuses():
        raise RuntimeError("shape not supported\nmore")

    notes: list[str] = []
    peer, mine = (parts.Contestant(name, refuses, ours=name == "mine") for name in ("peer", "mine"))
    assert parts.tried(peer, refuses, notes) is None
    assert notes == ["peer: refused: shape not supported"]
    with pytest.raises(RuntimeError, match="shape not supported"):
        parts.tried(mine, refuses, notes)


def test_the_fastest_algorithm_is_one_whose_values_are_right():
    parts = script("cases")

    def mm(packed, x, algorithm):
        if algorithm == 2:
            raise RuntimeError("no such algorithm")
        return x @ packed.t() * (1.5 if algorithm == 0 else 1)

    w, x = torch.randn(8, 8), torch.randn(8, 8)
    twin = parts.product64(x, w)
    assert parts.best_algorithm(parts.Vendor(torch.clone, mm, 3), w, x, twin) == (1, 2)


def test_what_no_graph_takes_is_told(monkeypatch):
    gpu = script("gpu")

    def refuses(work, s):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "replayed", refuses)
    made = field(few_rows=True)
    made.contestants[1].graph = True
    rows = gpu.timed_field(made, dry())
    assert [row["method"] for row in rows] == ["dense", "mine"]
    assert made.notes == ["mine: no CUDA graph: operation not permitted when stream is capturing"]
    assert all(row["warm"] > 0 for row in rows)


def test_slow_contestants_run_fewer_rounds(monkeypatch):
    gpu = script("gpu")
    ticks = iter([0.0, 2.0, 0.0, 0.001])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(ticks))
    slow = dry(dry=False, seconds=60.0, rounds=20)
    assert gpu.rounds_within([lambda: None], slow) == 10
    assert gpu.rounds_within([lambda: None], slow) == 20


def test_without_a_device_only_a_dry_run_makes_sense(monkeypatch):
    gpu = script("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="row needs a CUDA device, and torch sees none"):
        gpu.main({"row": list}, "rows", ["row"])
    with pytest.raises(SystemExit, match="row is for a CUDA device; on a CPU only --dry-run"):
        gpu.main({"row": list}, "rows", ["row", "--device", "cpu"])


# --- run.py


@pytest.fixture
def run(monkeypatch):
    """run.py on a machine with a device; what it starts is noted and not run."""
    module = script("run")
    module.started = []
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)

    def start(command, timeout=None, **_):
        module.started.append(command[2:])
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(module.subprocess, "run", start)
    return module


def test_rows_of_a_device_share_the_time(run):
    assert run.main(["all", "--device", "cuda", "--seconds", "500", "--tested"]) == 0
    seconds = [float(c[c.index("--seconds") + 1]) for c in run.started]
    assert len(seconds) == len(ROWS)
    assert sum(seconds) + len(ROWS) * run.START == pytest.approx(500, abs=len(ROWS))
    assert run.started[0][-2:] == ["--seconds", f"{seconds[0]:.0f}"]
    assert any("results/lin24-fwd-cuda.json" in part for c in run.started for part in c)


def test_a_row_that_outstays_all_time_is_stopped_and_the_next_left_out(run, monkeypatch, capsys):
    def stuck(command, timeout=None, **_):
        run.started.append(command)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(run.subprocess, "run", stuck)
    clock = iter([0.0, 0.0, *[95.0] * 20])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    assert run.main(["all", "--device", "cuda", "--seconds", "100", "--tested"]) == 1
    said = capsys.readouterr().err
    assert len(run.started) == 1
    assert "tmask_nm: stopped, the time of all rows is spent" in said
    assert "lin24_fwd: left out, the time is spent" in said
    assert "rows that failed or were left out: tmask_nm, lin24_fwd" in said


def test_a_row_for_both_devices_takes_the_one_that_was_asked_for(run, capsys):
    assert run.main(["tmask_nm", "--tested"]) == 0
    assert run.main(["tmask_nm", "--tested", "--device", "cuda", "--quick"]) == 0
    assert run.started[0][0].endswith("masks.py")
    assert run.started[1][0].endswith("device_masks.py")
    assert "--quick" in run.started[1]
    assert run.main(["profit", "--device", "cuda"]) == 2
    assert "profit isn't there for cuda" in capsys.readouterr().err
    assert run.main([]) == 0
    assert "compact_conv     left out: pruned convolutions" in capsys.readouterr().out


def test_a_dry_run_writes_nothing_and_needs_no_device(run, monkeypatch):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    assert run.main(["crs_fwd", "--dry-run"]) == 0
    assert "--dry-run" in run.started[0]
    assert "--json" not in run.started[0]


def test_a_bare_machine_imports_the_package():
    """One with torch, triton and pytest alone: what only prints is imported when it prints."""
    rooms = ("sparsefx", "passes", "kernels")
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        assert not re.search(r"^(from|import) rich", path.read_text("utf-8"), re.MULTILINE), path
