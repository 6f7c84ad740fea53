"""explain, bench and export: what each does with a model that was named."""

import json
import sys
import textwrap
from pathlib import Path

import pytest

import sparsefx as sfx
from sparsefx.cli import bench
from sparsefx.config import PRESETS
from sparsefx.onnx.report import ExportReport, TensorRow

X = ("--input", "float32[4,16]")
IDS = ("--input", "ids=int64[2,6]:0..95", "--input", "keep=bool[2,6]")


@pytest.mark.parametrize("name", ["net:build", "net.py:build", "net:ready", "net:Holder.inner"])
def test_explain_is_the_report(name: str, call, folder: Path):
    done = call("explain", name, *X)
    assert done.code == 0
    assert not done.err
    assert "2:4 transposable" in done.out
    assert "why dense:" in done.out


def test_explain_a_file_in_another_folder(call, folder: Path):
    (folder / "deep").mkdir()
    (folder / "deep" / "beside.py").write_text("from torch.nn import Linear")
    (folder / "deep" / "own.py").write_text(
        "from beside import Linear\ndef build(): return Linear(8, 8)"
    )
    done = call("explain", "deep/own.py:build", "--input", "float32[3,8]", "--json")
    assert done.code == 0
    assert done.data["sites"][0]["shape"] == [3, 8, 8]


def test_a_file_called_as_a_module_that_is_loaded(call, folder: Path):
    (folder / "textwrap.py").write_text("from torch.nn import Linear\nready = Linear(8, 8)")
    done = call("explain", "textwrap.py:ready", "--input", "float32[3,8]", "--inference")
    assert done.code == 0, done.err
    assert sys.modules["textwrap"] is textwrap


def test_explain_as_an_object(call, folder: Path):
    sfx.SparseConfig.from_dict({"rules": [{"match": "0"}]}).to_file(folder / "c.json")
    done = call("--json", "explain", "net:build", *X, "--config", "c.json", "--times", "--why", "0")
    assert done.err == "building\n"  # what the factory prints isn't in the object's way
    assert done.data["command"] == "explain"
    assert done.data["config"] == json.loads((folder / "c.json").read_text())
    assert done.data["why"] == [
        "0 forward: dense: the rule says Dense()",
        "0 grad_weight: dense: the derivative of a dense forward",
    ]
    assert "expected" in done.data["times"]


def test_explain_why_and_times(call):
    done = call("explain", "net:ready", *X, "--why", "2", "--times", "--config", "sampled-0.3")
    assert done.out.startswith("2 forward: dense: feeds the model's output")
    assert "us " in done.out
    assert "no product's layer matches 'q*'" in call("explain", "net:ready", *X, "--why", "q*").out


def test_explain_inference_has_no_gradients(call):
    training = call("explain", "net:ready", *X, "--json").data["sites"]
    inference = call("explain", "net:ready", *X, "--json", "--inference").data["sites"]
    assert {row["role"] for row in training} == {"forward", "grad_input", "grad_weight"}
    assert {row["role"] for row in inference} == {"forward"}
    assert [row["layer"] for row in inference if row["decision"]] == ["0"]


def test_explain_a_config_with_a_schedule(call, root: Path):
    pytest.importorskip("yaml")
    path = root / "examples" / "configs" / "sampled-schedule.yaml"
    done = call("explain", "net:ready", *X, "--config", str(path), "--why", "0")
    assert "0 grad_weight: sampled" in done.out


def eager(folder: Path) -> tuple[str, str]:
    config = {**PRESETS["sampled-backward-0.3"].to_dict(), "codegen": "aot_eager"}
    config["keep_output_dense"] = False
    sfx.SparseConfig.from_dict(config).to_file(folder / "eager.json")
    return "--config", "eager.json"


def test_bench_trains_both(call, folder: Path):
    words = ("bench", "net:ready", *X, *eager(folder), "--rounds", "3", "--warmup", "1")
    data = call(*words, "--json").data
    for name in ("dense", "sparse"):
        spread = data[name]
        assert 0 < spread["p20_ms"] <= spread["median_ms"] <= spread["p80_ms"]
    assert data["what"] == "forward and backward"
    assert data["rounds"] == 3
    assert data["products"] == {"all": 5, "sparse": 3}
    assert data["flops"]["executed"] < data["flops"]["dense"]
    assert data["dense_over_sparse"] > 0
    assert not data["failures"]


def test_bench_says_what_was_not_sparse(call, folder: Path):
    words = ("bench", "net:Words", *IDS, *eager(folder), "--inference", "--rounds", "2")
    done = call(*words, "--warmup", "1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].startswith("net:Words, inference, on cpu (")
    assert [line.split()[0] for line in lines[2:5]] == ["dense", "sparse", "dense"]
    assert "0 of " in lines[5]
    assert lines[6] == "nothing became sparse: sparsefx explain says why"


def test_a_slower_one_is_called_slower():
    row = {"median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
    data = {
        "model": "m", "what": "inference", "device": "cpu", "threads": 1, "torch": "2",
        "codegen": "inductor", "rounds": 2,
        "dense": row, "sparse": row, "products": {"all": 2, "sparse": 1},
        "flops": {"dense": 4, "sparse": 2, "executed": 4}, "failures": ["a pass"],
    }  # fmt: skip
    said = {ratio: bench._text(data | {"dense_over_sparse": ratio}) for ratio in (0.9, 1.0, 1.5)}
    assert [r for r, text in said.items() if "sparse is slower" in text] == [0.9]
    end = "no operation is saved: masked operands are multiplied in full\nfailure: a pass"
    assert all(text.endswith(end) for text in said.values())


def test_a_race_runs_in_turns():
    ran: list[int] = []
    field = [lambda i=i: ran.append(i) for i in range(2)]
    times = bench.race(field, 2, 1, bench.torch.device("cpu"))
    assert ran == [0, 1, 1, 0, 0, 1]
    assert [len(own) for own in times] == [2, 2]


def test_export_says_what_was_written(call, monkeypatch):
    report = ExportReport("m.onnx", 10, (TensorRow("w", (8, 8), 9, 0.5, "2:4"),), 20)
    monkeypatch.setattr(sfx, "export_onnx", lambda *args, **options: report, raising=False)
    words = ("export", "net:ready", "m.onnx", *X)
    assert call(*words).out == f"{report}\n"
    data = call(*words, "--json").data
    assert (data["command"], data["bytes"], data["rows"][0]["shape"]) == ("export", 10, [8, 8])


def test_export_passes_on_what_was_asked_for(call, monkeypatch):
    asked = {}

    def fake(model, args, path, **options):
        asked.update(options, model=model, args=args, path=path)
        raise sfx.ExportError("enough")

    monkeypatch.setattr(sfx, "export_onnx", fake, raising=False)
    flags = ("--weights", "coo", "--sampled", "exact", "--no-verify", "--force")
    assert call("export", "net:Words", "m.onnx", IDS[2], IDS[3], *IDS[:2], *flags).code == 1
    ids, keep = asked.pop("args")
    assert (ids.shape, str(keep.dtype)) == ((2, 6), "torch.bool")
    assert type(asked.pop("model")).__name__ == "Words"
    assert asked == {
        "path": "m.onnx", "config": None, "weights": "coo", "sampled": "exact", "verify": False,
        "force": True,
    }  # fmt: skip


def test_export_needs_every_argument_before(call, folder: Path):
    (folder / "opt.py").write_text(
        "from torch.nn import Module\nclass Two(Module):\n"
        "    def forward(self, a=None, b=None): return b"
    )
    done = call("export", "opt:Two", "m.onnx", "--input", "b=float32[2]")
    assert done.code == 2
    assert "--input b=...: an export passes inputs by their places" in done.err
