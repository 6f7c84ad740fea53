"""Wanda: scores by hand, masks of the scores, weights as they were."""

import pytest
import torch
from torch import nn

from sparsefx.errors import ConfigError
from sparsefx.masks import is_valid, nm_mask, transposable_mask
from sparsefx.sparsifiers import Wanda
from sparsefx.sparsifiers.wanda import wanda_scores


def test_scores_are_magnitude_times_norm():
    w, x = torch.randn(3, 4), torch.randn(4, 50)
    expected = w.abs() * x.norm(dim=1)
    torch.testing.assert_close(wanda_scores(w, x @ x.T), expected.double())


def test_a_small_weight_on_a_loud_input_stays():
    fc = nn.Linear(4, 1, bias=False)
    fc.weight.data = torch.tensor([[1.0, 0.9, 0.5, 0.1]])
    x = torch.tensor([[1.0, 1.0, 0.1, 100.0]])
    sparsifier = Wanda(fc, 2, 4)
    assert sparsifier.masks()["weight"].tolist() == [[True, True, False, False]]
    sparsifier.calibrate([x])
    assert sparsifier.masks()["weight"].tolist() == [[True, False, False, True]]
    sparsifier.squash()
    torch.testing.assert_close(fc.weight, torch.tensor([[1.0, 0.0, 0.0, 0.1]]))


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4)])
def test_linear_mask(n: int, m: int, transposable: bool):
    fc = nn.Linear(16, 24)
    w = fc.weight.detach().clone()
    x = torch.randn(64, 16) * torch.rand(16).exp() ** 3
    sparsifier = Wanda(fc, n, m, transposable=transposable)
    sparsifier.calibrate([x[:40], x[40:]])
    scores = w.double().abs() * x.double().norm(dim=0)
    mask = transposable_mask(scores, n, m) if transposable else nm_mask(scores, n, m)
    assert torch.equal(sparsifier.masks()["weight"], mask)
    sparsifier.squash()
    torch.testing.assert_close(fc.weight.detach(), torch.where(mask, w, 0.0), rtol=0, atol=0)
    assert is_valid(fc.weight, n, m, dim=1, transposable=transposable)


@pytest.mark.parametrize("transposable", [False, True])
def test_grouped_conv_has_norms_of_its_own_windows(transposable: bool):
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    w = conv.weight.detach().clone()
    x = torch.randn(5, 8, 6, 6)
    x[:, 1] *= 30
    x[:, 6, 0] *= 50  # the top row, which bottom taps see less of
    sparsifier = Wanda(conv, 2, 4, transposable=transposable)
    sparsifier.calibrate([x])
    columns = nn.functional.unfold(x.double(), 3, padding=1)  # [B, 8 * 9, T]
    norms = columns.square().sum((0, 2)).sqrt().view(2, 4, 3, 3)
    scores = w.double().abs() * norms.repeat_interleave(8, 0)
    mask = transposable_mask(scores, 2, 4) if transposable else nm_mask(scores, 2, 4, dim=1)
    assert torch.equal(sparsifier.masks()["weight"], mask)


def test_hugging_face_conv1d_is_masked_along_its_inputs():
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    x = torch.randn(3, 5, 8) * torch.arange(1.0, 9)
    expected = nm_mask(module.weight.detach().t().double().abs() * x.norm(dim=(0, 1)), 2, 4).t()
    sparsifier = Wanda(module, 2, 4)
    sparsifier.calibrate([x])
    assert torch.equal(sparsifier.masks()["weight"], expected)
    sparsifier.squash()
    assert is_valid(module.weight, 2, 4, dim=0)


def test_one_column_of_all_zero_inputs_loses_its_weights_first():
    fc = nn.Linear(8, 4)
    x = torch.randn(20, 8)
    x[:, 3] = 0
    sparsifier = Wanda(fc, 3, 4)
    sparsifier.calibrate([x])
    assert not sparsifier.masks()["weight"][:, 3].any()


def test_bad_pattern_leaves_the_model_alone(mlp, snapshot):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ConfigError, match="n=4 must be between 1 and m-1=3"):
        Wanda(model, 4, 4)
    before.assert_same()
