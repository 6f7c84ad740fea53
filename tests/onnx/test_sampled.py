"""Sampled products in a file: what they compute, for which batches, and what can't be written."""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import sparsefx as sfx
from sparsefx.onnx.sampled import Product, check, rewrite
from sparsefx.onnx.tensors import to_proto


def sampled(**options: object) -> sfx.SparseConfig:
    pattern = sfx.Sampled(0.4, inference=True, **options)
    return sfx.SparseConfig(rules=[sfx.Rule("*", forward=pattern)], codegen="aot_eager")


def domains(path: object) -> set[str]:
    return {node.domain for node in onnx.load(str(path)).graph.node}


def largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    return scores.topk(k).indices.sort().values


def by_hand(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer over the 40 % of its pairs with the largest norms."""
    scores = x.flatten(0, -2).norm(dim=0) * w.norm(dim=0)
    pairs = largest(scores, int(0.4 * w.shape[1]))
    return F.linear(x[..., pairs], w[:, pairs], bias)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 16, bias=False), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(16, 4))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A compiled model with inputs of rank 3, whose batch is dynamic."""
    made = model()
    path = tmp_path_factory.mktemp("sampled") / "m.onnx"
    compiled = torch.compile(made, backend="sparsefx", options={"config": sampled()})
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch},)
    return made, path, sfx.export_onnx(compiled, torch.randn(3, 5, 20), path, dynamic_shapes=shapes)


def test_the_file_samples_as_the_compiled_model(exported, run_file):
    made, path, report = exported  # no config was given: the compiled model's
    assert report.sampled == 2
    assert report.max_error <= report.tolerance
    assert "2 sampled products" in str(report)
    assert domains(path) == {"", "sparsefx"}
    for batch in (1, 3, 11):
        x = torch.randn(batch, 5, 20)
        with torch.no_grad():
            y = torch.tanh(by_hand(x, made[0].weight, made[0].bias))
            y = made[4](torch.tanh(by_hand(y, made[2].weight, None)))
            assert not torch.allclose(y, made(x), atol=1e-2)
        torch.testing.assert_close(run_file(path, x)[0], y, rtol=1e-4, atol=1e-5)


def test_every_operator_of_a_function_is_standard(exported):
    proto = onnx.load(str(exported[1]))
    assert {f.domain for f in proto.functions} == {"sparsefx"}
    used = {(node.domain, node.op_type) for f in proto.functions for node in f.node}
    wanted = {"ReduceSumSquare", "TopK", "Gather", "MatMul"}
    assert {name for domain, name in used if domain == ""} >= wanted
    assert {domain for domain, _ in used} == {""}


def test_exact_is_dense(tmp_path, run_file):
    made, x = model(), torch.randn(3, 20)
    report = sfx.export_onnx(made, x, tmp_path / "m.onnx", sampled(), "dense", None, "exact", False)
    assert report.sampled == 0
    assert domains(tmp_path / "m.onnx") == {""}
    with torch.no_grad():
        torch.testing.assert_close(run_file(tmp_path / "m.onnx", x)[0], made(x))


def test_pruned_weights_and_packed_ones_are_sampled(tmp_path):
    made = model()
    prune.l1_unstructured(made[0], "weight", 0.5)
    weight = torch.zeros(16, 32)
    weight[:, ::4] = 1 + torch.rand(16, 8)
    with torch.no_grad():
        made[2].weight.copy_(weight)
    report = sfx.export_onnx(made, torch.randn(4, 20), tmp_path / "m.onnx", sampled(), "packed")
    assert (report.sampled, report.form) == (2, "packed")
    state = sfx.onnx.load_weights(tmp_path / "m.onnx")
    assert torch.equal(state["0.weight"], made[0].weight)
    assert torch.equal(state["2.weight"], weight)


def test_convolutions_sample_channels_of_each_group(tmp_path, run_file):
    convs = nn.Conv2d(10, 24, 3, padding=1, stride=2), nn.Conv2d(24, 12, (3, 1), groups=2)
    made = nn.Sequential(convs[0], nn.Tanh(), convs[1], nn.Tanh(), nn.Conv2d(12, 3, 1))
    x = torch.randn(2, 10, 9, 8)
    report = sfx.export_onnx(made, x, tmp_path / "m.onnx", sampled(), verify=False)
    assert report.sampled == 2
    made.eval()
    compiled = torch.compile(made, backend="sparsefx", options={"config": sampled()})
    with torch.no_grad():
        expected = compiled(x)
        assert not torch.allclose(expected, made(x), atol=1e-2)
    torch.testing.assert_close(run_file(tmp_path / "m.onnx", x)[0], expected, rtol=1e-4, atol=1e-5)


# --- without a model


def graph_of(node: onnx.NodeProto, w: torch.Tensor, x: tuple[int, ...]) -> onnx.ModelProto:
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [info("x", 1, list(x))],
        [info("y", 1, ["a", "b", "c"][: len(x)])],
        [to_proto("w", w)],
    )
    opset = onnx.helper.make_opsetid("", 18)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)


@pytest.mark.parametrize("scores", ["product", "weight", "input", "uniform"])
@pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv", "grouped"])
def test_scores_of_every_kind(scores, kind, tmp_path, run_file):
    pattern = sfx.Sampled(0.4, inference=True, scores=scores)
    groups = 2 if kind == "grouped" else 1
    w = torch.randn(10, 6) if kind == "MatMul" else torch.randn(6, 10)
    x = torch.randn(7, 10)
    facts = {"transB": 1} if kind == "Gemm" else {}
    if kind in ("Conv", "grouped"):
        w, x = torch.randn(6, 10, 2), torch.randn(3, 10 * groups, 5)
        facts = {"group": groups, "strides": [2], "auto_pad": "VALID"}
    op = "Conv" if kind == "grouped" else kind
    proto = graph_of(onnx.helper.make_node(op, ["x", "w"], ["y"], **facts), w, tuple(x.shape))
    assert rewrite(proto, [Product("p", "layer", pattern)], {"p": "w"}) == 1
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, str(tmp_path / "m.onnx"))
    (got,) = run_file(tmp_path / "m.onnx", x)

    # zeroing what isn't chosen, group by group
    pieces = []
    for i in range(groups):
        part = x[:, 10 * i : 10 * i + 10]
        filters = w if op != "Conv" else w[6 // groups * i : 6 // groups * (i + 1)]
        axis = 0 if kind == "MatMul" else 1
        left = part.transpose(0, 1).flatten(1).norm(dim=1)
        right = filters.transpose(0, axis).flatten(1).norm(dim=1)
        found = {"product": left * right, "weight": right, "input": left}
        pairs = largest(found[scores], 4) if scores != "uniform" else torch.arange(4)
        keep = torch.zeros(10).scatter(0, pairs, 1.0)
        if op == "Conv":
            pieces.append(F.conv1d(part * keep[:, None], filters, stride=2))
        else:
            pieces.append(part * keep @ (w if kind == "MatMul" else w.t()))
    torch.testing.assert_close(got, torch.cat(pieces, 1), rtol=1e-4, atol=1e-5)


def test_all_pairs_are_a_dense_product():
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    proto = graph_of(node, torch.randn(4, 6), (2, 4))
    before = proto.SerializeToString()
    pattern = sfx.Sampled(0.5, min_k=4, inference=True)
    assert rewrite(proto, [Product("w", "layer", pattern)], {}) == 0
    assert proto.SerializeToString() == before


PATTERN = sfx.Sampled(0.5, inference=True)


@pytest.mark.parametrize(
    ("node", "products", "message"),
    [
        ("Gemm", [Product("w", "mlp", PATTERN)], "can't be sampled in the file; sampled='exact'"),
        (
            "MatMul",
            [Product("w", "mlp", PATTERN), Product("w", "mlp", None)],
            "the file has 1 products of its weight 'w' where the model's graph has 2; sampled='ex",
        ),
        ("MatMul", [Product("gone", "mlp", PATTERN)], "the file has 0 products of its weight"),
    ],
)
def test_products_that_the_file_has_otherwise(node, products, message):
    facts = {"alpha": 2.0} if node == "Gemm" else {}
    made = onnx.helper.make_node(node, ["x", "w"], ["y"], **facts)
    with pytest.raises(sfx.ExportError, match=message):
        rewrite(graph_of(made, torch.randn(4, 6), (2, 4)), products, {})


@pytest.mark.parametrize(
    ("options", "product", "message"),
    [
        ({"estimator": "bernoulli"}, {}, "estimator='bernoulli' draws at random, which a file"),
        ({"estimator": "topk_mean"}, {}, "estimator='topk_mean' can't be written: only 'topk'"),
        ({"mass": 0.5}, {}, "mass=0.5 can't be written: only a ratio can"),
        ({"scores": "estimated"}, {}, "scores='estimated' can't be written: only product, weight"),
        ({}, {"parameter": ""}, "its right operand is no parameter"),
        ({}, {"weight_left": True}, "its weight is the left operand; sampled='exact' exports"),
    ],
)
def test_what_can_not_be_sampled_in_a_file(options, product, message):
    pattern = sfx.Sampled(0.5, inference=True, **options)
    given = {"parameter": "w", "layer": "mlp", "pattern": pattern, **product}
    with pytest.raises(sfx.ExportError, match=rf"'mlp' is sampled at inference.*{message}"):
        check([Product(**given)])


def test_nothing_is_written_of_what_can_not_be_sampled(tmp_path):
    with pytest.raises(sfx.ExportError, match="'0' is sampled at inference"):
        sfx.export_onnx(model(), torch.randn(3, 20), tmp_path / "m.onnx", sampled(mass=0.5))
    assert list(tmp_path.iterdir()) == []
