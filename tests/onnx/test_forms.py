"""The forms of weights in a file: what each holds, when it is refused, how it is read back."""

import copy
import math

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sparsefx as sfx
from sparsefx import masks
from sparsefx.onnx import coo, forms, packed, reading, writing
from sparsefx.onnx.tensors import code_of, from_proto, to_proto
from sparsefx.ops.packed import _nm_pack  # the reference, without a kernel to compile

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def rules(n: int, m: int) -> sfx.SparseConfig:
    return sfx.SparseConfig(rules=[sfx.Rule("*", forward=sfx.NM(n, m))], codegen="aot_eager")


def holding(**tensors: torch.Tensor) -> onnx.ModelProto:
    """A model that returns its weights, in float32."""
    nodes, outputs = [], []
    for name, w in tensors.items():
        nodes.append(onnx.helper.make_node("Cast", [name], [f"{name}.out"], to=1))
        outputs.append(onnx.helper.make_tensor_value_info(f"{name}.out", 1, list(w.shape)))
    initializers = [to_proto(name, w) for name, w in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], outputs, initializers)
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)


def masked(shape: tuple[int, ...], n: int, m: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    w = torch.randn(shape)
    return torch.where(masks.nm_mask(w, n, m, dim), w, 0).to(dtype)


PATTERNS = [
    ((6, 16), 2, 4, 1),
    ((16, 6), 1, 4, 0),
    ((5, 12, 3, 3), 2, 4, 1),  # a convolution, along input channels
    ((3, 32, 5), 3, 8, 1),  # 4 bits; a last byte that is not full
    ((3, 2), 1, 2, 1),
    ((32, 7), 5, 32, 0),  # 8 bits
    ((2, 16), 3, 16, 1),
]


@pytest.mark.parametrize(("shape", "n", "m", "dim"), PATTERNS)
def test_any_runtime_expands_what_is_packed(shape, n, m, dim):
    tensors = {str(d)[6:]: masked(shape, n, m, dim, d) for d in DTYPES}
    groups = {k: packed.Groups(n, m, dim, 0) for k in tensors}
    choices = [forms.Choice(k, w, "packed", 0, "", groups[k]) for k, w in tensors.items()]
    model = forms.apply(holding(**tensors), choices)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    evaluated = onnx.reference.ReferenceEvaluator(model)
    for outputs in (session.run(None, {}), evaluated.run(None, {})):
        for got, w in zip(outputs, tensors.values(), strict=True):
            assert torch.equal(torch.from_numpy(got), w.float())
    read = reading.stored_tensors(model)
    assert all(torch.equal(read[name], w) and read[name].dtype == w.dtype
               for name, w in tensors.items())  # fmt: skip


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 8), (5, 32)])
def test_the_layout_is_that_of_nm_pack(n, m):
    w = masked((6, 3 * m), n, m, 1, torch.float32)
    w[2] = 0  # places of zeros are written, too
    w[3, ::2] = 0
    values, codes = _nm_pack(w, n, m)
    protos, _ = packed.pack("w", w, packed.Groups(n, m, 1, 0))
    assert torch.equal(from_proto(protos[0]), values)
    assert torch.equal(from_proto(protos[1]), codes)


def test_constant_folding_leaves_the_plain_weight(tmp_path):
    from onnxscript import optimizer

    w = masked((8, 16), 2, 4, 1, torch.float32)
    model = forms.apply(holding(w=w), forms.choose(holding(w=w), "packed"))
    folded = optimizer.optimize(model, input_size_limit=10**6, output_size_limit=10**6)
    assert {node.op_type for node in folded.graph.node} <= {"Cast", "Identity"}
    assert any(torch.equal(from_proto(p), w) for p in folded.graph.initializer)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    folded = onnx.load(options.optimized_model_filepath)
    assert {node.op_type for node in folded.graph.node} <= {"Cast", "Identity"}


@pytest.mark.parametrize(
    ("w", "expected"),
    [
        (torch.ones(8, 8), None),
        (torch.ones(7, 5) * (torch.arange(5) < 1), None),  # no m divides an axis
        (torch.zeros(4, 4), (1, 4)),
        (torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 1]]).expand(3, 8), (1, 4)),
        (torch.tensor([[1.0, 0]]).expand(3, 2), (1, 2)),
        (torch.ones(4, 3) * (torch.arange(4) < 3)[:, None], (3, 4)),
    ],
)
def test_the_smallest_pattern_that_holds_is_found(w, expected):
    found = packed.find_groups(w)
    assert (found and (found.n, found.m)) == expected
    assert found is None or found.bytes < packed.dense_bytes(w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_tensors_pay_above_break_even(dtype):
    point = coo.break_even(dtype)
    assert point == pytest.approx({8: 0.5, 4: 2 / 3, 2: 0.8}[dtype.itemsize])
    for zeros, smaller in ((point - 0.05, False), (point + 0.05, True)):
        w = torch.ones(1000)
        w[: math.floor(zeros * 1000)] = 0
        w = w[torch.randperm(1000)].reshape(5, 10, 20).to(dtype)
        assert (coo.size(w) < packed.dense_bytes(w)) == smaller
        again = coo.unpack(coo.pack("w", w))
        assert torch.equal(again, w)
        assert again.dtype == dtype
    assert code_of(dtype) == to_proto("w", w).data_type


def test_coordinates_are_not_read():
    sparse = coo.pack("w", torch.eye(3))
    sparse.indices.CopyFrom(to_proto("i", torch.tensor([[0, 0], [1, 1], [2, 2]])))
    with pytest.raises(sfx.ExportError, match=r"'w' has indices of shape \(3, 2\); only linear"):
        coo.unpack(sparse)


def test_each_tensor_takes_its_smallest_form():
    few = torch.zeros(64, 64)
    few[::16, 5] = few[1, 1:9] = 1.0
    tensors = {
        "half": masked((64, 64), 2, 4, 1, torch.float32),
        "few": few,
        "full": torch.randn(64, 64),
        "tiny": masked((4, 4), 2, 4, 1, torch.float32),
        "bias": torch.zeros(64),
    }
    found = {c.name: c for c in forms.choose(holding(**tensors), "auto")}
    assert {name: c.form for name, c in found.items()} == {
        "half": "packed", "few": "coo", "full": "dense", "tiny": "dense",
    }  # fmt: skip
    assert found["half"].why == "2:4 along dim 1: 8704 of 16384 bytes"
    assert found["few"].why == "99.7% zeros: 144 of 16384 bytes"
    assert found["full"].why == "density 1: no other form is smaller"
    assert found["tiny"].why == "density 0.5: no other form is smaller"
    allowed = {c.name: c.form for c in forms.choose(holding(**tensors), "auto", allowed="packed")}
    assert allowed["few"] == "packed"


@pytest.mark.parametrize(
    ("weights", "tensors", "message"),
    [
        ("packed", {"w": torch.ones(4, 4)}, r"none of 1 weights has N:M zeros.*'w' \(4, 4\), dens"),
        ("coo", {"w": torch.ones(4, 4)}, "none of 1 weights has a tenth or more zeros"),
        ("coo", {"b": torch.zeros(4)}, "the file holds no floating weight; use weights='dense'"),
        (
            "coo",
            {"w": masked((8, 8), 2, 4, 1, torch.float32)},
            r"'w' \(8, 8\) torch.float32 has 50.0% zeros and would take 384 bytes, 256 dense "
            r"\(1 of 1 weights are larger\).*above 66.7% zeros.*weights='packed'.*force=True",
        ),
        ("coo", {"w": masked((8, 8), 1, 4, 1, torch.float16)}, "above 80.0% zeros"),
    ],
)
def test_a_form_that_can_not_be_is_refused(weights, tensors, message):
    with pytest.raises(sfx.ExportError, match=message):
        forms.choose(holding(**tensors), weights)


# --- whole models


@pytest.mark.parametrize("name", ["gpt2", "cnn"])
def test_a_packed_model_reads_back(name, build, run_file, tmp_path):
    model, x = build(name)
    report = sfx.export_onnx(model, x, tmp_path / "m.onnx", rules(2, 4), "packed", verify=False)
    made = {row.parameter: row for row in report.rows if row.form == "packed" and row.pattern}
    assert len(made) == 4
    assert all(row.bytes * 32 == row.dense_bytes * 17 for row in made.values())
    state = sfx.onnx.load_weights(tmp_path / "m.onnx")
    again = copy.deepcopy(model)
    again.load_state_dict(state)  # all of it, under the model's names
    for key, value in model.state_dict().items():
        acts = state[key] != 0 if key in made else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(state[key], torch.where(acts, value, 0))
        assert key not in made or acts.double().mean() == pytest.approx(0.5)
    with torch.no_grad():
        outputs = again.eval()(x)
    wanted = outputs["logits"] if name == "gpt2" else outputs["scores"]
    torch.testing.assert_close(run_file(tmp_path / "m.onnx", x)[0], wanted, rtol=1e-4, atol=1e-5)
    assert report.missing == ()


class Kept(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w):
        return w * self.mask


@pytest.fixture(scope="module")
def wide():
    """A parametrized 1:4 layer and a plain one, 256 wide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    mask = masks.nm_mask(model[0].weight, 1, 4, 1).float()
    parametrize.register_parametrization(model[0], "weight", Kept(mask))
    return model.append(nn.Linear(256, 4)), torch.randn(3, 256)


def test_sizes_of_one_in_four_and_names_of_masked_layers(wide, tmp_path):
    model, x = wide
    report = sfx.export_onnx(model, x, tmp_path / "m.onnx", rules(1, 4))  # auto
    assert (report.form, report.why) == ("packed", "auto: of 3 weights 2 packed, 0 coo")
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size
    assert report.bytes < 0.33 * report.dense_bytes
    assert "0.29 of 538 kB dense; auto" in str(report)
    state = sfx.onnx.load_weights(tmp_path / "m.onnx")
    assert set(state) == {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert torch.equal(state["0.weight"], model[0].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_of_two_in_four(dtype):
    w = masked((512, 512), 2, 4, 1, dtype)
    model = holding(w=w)
    size = forms.apply(model, forms.choose(model, "packed")).ByteSize()
    assert size <= (0.57 if dtype == torch.float32 else 0.60) * model.ByteSize()
    assert abs(writing.dense_size(model) - model.ByteSize()) < 32


def test_sparse_initializers_and_external_data(wide, run_file, tmp_path):
    model, x = copy.deepcopy(wide[0]), wide[1]
    parametrize.remove_parametrizations(model[0], "weight")
    path = tmp_path / "m.onnx"
    report = sfx.export_onnx(
        model, x, path, rules(1, 8), "coo", force=True, verify=False, external_above=1000
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert report.form == "coo"
    assert "onnx.checker takes sparse initializers only without its inference" in report.why
    sparse = onnx.load(str(path)).graph.sparse_initializer
    assert {tensor.values.name for tensor in sparse} == {"0.weight", "2.weight"}
    state = sfx.onnx.load_weights(path)
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(run_file(path, x)[0], model(x), rtol=1e-4, atol=1e-5)


# --- reading


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(sfx.ExportError, match="there is no such file"):
        sfx.onnx.load_weights(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(sfx.ExportError, match="can't be read as ONNX"):
        sfx.onnx.load_weights(tmp_path / "text.onnx")
    model = holding(w=torch.eye(4))
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(sfx.ExportError, match=r"no metadata 'sparsefx\.parameters'.*export_onnx"):
        sfx.onnx.load_weights(tmp_path / "other.onnx")
    entry = model.metadata_props.add()
    entry.key = "sparsefx.parameters"
    entry.value = '[{"parameter": "0.weight", "tensor": "gone", "transposed": false}]'
    onnx.save(model, str(tmp_path / "lost.onnx"))
    with pytest.raises(sfx.ExportError, match=r"lacks tensor 'gone' of parameter '0\.weight'"):
        sfx.onnx.load_weights(tmp_path / "lost.onnx")


def test_what_reads_back_otherwise_is_an_error(tmp_path, monkeypatch):
    real = forms.apply

    def losing(model, choices):
        written = real(model, choices)
        del written.graph.sparse_initializer[:]
        return written

    monkeypatch.setattr(forms, "apply", losing)
    monkeypatch.setattr(writing, "run_checker", lambda *_: None)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(sfx.ExportError, match=r"'0\.weight' was written as coo .*reads back other"):
        sfx.export_onnx(model, torch.randn(2, 16), tmp_path / "m.onnx", rules(1, 8), "coo")
    assert list(tmp_path.iterdir()) == []
