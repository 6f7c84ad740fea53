"""``sparsefx export`` writes a file that the checks of ``export_onnx`` went over."""

import json
from pathlib import Path

from sparsefx.cli import main


def test_export(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "plain.py").write_text(
        "from torch.nn import Linear\ndef build(): return Linear(16, 8)"
    )
    monkeypatch.chdir(tmp_path)
    words = ["export", "plain.py:build", "m.onnx", "--input", "input=float32[3,16]", "--json"]
    config = ["--config", "c.json"]
    (tmp_path / "c.json").write_text(
        '{"keep_output_dense": false, "rules": [{"match": "*", "forward": '
        '{"kind": "nm", "n": 2, "m": 4}}]}'
    )
    assert main([*words, *config, "--weights", "dense"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["path"] == "m.onnx"
    assert (tmp_path / "m.onnx").stat().st_size == data["bytes"]
    assert data["max_error"] <= data["tolerance"]
    assert [row["density"] for row in data["rows"] if row["pattern"]] == [0.5]
