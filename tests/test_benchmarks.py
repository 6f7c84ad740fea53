"""The benchmark runs, checks values before it times, and writes what it printed."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sparsefx import Sampled, cost
from sparsefx.passes import canonicalize, find_sites
from sparsefx.testing import capture, plans, run_pass

HERE = Path(__file__).parent
TINY = ["--codegen", "aot_eager", "--rounds", "2", "--sizes", "40", "--ratios", "0.3"]


def script(name: str) -> ModuleType:
    path = HERE.parent / f"benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def linear() -> ModuleType:
    return script("linear")


@pytest.fixture(scope="module")
def conv() -> ModuleType:
    return script("conv")


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


def test_the_limit_is_made_of_steps_and_speedups_are_told_against_it(linear, tmp_path, capsys):
    path = tmp_path / "limit.json"
    linear.main([*TINY, "--roofline", "--json", str(path)])
    _, forward, *others = json.loads(path.read_text())["rows"]
    printed = capsys.readouterr().out
    assert forward["limit"] > 0
    assert [row["limit"] for row in others] == [None, None]
    for step in ("the three products", "scores", "gather", "spread", "bias"):
        assert step in printed
    assert f"{forward['speedup'] / forward['limit']:.0%}" in printed


def test_the_limit_counts_the_bytes_that_no_way_does_without(linear):
    m, n, depth, k = 6, 10, 32, 8
    x, w, grad = torch.randn(m, depth), torch.randn(n, depth), torch.randn(m, n)
    linear.roofline.STREAM = 1 << 12
    found = linear.roofline.steps(x, w, grad, torch.randn(n), k, 2)
    bytes_of = {step.name: (step.read, step.written) for step in found[1:]}
    both = 4 * depth * (m + n)
    assert bytes_of == {
        "scores": (both, 0),
        "gather": (pytest.approx(both * (1 - 0.75**16)), both / 4),
        "bias": (4 * m * n, 0),
        "spread": (0, both),
    }
    assert linear.roofline.total(found) == sum(step.time for step in found) > 0


def test_the_limit_is_for_what_it_knows(linear, capsys):
    with pytest.raises(SystemExit):
        linear.main([*TINY, "--roofline", "--dtype", "bfloat16"])
    assert "--roofline knows the bytes of float32 on a CPU alone" in capsys.readouterr().err


def test_convolutions_of_every_layout_are_compared_before_they_are_timed(conv, tmp_path, capsys):
    path = tmp_path / "conv.json"
    quick = ["--codegen", "aot_eager", "--rounds", "2", "--json", str(path)]
    conv.main(quick, [conv.Shape(2, 6, 4, 5)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["layout"] for row in rows] == ["contiguous"] * 4 + ["channels_last"] * 4
    assert [row["ideal"] for row in rows[:4]] == pytest.approx([1, 2, 1.5, 2])
    grouped = conv.Shape(2, 6, 6, 5, stride=2, groups=2)
    conv.main([*quick, "--layouts", "contiguous"], [grouped])
    assert len(json.loads(path.read_text())["rows"]) == 3  # nobody writes it by hand
    assert "3x3 6-6, 5x5, stride 2, 2 groups, batch 2" in capsys.readouterr().out


def test_convolutions_that_differ_are_not_timed(conv, monkeypatch):
    monkeypatch.setattr(conv, "by_hand", lambda layer, k: lambda x: 1.01 * layer(x))
    monkeypatch.setattr(conv, "race", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"3x3 4-4, 5x5, batch 2, contiguous, ratio=0.5: .* off"):
        conv.main(["--codegen", "aot_eager"], [conv.Shape(2, 4, 4, 5)])


def test_training_steps_of_a_model(tmp_path, capsys):
    path = tmp_path / "models.json"
    small = ["--small", "--codegen", "aot_eager", "--rounds", "2", "--ratios", "0.5"]
    models = script("models")
    models.main([*small, "--models", "resnet", "--json", str(path)])
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == [
        "dense, torch.compile",
        "sparsefx, forward 0.5",
        "sparsefx, forward 0.5, profitable",
        "sparsefx, grad_weight 0.5",
        "by hand, eager, forward 0.5",
    ]
    sampled, profitable, gradient = (rows[name]["executed"] for name in list(rows)[1:4])
    assert sampled < gradient < profitable == 1  # too small to be worth it
    printed = capsys.readouterr().out
    assert all(f"{100 * share:.0f}%" in printed for share in (sampled, gradient, profitable))


def test_a_layer_by_hand_is_itself_again_afterwards():
    models = script("models")
    conv = torch.nn.Conv2d(64, 8, 3, padding=1)
    x = torch.randn(2, 64, 5, 5)
    exact = conv(x)
    with models.sampled_by_hand(torch.nn.Sequential(conv), 0.5):
        assert (conv(x) - exact).norm() > 0.1 * exact.norm()
    torch.testing.assert_close(conv(x), exact)


@pytest.fixture(scope="module")
def profit() -> ModuleType:
    return script("profit")


@pytest.mark.parametrize("case", [(6, 4, 10), (2, 6, 8, 5, 3, 2, 2), (2, 4, 6, 5, 1)])
def test_cases_are_what_the_passes_find(profit, case):
    linear = len(case) == 3
    shape = case if linear else profit.Shape(*case)
    model = torch.nn.Linear(case[2], case[1]) if linear else shape.layer()
    size = (case[0], case[2]) if linear else (case[0], case[1], case[3], case[3])
    gm = capture(model, torch.randn(size, requires_grad=True))
    run_pass(canonicalize, gm)
    run_pass(find_sites, gm)
    found = {plan.site.role: plan.site for plan in plans(gm)}
    expected = profit.sites_of(shape)
    assert set(found) == set(expected)
    for role, one in found.items():
        for key in ("shape", "channels", "kind", "dtype", "device", "batch"):
            assert getattr(one, key) == getattr(expected[role], key), (role, key)


def test_decisions_stand_beside_times_and_a_grid_grows(profit, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(profit, "CASES", ((64, 32, 64), (64, 32, 128)))
    monkeypatch.setattr(profit, "ASKED", (("forward", 0.5), ("grad_input", 0.5)))
    path = tmp_path / "profit.json"
    quick = ["--codegen", "aot_eager", "--rounds", "2", "--json", str(path)]
    profit.main([*quick, "--cases", "1"])
    profit.main([*quick, "--cases", "0"])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["case"], row["role"]) for row in rows] == [
        (0, "forward"),
        (0, "grad_input"),
        (1, "forward"),
        (1, "grad_input"),
    ]
    printed = capsys.readouterr().out
    assert "64x32x128" in printed
    assert "declined 2, the fastest" in printed


def test_what_was_kept_and_slower_is_told(profit, monkeypatch):
    def row(ratio, speedup):
        return profit.Row(10, "1024x1024x1024", "forward", ratio, 1.0, 1.0, 1.0, 1.0, speedup)

    rows = [row(0.1, 4.0), row(0.3, 0.9), row(0.99, 1.2), row(0.98, 0.8)]
    assert profit.judged(rows) == (
        "kept 2 of 4, the slowest 0.90x, 1 below 0.97x; "
        "declined 2, the fastest 1.20x, 1 above 1.05x"
    )


def test_a_pace_is_found_again(profit):
    """From times that a known pace would take, without noise."""
    paces = {"mm": cost.Pace(5.0, 50.0, 0.05, 10.0), "conv": cost.Pace(8.0, 70.0, 0.5, 12.0)}
    rows = []
    for index in range(len(profit.CASES)):
        kind = "conv" if isinstance(profit.CASES[index], profit.Shape) else "mm"
        for role, ratio in profit.ASKED:
            row = profit.Row(index, "", role, ratio, 1.0, 1.0, 0, 0, 1)
            whole = profit.sample(row)
            times = [(paces[kind].time(w) + 100) / 1e3 for w in (whole.dense, whole.sparse)]
            rows.append(replace(row, dense=times[0], median=times[1]))
    for kind, found in profit.fits(rows).items():
        assert list(found.pace.to_dict().values()) == pytest.approx(
            list(paces[kind].to_dict().values()), rel=1e-3
        )
        assert found.overhead == pytest.approx(100, rel=1e-3)


def test_of_the_recorded_sweep_nothing_slower_is_kept_and_little_faster_declined(profit):
    """By the paces that are built in, and by a fresh fit to the same times."""
    recorded = HERE.parent / "benchmarks" / "results" / "profit-cpu.json"
    rows = [profit.Row(**row) for row in json.loads(recorded.read_text("utf-8"))["rows"]]
    fresh = {kind: found.pace for kind, found in profit.fits(rows).items()}
    for paces in ({kind: cost.PACES[kind, "cpu"] for kind in fresh}, fresh):
        kept = [row for row in rows if worth_it(profit, row, paces)]
        if paces is not fresh:
            assert not any(map(profit.verdict, kept))
        faster = [row for row in rows if row.speedup > 1.02]
        assert min(row.speedup for row in kept) >= 0.98
        assert len([row for row in faster if row in kept]) >= 0.9 * len(faster)


def worth_it(profit, row, paces):
    sites = profit.unit(profit.CASES[row.case], row.role)
    pace = paces[sites[0].kind]
    dense = pace.time(cost.total(map(cost.dense_work, sites)))
    return pace.time(cost.sampled_work(sites, Sampled(row.ratio))) <= cost.MARGIN * dense


def test_permutation_keeps_more_and_says_how_much(tmp_path, capsys):
    path = tmp_path / "perm.json"
    script("permutation").main(["--sizes", "32", "--patterns", "2:4", "3:8", "--json", str(path)])
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


def test_every_row_names_files_that_exist():
    run = script("run")
    for name, row in ((name, row) for name, rows in run.ROWS.items() for row in rows):
        assert (HERE.parent / "benchmarks" / row.script).is_file(), name
        assert all((HERE.parent / test).is_file() for test in row.tests), name


def test_a_row_without_its_device_or_with_failing_tests_is_not_timed(monkeypatch, capsys):
    run = script("run")
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    assert run.main(["crs_fwd"]) == 2
    assert "crs_fwd needs a CUDA device" in capsys.readouterr().err
    assert run.main([]) == 0
    assert "(needs a CUDA device)" in capsys.readouterr().out
    called = []

    def fails(command, **_):
        called.append(command)
        return type("Done", (), {"returncode": 1})

    monkeypatch.setattr(run.subprocess, "run", fails)
    assert run.main(["cpu_crs"]) == 1
    assert len(called) == 1
    assert "pytest" in called[0]
    assert "nothing is timed" in capsys.readouterr().err


def test_overheads_are_told(tmp_path, capsys):
    path = tmp_path / "overhead.json"
    parts = ["--parts", "host", "recompiles", "--rounds", "1"]
    script("overhead").main([*parts, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [row["graphs"] for row in rows if row["part"] == "recompiles"] == [1, 1]
    assert all(row["us"] > row["torch_us"] > 0 for row in rows if row["part"] == "host")
    assert "scattered_mm" in capsys.readouterr().out


def test_a_cold_start_tells_the_building_of_kernels_apart(tmp_path, capsys, monkeypatch):
    overhead = script("overhead")
    found = {"dense": (4.0, 0.0), "sampled 0.3": (9.0, 4.6), "2:4": (4.2, 0.0)}
    monkeypatch.setattr(overhead, "_elsewhere", lambda net, name: found[name])
    path = tmp_path / "overhead.json"
    chosen = ["--parts", "cold", "--nets", "MLP, 4 x 512", "--rounds", "2"]
    overhead.main([*chosen, "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert [(row["seconds"], row["kernels"]) for row in rows][1] == ([9.0, 9.0], [4.6, 4.6])
    printed = capsys.readouterr().out
    assert "+10%, and 4.6 s once for C++ kernels" in printed
    assert "+5%" in printed


def test_building_is_timed(monkeypatch):
    overhead, spent = script("overhead"), []
    monkeypatch.setattr(overhead.time, "perf_counter", iter([1.0, 3.5]).__next__)
    assert overhead._timed(len, spent)("abc") == 3
    assert spent == [2.5]


@pytest.fixture(scope="module")
def packed() -> ModuleType:
    return script("packed")


def test_packed_products_are_compared_with_the_faster_dense_one(
    packed, tmp_path, capsys, monkeypatch
):
    cases = [packed.Case(1, 24, 32, 2, 4), packed.Case(9, 8, 32, 1, 4, "bfloat16")]
    monkeypatch.setattr(packed, "CASES", cases)
    path = tmp_path / "packed.json"
    packed.main(["--codegen", "aot_eager", "--rounds", "2", "--json", str(path)])
    rows = json.loads(path.read_text())["rows"]
    methods = ["dense, eager", "dense, torch.compile", "nm_packed_mm", "torch CSR"]
    assert [row["method"] for row in rows] == [*methods, *methods[:3]]
    assert [row["bytes"] for row in rows[::2]][:2] == [24 * 32 * 4, 24 * 16 * 4 + 24 * 4]
    for dense in (rows[:2], rows[4:6]):
        assert min(dense, key=lambda row: row["median"])["speedup"] == 1
    assert "9x8x32 bfloat16 1:4" in capsys.readouterr().out


def test_masks_that_keep_little_are_compressed_within_the_time(packed, monkeypatch):
    case = packed.Case(9, 8, 32, 1, 4)
    cases = [case, packed.replace(case, role="grad_input")]
    monkeypatch.setattr(packed, "CASES", cases)
    rows = packed.main(["--codegen", "aot_eager", "--rounds", "2"])
    masked = ["masked_mm, compressing", "torch CSR, made anew"]
    assert [row.method for row in rows if row.case == str(cases[0])][4:] == masked
    assert [row.method for row in rows if row.case == str(cases[1])] == [*packed.DENSE, *masked]


def test_packed_products_that_differ_are_not_timed(packed, monkeypatch):
    monkeypatch.setattr(packed.ops, "nm_packed_mm", lambda x, values, *_: x[:, :16] @ values.t())
    monkeypatch.setattr(packed, "race", lambda *_: pytest.fail("timed"))
    monkeypatch.setattr(packed, "CASES", [packed.Case(1, 24, 32, 2, 4)])
    with pytest.raises(SystemExit, match="nm_packed_mm, 1x24x32 float32 2:4: off by"):
        packed.main(["--codegen", "aot_eager"])
