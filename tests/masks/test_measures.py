"""is_valid, retained, density: right, and specific about what is wrong."""

import math

import pytest
import torch

from sparsefx.errors import MaskError
from sparsefx.masks import density, is_valid, magnitudes, nm_mask, retained, sad, transposable_mask


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
    assert verdict.reason == (
        "[0:4, 0] keeps 4 of m=4 along dim=0, over n=2: W^T breaks the pattern in tile (0, 0)"
    )


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
    assert verdict.reason == (
        "[5, 4:8, 2] keeps 3 of m=4 along dim=1, over n=2: W breaks the pattern in tile (1, 1)"
    )


def test_the_first_bad_tile_is_named_whichever_side_breaks():
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[4:7, 1] = True  # tile (1, 0), W^T
    mask[7, 8:] = True  # tile (1, 2), W
    verdict = is_valid(mask, 2, 4, transposable=True)
    assert verdict.reason.endswith("W^T breaks the pattern in tile (1, 0)")
    mask[3, 8:11] = True  # tile (0, 2), W
    verdict = is_valid(mask, 2, 4, transposable=True)
    assert verdict.reason.startswith("[3, 8:12] keeps 3")
    assert verdict.reason.endswith("W breaks the pattern in tile (0, 2)")
    assert is_valid(mask.t()[8:], 2, 4, transposable=True).reason.startswith("[0:4, 3] keeps 3")


def test_exactly_n():
    mask = nm_mask(torch.randn(3, 8), 2, 4)
    assert is_valid(mask, 2, 4, exact=True)
    mask[1, 4:] = torch.tensor([False, True, False, False])
    assert is_valid(mask, 2, 4)
    verdict = is_valid(mask, 2, 4, exact=True)
    assert verdict.reason == "[1, 4:8] keeps 1 of m=4 along dim=1, under n=2"
    tiles = transposable_mask(torch.randn(6, 8), 2, 4)
    assert is_valid(tiles, 2, 4, transposable=True, exact=True)
    tiles[5, 4:] = False
    assert is_valid(tiles, 2, 4, transposable=True)
    verdict = is_valid(tiles, 2, 4, transposable=True, exact=True)
    assert verdict.reason == "tile (1, 1) holds 2 of the 4 that n=2 of m=4 allow"


@pytest.mark.parametrize("dtype", magnitudes.ALL, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_every_dtype(dtype):
    w = torch.tensor([[1, 0, 2, 0], [0, 1, 0, 0]]).to(dtype)
    assert is_valid(w, 2, 4)
    assert not is_valid(w, 1, 4)
    assert density(w) == 0.375
    assert retained(w, nm_mask(w, 1, 4)) == pytest.approx(2 / 3 if dtype == torch.bool else 0.75)


def test_flips_between_two_masks():
    w = torch.randn(8, 16)
    one, other = nm_mask(w, 2, 4), nm_mask(w + 0.3 * torch.randn(8, 16), 2, 4)
    assert sad(one, other) == int((one.double() - other.double()).abs().sum()) > 0
    assert sad(one, other) == sad(other, one) == sad(w * one, other)
    assert sad(one, one) == sad(one[:0], one[:0]) == 0


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
    packed = torch.empty(4, 8, dtype=torch.float4_e2m1fn_x2)
    with pytest.raises(MaskError, match=r"float4_e2m1fn_x2 tensor is not defined"):
        retained(packed, w > 0)
    with pytest.raises(MaskError, match=r"shape \(4, 8\) on cpu and \(8, 4\) on cpu can't be"):
        sad(w, w.t())
    with pytest.raises(MaskError, match=r"\(4, 8\) on cpu and \(4, 8\) on meta can't be compared"):
        sad(w, meta)
    with pytest.raises(MaskError, match="sad needs values"):
        sad(meta, meta)
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
