"""export_onnx of a model that masks weights itself: the file holds what the mask leaves."""

import copy

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import sparsefx as sfx
from sparsefx import masks

ROW = sfx.SparseConfig(rules=[sfx.Rule("*", forward=sfx.NM(2, 4))], codegen="aot_eager")
WIDE = 64  # a weight of 16 kB: the exporter itself computes no tensors of more than 8


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, mask):
        return torch.where(mask, w, 0)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Mask(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w):
        return StraightThrough.apply(w, self.mask)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE))
        self.register_buffer("mask", (torch.rand(WIDE, WIDE) > 0.5).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask)


def around(first):
    return nn.Sequential(first, nn.Tanh(), nn.Linear(WIDE, 32), nn.Tanh(), nn.Linear(32, 4))


def pruned():
    model = around(nn.Linear(WIDE, WIDE))
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model, model[0].weight


def parametrized():
    model = around(nn.Linear(WIDE, WIDE))
    mask = masks.nm_mask(model[0].weight, 1, 4, 1)
    parametrize.register_parametrization(model[0], "weight", Mask(mask))
    return model, model[0].weight


def by_hand():
    model = around(ByHand())
    return model, model[0].weight * model[0].mask


def convolution():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
    prune.random_unstructured(model[0], "weight", 0.75)
    return model, model[0].weight


@pytest.mark.parametrize("make", [pruned, parametrized, by_hand, convolution])
def test_the_file_holds_the_masked_weight(make, run_file, stored, tmp_path):
    model, kept = make()
    x = torch.randn(2, 16, 5, 5) if make is convolution else torch.randn(3, WIDE)
    before, parameters = copy.deepcopy(model.state_dict()), [*model.parameters()]
    report = sfx.export_onnx(model, x, tmp_path / "m.onnx", ROW, weights="dense")

    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    tensors = stored(tmp_path / "m.onnx").values()
    assert any(t.shape == kept.shape and torch.equal(t, kept) for t in tensors)
    assert {t.dtype for t in tensors} == {torch.float32}  # no mask
    operators = {node.op_type for node in onnx.load(str(tmp_path / "m.onnx")).graph.node}
    assert not operators & {"Where", "Mul", "Cast"}
    assert [row.pattern for row in report.rows if row.pattern] == (
        [] if make is convolution else ["2:4 along dim 1"]  # the config's own, of the layer between
    )
    with torch.no_grad():
        y = model.eval()(x)
    torch.testing.assert_close(run_file(tmp_path / "m.onnx", x)[0], _with_rows(model, x, y, make))


def _with_rows(model, x, y, make):
    """What eager gives once the middle layer's weight is 2:4 as the config asks."""
    if make is convolution:
        return y
    with torch.no_grad():
        hidden = torch.tanh(model[0](x))
        w = model[2].weight
        hidden = torch.tanh(F.linear(hidden, w * masks.nm_mask(w, 2, 4, 1), model[2].bias))
        return model[4](hidden)


def test_the_model_trains_on(tmp_path):
    model, _ = pruned()
    x = torch.randn(3, WIDE)
    model(x).sum().backward()
    sfx.export_onnx(model, x, tmp_path / "m.onnx", ROW, verify=False)
    model.zero_grad()
    model(x).sum().backward()
    assert prune.is_pruned(model)
    assert not model[0].weight_orig.grad[model[0].weight_mask == 0].any()
