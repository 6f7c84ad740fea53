"""AdaPrune: what it gains on the toy of the plan, against the data, and in whole nets."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.masks import is_valid, nm_mask, transposable_mask
from sparsefx.sparsifiers import AdaPrune, SparseGPT, Wanda, least_squares


def toy(seed: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A 128 -> 64 layer and two sets of inputs: ReLUs of 64 mixed latent variables and noise."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(64, 128, generator=g) / 8
    fc = nn.Linear(128, 64, bias=False)
    fc.weight.data = torch.randn(64, 128, generator=g) / 128**0.5
    latent, noise = torch.randn(4096, 64, generator=g), torch.randn(4096, 128, generator=g)
    x, held_out = (latent @ mix + 0.5 * noise).relu().split(2048)
    return fc, x, held_out


def held_out_errors(sparsify, seed: int, **options) -> tuple[float, float]:
    """|y' - y|^2 / |y|^2 of plain magnitude pruning and of the method."""
    fc, x, held_out = toy(seed)
    wanted = fc(held_out).detach()
    sparsifier = sparsify(fc, 2, 4, **options)

    @torch.no_grad()
    def error() -> float:
        return float((fc(held_out) - wanted).square().sum() / wanted.square().sum())

    plain = error()
    sparsifier.calibrate(x.split(256))
    return plain, error()


@pytest.mark.parametrize(
    ("method", "options", "most"),
    [
        pytest.param(AdaPrune, {}, 0.089, id="least squares"),
        pytest.param(AdaPrune, {"method": "adam"}, 0.089, id="adam"),
        pytest.param(AdaPrune, {"sequential": False}, 0.089, id="independent"),
        pytest.param(SparseGPT, {}, 0.095, id="SparseGPT"),
        pytest.param(Wanda, {}, 0.155, id="Wanda"),
    ],
)
def test_toy_on_held_out_data(method, options: dict, most: float):
    plain, after = held_out_errors(method, seed=5, **options)
    assert 0.145 < plain < 0.16
    assert after <= most
    if method is AdaPrune:
        assert after <= 0.59 * plain


@pytest.mark.parametrize("seed", range(5))
def test_ratio_to_plain_pruning(seed: int):
    plain, after = held_out_errors(AdaPrune, seed)
    assert after <= 0.59 * plain


def small_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize("method", ["least_squares", "adam"])
def test_sequential_layers_aim_at_the_dense_net(method: str):
    """By hand: dense inputs for the targets, the pruned net's inputs for the weights."""
    model = small_net().double()
    dense = copy.deepcopy(model)
    x = torch.randn(60, 8, dtype=torch.float64)
    AdaPrune(model, 2, 4, method=method, damping=0.02, steps=300).calibrate(x.split(20))
    with torch.no_grad():
        for i in (0, 2, 4):
            theirs, own = dense[:i](x).T, model[:i](x).T
            w = dense[i].weight
            mask = nm_mask(w, 2, 4)
            expected = least_squares(w, own @ own.T, mask, theirs @ own.T, 0.02)
            if method == "least_squares":
                torch.testing.assert_close(model[i].weight, expected)
            plain, best, got = (
                float((v @ own - w @ theirs).square().sum())
                for v in (torch.where(mask, w, 0.0), expected, model[i].weight)
            )
            assert got < plain
            assert got < best + 0.6 * (plain - best)


def test_independent_layers_see_the_dense_net():
    model = small_net().double()
    dense = copy.deepcopy(model)
    x = torch.randn(60, 8, dtype=torch.float64)
    AdaPrune(model, 2, 4, sequential=False, damping=0.02).calibrate(iter(x.split(20)))
    with torch.no_grad():
        for i in (0, 2, 4):
            inputs, w = dense[:i](x).T, dense[i].weight
            expected = least_squares(w, inputs @ inputs.T, nm_mask(w, 2, 4), damping=0.02)
            torch.testing.assert_close(model[i].weight, expected)


def test_report_is_the_relative_error_on_the_data():
    model = small_net().double()
    dense = copy.deepcopy(model)
    x = torch.randn(60, 8, dtype=torch.float64)
    sparsifier = AdaPrune(model, 2, 4)
    rows = {row.layer: row for row in sparsifier.calibrate(x.split(30)).rows}
    assert list(rows) == ["0", "2", "4"]
    with torch.no_grad():
        for i in (0, 2, 4):
            w = dense[i].weight
            wanted, inputs = dense[:i](x) @ w.T, model[:i](x)
            row = rows[str(i)]
            for value, v in (
                (row.before, torch.where(nm_mask(w, 2, 4), w, 0.0)),
                (row.after, model[i].weight),
            ):
                error = (inputs @ v.T - wanted).square().sum() / wanted.square().sum()
                assert value == pytest.approx(float(error), rel=1e-6)
            assert row.inputs == 60
            assert row.after < row.before
    text = str(sparsifier.calibration)
    assert text.splitlines()[0].split() == ["layer", "inputs", "magnitude", "calibrated"]
    assert f"{rows['2'].after:.4f}" in text
    assert sparsifier.calibration.to_dict()["rows"][0]["layer"] == "0"


@pytest.mark.parametrize("transposable", [False, True])
def test_masks_are_the_magnitudes(transposable: bool):
    model = small_net()
    weights = [model[i].weight.detach().clone() for i in (0, 2, 4)]
    sparsifier = AdaPrune(model, 2, 4, transposable=transposable)
    sparsifier.calibrate([torch.randn(30, 8)])
    for w, mask in zip(weights, sparsifier.masks().values(), strict=True):
        expected = transposable_mask(w, 2, 4) if transposable else nm_mask(w, 2, 4)
        assert torch.equal(mask, expected)


def test_masks_of_ones_own():
    model = small_net()
    mask = nm_mask(torch.randn(12, 8), 2, 4)
    sparsifier = AdaPrune(model, 2, 4, rules=["0"], masks={"0": mask})
    sparsifier.calibrate([torch.randn(30, 8)])
    assert torch.equal(sparsifier.masks()["0"], mask)
    assert torch.equal(model[0].weight != 0, mask)


def test_transposable_conv_net_and_batch_norm():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2, stride=2),
        nn.Flatten(),
        nn.Linear(72, 4),
    ).double()
    x = torch.randn(40, 4, 8, 8, dtype=torch.float64).cumsum(2)
    sparsifier = AdaPrune(model, 2, 4, transposable=True)
    rows = sparsifier.calibrate(x.split(10)).rows
    assert all(row.after < 0.8 * row.before for row in rows)
    assert [row.inputs for row in rows] == [40 * 64, 40 * 9, 40]
    sparsifier.squash()
    for i in (0, 3, 5):
        assert is_valid(model[i].weight, 2, 4, dim=1, transposable=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sgd"}, "method='sgd' is unknown; pass 'least_squares' or 'adam'"),
        ({"damping": -1}, "damping=-1 must be finite and >= 0"),
        ({"lr": -1.0}, "lr=-1.0 must be a positive number"),
        ({"steps": 0}, "steps=0 must be an int of at least 1"),
        ({"sequential": "yes"}, "sequential='yes' must be True or False"),
        ({"progress": 1}, "progress=1 must be True or False"),
        ({"m": 5}, "no layer is left"),
        ({"rules": ["nothing"]}, "matches no layer"),
    ],
)
def test_bad_arguments_leave_the_model_alone(options: dict, message: str, mlp, snapshot):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=message):
        AdaPrune(model, **options)
    before.assert_same()
