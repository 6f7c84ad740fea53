"""export_onnx: the zeros in the file, what the file computes, what is left alone or behind."""

import copy
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import masks
from sparsefx.onnx import ExportReport, export

ROW = sfx.SparseConfig(rules=[sfx.Rule("*", forward=sfx.NM(2, 4))], codegen="aot_eager")
TILE = sfx.SparseConfig(codegen="aot_eager")


def leaves(outputs: object) -> Iterator[Tensor]:
    """Tensors in the order of the file, by hand: no code shared with what is tested."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, dict):
        for value in outputs.values():
            yield from leaves(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from leaves(value)


def facts_of(path: Path) -> list[dict]:
    entries = {p.key: p.value for p in onnx.load(str(path)).metadata_props}
    return json.loads(entries["sparsefx.weights"])


@pytest.mark.parametrize(
    ("name", "config", "count"),
    [("mlp", ROW, 2), ("cnn", ROW, 4), ("cnn", TILE, 3), ("gpt2", ROW, 4), ("resnet", TILE, 5)],
    ids=["mlp-row", "cnn-row", "cnn-tile", "gpt2-row", "resnet-tile"],
)
def test_the_file_is_the_compiled_model(name, config, count, build, run_file, stored, tmp_path):
    model, x = build(name)
    model.train()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "m.onnx"

    report = sfx.export_onnx(model, x, path, config=config, weights="dense")

    # nothing but the file, and nothing of the model, changed
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())

    # the zeros are N:M where the file says so, of the parameters that the compiler masks
    tensors, facts = stored(path), facts_of(path)
    assert len(facts) == count
    weights = {key: value for key, value in model.state_dict().items()}
    for fact in facts:
        held = tensors[fact["name"]]
        n, m, dim, transposable = fact["n"], fact["m"], fact["dim"], fact["transposable"]
        assert (n, m, transposable) == (2, 4, config is TILE)
        assert masks.is_valid(held, n, m, dim, transposable)
        assert fact["density"] == pytest.approx(0.5)
        assert fact["parameter"] == fact["layer"] + ".weight"
        weight = weights[fact["parameter"]]
        # [out, in], but Hugging Face's Conv1D: [in, out]
        along = 0 if name == "gpt2" else 1
        mask = masks.transposable_mask(weight, n, m) if transposable else None
        mask = masks.nm_mask(weight, n, m, along) if mask is None else mask
        turned = held.shape != weight.shape
        assert torch.equal(held.t() != 0 if turned else held != 0, mask & (weight != 0))
        assert transposable or dim == (1 - along if turned else along)

    # the file computes what the compiled model computes
    model.eval()
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    with torch.no_grad():
        expected, dense = list(leaves(compiled(x))), list(leaves(model(x)))
    got = run_file(path, x)
    assert len(got) == len(expected)
    for ours, theirs, full in zip(got, expected, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, full, rtol=1e-2, atol=1e-3)

    # and the report says so
    assert report.path == str(path)
    assert report.bytes == path.stat().st_size
    assert {row.name for row in report.rows} >= set(tensors)
    assert sum(bool(row.pattern) for row in report.rows) == count
    assert report.hidden == ()
    assert report.opset >= 18
    assert report.max_error <= report.tolerance < 1e-3
    assert report.runtimes == (f"onnxruntime {onnxruntime.__version__}",)


def test_a_batch_of_another_size(build, run_file, tmp_path):
    model, x = build("mlp")
    path = tmp_path / "m.onnx"
    batch = torch.export.Dim("batch", min=1, max=64)
    sfx.export_onnx(model, (x,), path, config=ROW, dynamic_shapes=({0: batch},))
    x = torch.randn(13, 16)
    compiled = torch.compile(model.eval(), backend="sparsefx", options={"config": ROW})
    with torch.no_grad():
        torch.testing.assert_close(run_file(path, x)[0], compiled(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_taken_as_it_was(build, run_file, tmp_path):
    model, x = build("mlp")
    compiled = torch.compile(model, backend="sparsefx", options={"config": ROW})
    report = sfx.export_onnx(compiled, (x,), tmp_path / "m.onnx", config=ROW)
    assert {row.parameter for row in report.rows if row.pattern} == {"0.weight", "2.weight"}
    with torch.no_grad():
        (got,) = run_file(tmp_path / "m.onnx", x)
        torch.testing.assert_close(got, compiled(x), rtol=1e-4, atol=1e-5)


def test_large_weights_lie_beside_the_file(build, run_file, stored, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "INLINE_LIMIT", 0)
    model, x = build("mlp")
    report = sfx.export_onnx(model, (x,), tmp_path / "m.onnx", config=ROW, weights="dense")
    files = {p.name: p.stat().st_size for p in tmp_path.iterdir()}
    assert set(files) == {"m.onnx", "m.onnx.data"}
    assert report.bytes == sum(files.values())
    (fact, _) = facts_of(tmp_path / "m.onnx")
    assert masks.is_valid(stored(tmp_path / "m.onnx")[fact["name"]], 2, 4, fact["dim"])
    assert run_file(tmp_path / "m.onnx", x)[0].shape == (7, 5)


def test_no_rules_no_zeros(build, run_file, tmp_path):
    model, x = build("mlp")
    config = sfx.SparseConfig(rules=())
    report = sfx.export_onnx(model, x, tmp_path / "m.onnx", config, weights="auto")
    assert facts_of(tmp_path / "m.onnx") == []
    assert not any(row.pattern for row in report.rows)
    with torch.no_grad():
        expected = model.eval()(x)
    torch.testing.assert_close(run_file(tmp_path / "m.onnx", x)[0], expected, rtol=1e-4, atol=1e-5)


def test_sampling_is_exact_at_inference(build, tmp_path):
    model, x = build("mlp")
    report = sfx.export_onnx(model, x, tmp_path / "m.onnx", "sampled-0.3")
    assert not any(row.pattern for row in report.rows)


def test_a_runtime_that_lacks_the_dtype_is_named(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    with pytest.raises(sfx.ExportError, match=r"onnxruntime can't run the file.*verify=False"):
        sfx.export_onnx(model, x, tmp_path / "m.onnx", ROW)
    assert list(tmp_path.iterdir()) == []
    report = sfx.export_onnx(model, x, tmp_path / "m.onnx", ROW, verify=False)
    assert (report.max_error, report.tolerance, report.runtimes) == (None, None, ())
    assert [row.pattern for row in report.rows if row.name == "0.weight"] == ["2:4 along dim 1"]


# --- failures leave nothing behind


def refuse(*_: object, **__: object) -> None:
    raise onnx.checker.ValidationError("bad node")


def off_by_a_percent(self: object, *args: object) -> list:
    outputs = onnxruntime.InferenceSession.__mro__[1].run(self, *args)
    return [outputs[0] * 1.01]


def zero_too_few(*_: object) -> object:
    return masks.Verdict(False, "[0, 0:4] keeps 3")


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize(
    ("where", "name", "wrong", "message"),
    [
        (onnx.checker, "check_model", refuse, r"onnx\.checker refuses the file: bad node"),
        (onnxruntime.InferenceSession, "run", off_by_a_percent, "output 0 is off by 0.01 of its"),
        (masks, "is_valid", zero_too_few, r"'0\.weight' of the file.*is not 2:4.*keeps 3"),
    ],
    ids=["checker", "runtime", "zeros"],
)
def test_a_failed_check_leaves_nothing(
    where, name, wrong, message, there_before, tmp_path, monkeypatch
):
    if there_before:
        (tmp_path / "m.onnx").write_bytes(b"older")
    monkeypatch.setattr(where, name, wrong, raising=False)
    monkeypatch.setattr(export, "INLINE_LIMIT", 0)  # two files to leave behind
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(sfx.ExportError, match=message):
        sfx.export_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx", ROW)
    left = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert left == ({"m.onnx": b"older"} if there_before else {})


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x


def test_what_the_exporter_refuses_is_said_shortly(tmp_path):
    with pytest.raises(sfx.ExportError, match=r"torch\.onnx\.export can't write") as caught:
        sfx.export_onnx(Branches(), torch.ones(2), tmp_path / "m.onnx")
    assert "Next steps" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_can_not_be_copied(tmp_path):
    model = nn.Linear(8, 8)
    model.lock = threading.Lock()
    with pytest.raises(sfx.ExportError, match=r"model can't be copied: .*remove_weight_norm"):
        sfx.export_onnx(model, torch.ones(2, 8), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_can_not_be_moved_into_place(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(export.os, "replace", full)
    with pytest.raises(sfx.ExportError, match=r"can't be written: no space left"):
        sfx.export_onnx(nn.Linear(8, 8), torch.randn(2, 8), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# --- arguments


def own_pass(gm: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"weights": "csr"},
            sfx.ConfigError,
            "'csr' is not one of 'auto', 'dense', 'packed', 'coo",
        ),
        ({"sampled": "no"}, sfx.ConfigError, "sampled='no' is not one of 'sampled', 'exact'"),
        ({"external_above": -1}, sfx.ConfigError, "external_above=-1 must be a number of bytes"),
        ({"config": "9:4"}, sfx.ConfigError, "'9:4' is not a preset"),
        ({"path": "none/m.onnx"}, sfx.ExportError, "folder 'none' doesn't exist; create it"),
        ({"path": "."}, sfx.ExportError, "path='.' is a folder; name a file in it"),
        ({"model": torch.relu}, sfx.ExportError, "model=.*must be a torch.nn.Module"),
        ({"args": [torch.ones(2, 8)]}, sfx.ExportError, "args must be a tensor or a tuple, got li"),
        ({"config": sfx.SparseConfig(passes=[own_pass])}, sfx.ExportError, r"\(own_pass\) edit"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(changes, error, message, monkeypatch):
    monkeypatch.setattr(export, "find_zeros", pytest.fail)
    given = {"model": nn.Linear(8, 8), "args": torch.ones(2, 8), "path": "m.onnx", **changes}
    with pytest.raises(error, match=message):
        sfx.export_onnx(**given)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(sfx.ExportError, match=rf'needs {name}, .*pip install "sparsefx\[onnx\]"'):
        sfx.export_onnx(nn.Linear(8, 8), torch.ones(2, 8), tmp_path / "m.onnx")


# --- the report


def test_the_table_fits(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    report = sfx.export_onnx(model, torch.randn(2, 8), tmp_path / "m.onnx", "2:4", verify=False)
    long = ExportReport(
        path="m.onnx",
        bytes=report.bytes,
        rows=tuple(
            sfx.onnx.TensorRow("v", (8, 8), 256, 0.5, "2:4 along dim 1", "a." * 60 + "weight")
            for _ in range(2)
        ),
        opset=20,
        max_error=1e-7,
        tolerance=1e-5,
        runtimes=("onnxruntime 1",),
        hidden=("b.weight",),
    )
    for text in (str(report).partition("\n")[2], str(long)):
        assert max(map(len, text.splitlines())) <= 120
    assert "not compared in a runtime (verify=False)" in str(report)
    assert "0.weight" in str(report)
    assert "zeros not visible in the file: b.weight" in str(long)
    assert "1e-07 of the largest output (allowed 1e-05; onnxruntime 1)" in str(long)
