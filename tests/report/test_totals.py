"""Totals: the arithmetic by hand, and saved bytes against what autograd really saves."""

import pytest
import torch
from torch import nn

import sparsefx as sfx
from sparsefx import NM, Dense, Rule, Sampled, SparseConfig
from sparsefx.report import Flops


def config(*rules: Rule, **options) -> SparseConfig:
    return SparseConfig(rules=rules, codegen="aot_eager", **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_flops_and_weights_by_hand():
    rule = Rule("*", forward=NM(1, 4), grad_weight=Sampled(0.5))
    cfg = config(rule, keep_output_dense=False)
    totals = sfx.explain(mlp(), config=cfg)(torch.randn(6, 8)).totals
    first, second = 2 * 6 * 16 * 8, 2 * 6 * 4 * 16  # the input needs no gradient
    assert totals.flops == {
        "forward": Flops(first + second, (first + second) // 4, first + second),
        "grad_input": Flops(second, second // 4, second),
        "grad_weight": Flops(first + second, (first + second) // 2, (first + second) // 2),
        "all": Flops(
            2 * first + 3 * second,
            (first + second) // 4 + second // 4 + (first + second) // 2,
            first + 2 * second + (first + second) // 2,
        ),
    }
    weights = 8 * 16 + 16 * 4
    assert totals.weight_bytes == weights * 4
    assert totals.packed_bytes == weights // 4 * 4 + weights // 4 * 2 // 8  # 2 bits an index
    assert totals.unknown == 0


def test_a_derived_gradient_counts_its_forwards_sample():
    """min_k keeps 6 of the forward's 8 pairs, so its gradients keep 6 of 8 as well."""
    rule = Rule("2", forward=Sampled(0.1, min_k=6))
    cfg = config(rule, keep_output_dense=False)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 40))
    report = sfx.explain(model, config=cfg)(torch.randn(10, 8))
    assert {r.role: r.flops_sparse for r in report.sites if r.layer == "2"} == dict.fromkeys(
        ("forward", "grad_input", "grad_weight"), 2 * 10 * 40 * 6
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16, bias=False)
        self.down = nn.Linear(16, 16, bias=False)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.parametrize(("match", "packed"), [("*", 16 * 16 * 2 + 128 * 2 // 8), ("up", 1024)])
def test_a_tied_weight_counts_once_and_whole_if_any_use_is_dense(match, packed):
    cfg = config(Rule(match, forward=NM(2, 4)), keep_output_dense=False)
    totals = sfx.explain(Tied(), config=cfg)(torch.randn(4, 16)).totals
    assert (totals.weight_bytes, totals.packed_bytes) == (16 * 16 * 4, packed)


def test_an_inference_graph_saves_nothing():
    with torch.no_grad():
        totals = sfx.explain(mlp(), config="2:4")(torch.randn(6, 8)).totals
    assert (totals.saved_bytes, totals.saved_bytes_sparse) == (0, 0)
    assert totals.flops["grad_weight"] == Flops()


def really_saved(model: nn.Module, cfg: SparseConfig, x: torch.Tensor) -> int:
    """Bytes that autograd is handed to keep, parameters and inputs apart."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparsefx", options={"config": cfg})
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = compiled(x)
    out.sum().backward()
    return sum(kept.values())


def stack(width: int = 64, depth: int = 3) -> nn.Module:
    layers = [part for _ in range(depth) for part in (nn.GELU(), nn.Linear(width, width))]
    return nn.Sequential(nn.Linear(width, width), *layers)


def test_saved_bytes_fall_with_the_ratio():
    model, x = stack(), torch.randn(512, 64)
    told, found = [], []
    for ratio in (1.0, 0.5, 0.3, 0.1):
        cfg = config(Rule("*", forward=Sampled(ratio)), keep_output_dense=False)
        totals = sfx.explain(model, config=cfg)(x).totals
        told.append(totals.saved_bytes_sparse)
        found.append(really_saved(model, cfg, x))
        assert totals.saved_bytes == told[0]  # ratio 1 is exactly dense
    assert told == found
    # three GELU outputs of 512 x 64 shrink with the ratio; their inputs are kept whole
    whole = 512 * 64 * 4
    assert told[0] == 6 * whole
    for ratio, now in zip((0.5, 0.3, 0.1), told[1:], strict=True):
        k = int(ratio * 64)
        assert now == pytest.approx(3 * whole + 4 * 512 * k * 4, rel=0.1)
    assert told == sorted(told, reverse=True)


def test_dense_saves_the_same():
    cfg = config(Rule("*", forward=Dense()))
    model, x = stack(), torch.randn(64, 64)
    totals = sfx.explain(model, config=cfg)(x).totals
    assert totals.saved_bytes == totals.saved_bytes_sparse == really_saved(model, cfg, x)


@pytest.mark.parametrize("ratio", [0.3, 0.1])
def test_rows_that_the_input_chooses_are_all_that_is_saved(ratio):
    """Layers without anything between them keep their inputs for grad_weight alone."""
    rows, width, layers = 600, 64, 4
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    x = torch.randn(rows, width)
    pattern = Sampled(ratio, estimator="systematic", scores="input")
    cfg = config(Rule("*", grad_weight=pattern), keep_output_dense=False)
    totals = sfx.explain(model, config=cfg)(x).totals
    k, inner = pattern.k(rows), layers - 1
    assert totals.saved_bytes == inner * rows * width * 4  # the first input is the user's own
    indices_and_scales = layers * k * (8 + 4)
    expected = layers * k * width * 4 + indices_and_scales
    assert totals.saved_bytes_sparse == pytest.approx(expected, rel=0.03)
    assert totals.saved_bytes_sparse == really_saved(model, cfg, x)
