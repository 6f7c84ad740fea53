"""is_valid, retained, density: right, and specific about what is wrong."""

import math

import pytest
import torch

from sparsefx.errors import MaskError
from sparsefx.masks import density, is_valid, nm_mask, retained, transposable_mask


def test_valid():
    w = torch.randn(8, 12, 3)
    assert is_valid(nm_mask(w, 2, 4, 1), 2, 4, 1)
    assert is_valid(w * nm_mask(w, 2, 4, 1), 2, 4, dim=-2)
    assert is_valid(torch.zeros(4, 8), 1, 4)
    assert is_valid(transposable_mask(w, 2, 4), 2, 4, transposable=True)
    assert is_valid(torch.zeros(0, 8), 2, 4)


def test_a_row_wise_mask_is_not_transposable():
    mask = torch.tensor([[True, True, False, False]]).repeat(4, 2)
    assert is_valid(mask, 2, 4)
    verdict = is_valid(mask, 2, 4, transposable=True)
    assert not verdict
    assert verdict.reason == "[0:4, 0] keeps 4 of m=4 along dim=0, over n=2"


@pytest.mark.parametrize(
    ("at", "arguments", "reason"),
    [
        ((1, slice(4, 7)), (2, 4), "[1, 4:8] keeps 3 of m=4 along dim=1, over n=2"),
        ((slice(4, 8), 3), (2, 4, 0), "[4:8, 3] keeps 4 of m=4 along dim=0, over n=2"),
        ((0, slice(0, 0)), (2, 5), "size 8 along dim=-1 is not a multiple of m=5"),
    ],
)
def test_reason(at, arguments, reason):
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[at] = True
    verdict = is_valid(mask, *arguments)
    assert (verdict.ok, verdict.reason) == (False, reason)


def test_reason_in_a_cut_tile_and_in_a_tap():
    mask = torch.zeros(6, 7, 3, dtype=torch.bool)
    mask[5, 4:7, 2] = True
    verdict = is_valid(mask, 2, 4, transposable=True)
    assert verdict.reason == "[5, 4:8, 2] keeps 3 of m=4 along dim=1, over n=2"


def test_a_nan_counts_as_kept():
    assert not is_valid(torch.tensor([math.nan, 1.0, 1.0, 0.0]), 2, 4)


def test_retained_and_density():
    w = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    mask = nm_mask(w, 2, 4)
    assert retained(w, mask) == pytest.approx(0.7)
    assert density(mask) == 0.5
    assert retained(torch.zeros(4), torch.zeros(4, dtype=torch.bool)) == 1.0
    assert retained(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == 1.0
    assert density(torch.zeros(0)) == 1.0
    assert math.isnan(retained(w / 0 * 0, mask))


def test_retained_adds_up_in_float64():
    w = torch.ones(70000, dtype=torch.float16)  # the total is past the largest float16
    assert retained(w, nm_mask(w, 1, 2)) == 0.5


def test_messages():
    w, meta = torch.randn(4, 8), torch.empty(4, 8, device="meta")
    with pytest.raises(
        MaskError, match=r"mask is torch.float32 of shape \(4, 8\); pass torch.bool"
    ):
        retained(w, w)
    with pytest.raises(MaskError, match=r"shape \(8,\); pass torch.bool of w's shape \(4, 8\)"):
        retained(w, torch.ones(8, dtype=torch.bool))
    with pytest.raises(MaskError, match=r"torch.int64 tensor is not defined"):
        retained(w.long(), w > 0)
    with pytest.raises(MaskError, match="is_valid needs values"):
        is_valid(meta, 2, 4)
    with pytest.raises(MaskError, match="density needs values"):
        density(meta)
    with pytest.raises(MaskError, match="retained needs values"):
        retained(meta, w > 0)
    with pytest.raises(MaskError, match=r"shape \(8,\) has 1"):
        is_valid(w[0], 2, 4, transposable=True)
    with pytest.raises(MaskError, match="n=4 of every m=4"):
        is_valid(w, 4, 4)
