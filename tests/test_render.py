"""Tables in the documents are what the recorded numbers give, and plots can be drawn."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def render():
    sys.path.insert(0, str(HERE))
    import render

    yield render
    sys.path.remove(str(HERE))
    for name in ("render", "plots", "tables"):
        sys.modules.pop(name, None)


def test_no_table_in_a_document_is_stale(render, capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_every_table_can_be_made_and_is_a_table(render):
    for name, make in render.TABLES.items():
        lines = make()
        widths = {line.count("|") for line in lines if line.startswith("|")}
        assert len(widths) <= 1, name
        assert lines, name


def test_a_stale_table_is_named_and_written_anew(render, tmp_path, monkeypatch, capsys):
    path = tmp_path / "README.md"
    path.write_text("- text\n\n  <!-- table: steps-cpu -->\n  | old |\n  <!-- end -->\nmore\n")
    monkeypatch.setattr(render, "DOCUMENTS", (path,))
    assert render.main(["--check"]) == 1
    assert "README.md: stale" in capsys.readouterr().err
    assert render.main(["--tables"]) == 0
    lines = path.read_text().splitlines()
    assert lines[3].startswith("  | step | method")
    assert lines[-2:] == ["  <!-- end -->", "more"]
    assert render.main(["--check"]) == 0


def test_marks_that_mean_nothing_are_refused(render):
    with pytest.raises(SystemExit, match=r"<!-- table: nope -->: there are linear-cpu, "):
        render.rendered("<!-- table: nope -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="has no <!-- end -->"):
        render.rendered("<!-- table: steps-cpu -->\n| a |\n")


def test_masked_products_stand_by_role(render, monkeypatch):
    import tables

    ours, csr = tables.MASKED
    rows = [
        {"case": "512x64x32 float32 1:4", "method": ours, "speedup": 1.5},
        {"case": "512x64x32 float32 1:8", "method": ours, "speedup": 2.5},
        {"case": "512x64x32 float32 1:4 grad_input", "method": csr, "speedup": 0.5},
        {"case": "512x64x32 float32 1:8 grad_input", "method": csr, "speedup": 1.25},
    ]
    monkeypatch.setattr(tables, "rows_of", lambda name: rows)
    assert tables.masked_batch()[2:] == [
        f"| 64 x 32, forward, {ours} | 1.50 | 2.50 |",
        f"| 64 x 32, grad_input, {csr} | 0.50 < | 1.25 |",
    ]
    monkeypatch.setattr(tables, "rows_of", lambda name: [])
    assert tables.masked_batch() == ["Not measured yet: `python benchmarks/run.py cpu_nm_gemv`."]


def test_goals_of_a_device_stand_beside_what_was_measured(render, tmp_path, monkeypatch):
    import tables

    monkeypatch.setattr(tables, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    assert tables.device_goals() == ["No row has run on a CUDA device yet: `make gpu` (GPU.md)."]
    goal = {"method": "mine", "against": "dense", "at_most": None}
    goals = [
        {**goal, "least": 1.5, "found": 1.75, "met": True},
        {**goal, "least": 0.0, "at_most": 0.07, "found": 0.1, "met": False},
    ]
    case = {
        "case": "1 x 2",
        "goals": goals,
        "rows": [{"method": "mine", "median": 1, "speedup": 2}],
    }
    content = {"row": "fast", "device": "H200", "torch": "2.13", "cases": [case]}
    (tmp_path / "results" / "fast-cuda.json").write_text(json.dumps(content))
    assert tables.device_goals()[2:] == [
        "| `fast` | 1 x 2 | mine | 1.75 x dense | 1.5 | met |",
        "| `fast` | 1 x 2 | mine | 0.100 ms | 0.07 ms | **missed** |",
        "",
        "H200, torch 2.13",
    ]
    assert tables.device_cases()[2:] == ["| `fast` | 1 x 2 | mine | 1.000 | 2.00 |"]


def test_plots_are_drawn_of_what_is_recorded(render, tmp_path):
    pytest.importorskip("matplotlib")
    import plots

    paths = plots.main(tmp_path)
    assert [path.name for path in paths] == [
        "linear-cpu.png",
        "packed-cpu.png",
        "steps-cpu.png",
        "masks-cpu.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_no_committed_plot_is_stale(render):
    pytest.importorskip("matplotlib")
    import plots

    committed = {path.stem: path for path in (HERE / "plots").iterdir()}
    assert committed.keys() == plots.PLOTS.keys()
    for name, path in committed.items():
        assert plots.digest(name).encode() in path.read_bytes(), f"{name}: run render.py"
