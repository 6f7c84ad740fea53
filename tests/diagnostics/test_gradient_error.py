"""gradient_error: against hand computations, and what it leaves behind."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sparsefx as sfx
from sparsefx.diagnostics import gradient_error
from sparsefx.errors import DiagnosticsError

BACKWARD = sfx.Sampled(0.5, estimator="systematic")


def every(**patterns):
    return sfx.SparseConfig([sfx.Rule("*", **patterns)], keep_output_dense=False)


def squared(model, batch):
    return model(batch).square().sum()


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(12, 7, bias=False).double(), torch.randn(20, 12, dtype=torch.float64)


def test_top_k_rows_by_hand(linear):
    model, x = linear
    found = gradient_error(model, x, every(grad_weight=sfx.Sampled(0.5)), loss=squared)
    grad = 2 * (x @ model.weight.detach().t())  # dL/dy
    exact = grad.t() @ x
    kept = (grad.norm(dim=1) * x.norm(dim=1)).topk(10).indices
    sampled = grad[kept].t() @ x[kept]
    row, off = found["weight"], sampled - exact
    assert found.draws == 1
    assert row.relative == pytest.approx(float(off.norm() / exact.norm()))
    assert row.bias == pytest.approx(row.relative)
    assert row.noise == 0
    assert row.mean == pytest.approx(float(off.mean()))
    assert row.std == pytest.approx(float(off.std(correction=0)))
    assert row.max == pytest.approx(float(off.abs().max()))
    assert row.norm == pytest.approx(float(exact.norm()))
    cosine = float((sampled * exact).sum() / sampled.norm() / exact.norm())
    assert row.cosine == pytest.approx(cosine)
    assert found.total.relative == pytest.approx(row.relative)  # the only parameter


def test_all_pairs_are_no_error(linear):
    model, x = linear
    found = gradient_error(model, x, every(forward=sfx.Sampled(1.0)), loss=squared)
    row = found["weight"]
    assert (row.relative, row.max, row.mean, row.bias, row.noise, row.cosine) == (0, 0, 0, 0, 0, 1)


def test_an_unbiased_estimator_is_noise_and_little_bias(linear):
    model, x = linear
    rows = every(grad_weight=sfx.Sampled(0.5, estimator="bernoulli"))
    few = gradient_error(model, x, rows, loss=squared, draws=4)["weight"]
    many = gradient_error(model, x, rows, loss=squared, draws=64)["weight"]
    assert few.noise > 0.1
    assert many.bias < 3.5 * many.noise / 64**0.5
    assert many.bias < few.bias
    assert many.relative**2 == pytest.approx(many.bias**2 + many.noise**2)
    again = gradient_error(model, x, rows, loss=squared, draws=4)["weight"]
    other = gradient_error(model, x, rows, loss=squared, draws=4, seed=9)["weight"]
    assert again == few
    assert other != few


class Net(nn.Module):
    """Batch norm, dropout, a parameter that is shared, one that is unused, one that is frozen."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.one, self.two = nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.unused = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x)).relu()).mean((2, 3)) * self.frozen
        return self.two(self.one(x).relu())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    torch.manual_seed(1)
    model, x = Net(), torch.randn(6, 3, 6, 6)
    model.two.eval()
    model.one.weight.grad = torch.ones(8, 8)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    calls = []

    def loss(run, batch):
        calls.append(run)
        if fails and len(calls) == 3:
            raise RuntimeError("no loss today")
        return run(batch).square().mean()

    with torch.no_grad():  # gradients are taken all the same
        if fails:
            with pytest.raises(RuntimeError, match="no loss today"):
                gradient_error(model, x, every(grad_weight=BACKWARD), loss=loss)
        else:
            found = gradient_error(model, x, every(grad_weight=BACKWARD), loss=loss, draws=2)
            assert "unused" not in [row.parameter for row in found.rows]
            assert found["one.weight"].relative > 0
            assert found["norm.bias"].relative < 1e-5  # sums stay exact
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(model.one.weight.grad, torch.ones(8, 8))
    assert model.conv.weight.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_hugging_face_batch_has_its_loss():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.randint(0, 50, (4, 8)), "labels": torch.tensor([0, 1, 1, 0])}
    preset = gradient_error(model, batch, "sampled-backward-0.3", draws=2)
    assert preset["bert.encoder.layer.0.intermediate.dense.weight"].relative > 0
    text = str(preset)
    assert "gradients against exact ones, 2 draws" in text
    assert "classifier.bias" in text
    assert preset.to_dict()["rows"][0]["parameter"] == preset.rows[0].parameter


def test_dropout_is_the_same_in_every_run():
    """In a module or in a function: what is not sampled has no error at all."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

        def forward(self, x):
            return F.dropout(self.two(self.drop(self.one(x).relu())), 0.3, self.training)

    config = sfx.SparseConfig([sfx.Rule("one", grad_weight=BACKWARD)])
    found = gradient_error(Dropping(), torch.randn(9, 8), config, loss=squared, draws=3)
    assert found["one.weight"].noise > 0.1
    for name in ("one.bias", "two.weight", "two.bias"):
        assert (found[name].relative, found[name].max, found[name].cosine) == (0, 0, 1), name
        assert found[name].norm > 0
    other = gradient_error(Dropping(), torch.randn(9, 8), config, loss=squared, draws=3, seed=1)
    assert other["two.weight"].relative == 0


def test_a_picture(tmp_path, linear):
    model, x = linear
    found = gradient_error(model, x, every(grad_weight=BACKWARD), loss=squared, draws=2)
    path = tmp_path / "errors.png"
    found.plot(str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws=0 must be an int, at least 1"),
        ({"draws": True}, "draws=True must be an int, at least 1"),
        ({"model": F.relu}, "must be a torch.nn.Module"),
        ({"model": nn.ReLU()}, "no parameter of ReLU requires a gradient"),
        ({"loss": None}, r"returns Tensor of shape \[20, 7\], which holds no loss: pass loss="),
        ({"loss": lambda m, b: m(b)}, r"loss returned shape \[20, 7\], requires_grad=True"),
        ({"loss": lambda m, b: 3}, "loss returned int, requires_grad=False"),
        ({"loss": lambda m, b: m(b).sum().detach()}, r"loss returned shape \[\], requires_grad=F"),
    ],
)
def test_what_it_refuses(linear, arguments, message):
    model, x = linear
    given = {"model": model, "batch": x, "config": every(forward=BACKWARD), "loss": squared}
    with pytest.raises(DiagnosticsError, match=message):
        gradient_error(**{**given, **arguments})


def test_a_parameter_that_is_none(linear):
    model, x = linear
    found = gradient_error(model, x, every(), loss=squared)
    with pytest.raises(DiagnosticsError, match="no parameter 'bias'; there are: weight"):
        found["bias"]
