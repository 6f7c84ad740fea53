"""find_pattern: the tightest pattern that the zeros hold, or none."""

import pytest
import torch

from sparsefx.errors import MaskError
from sparsefx.masks import FoundPattern, find_pattern, nm_mask, transposable_mask


@pytest.mark.parametrize(
    ("n", "m"),
    [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (8, 16), (3, 16), (16, 32), (1, 32)],
)
def test_what_masks_were_made_for_is_found(n, m):
    w = torch.randn(64, 128)
    assert find_pattern(nm_mask(w, n, m)) == FoundPattern(n, m, False)
    assert find_pattern(w * nm_mask(w, n, m, 0), dim=0) == FoundPattern(n, m, False)
    mask = transposable_mask(w, n, m)
    for form in (mask, w * mask, mask.float(), (w * mask).bfloat16()):
        assert find_pattern(form) == FoundPattern(n, m, True)
    assert find_pattern(mask, 0) == FoundPattern(n, m, True)


def test_conv_weights_run_along_input_channels():
    w = torch.randn(16, 32, 3, 3)
    assert str(find_pattern(w * nm_mask(w, 2, 4, 1))) == "2:4"
    assert find_pattern(w * nm_mask(w, 2, 4, 0), dim=0) == FoundPattern(2, 4, False)
    assert find_pattern(w * nm_mask(w, 2, 4, 0)) != FoundPattern(2, 4, False)
    assert str(find_pattern(w * transposable_mask(w, 2, 4))) == "2:4 transposable"
    assert str(find_pattern(w * transposable_mask(w, 4, 8))) == "4:8 transposable"


def test_of_equals_the_smallest_group_and_the_tightest_of_all():
    row = torch.tensor([[1, 0, 0, 1, 0, 0, 0, 0]])
    assert str(find_pattern(row)) == "2:8"  # 1:2 and 2:4 hold, too
    assert str(find_pattern(row[:, :4].repeat(1, 4))) == "1:2"
    assert str(find_pattern(torch.tensor([[1, 1, 0, 0]]).repeat(1, 4))) == "2:4"


def test_dense_and_unstructured_weights_hold_none():
    w = torch.randn(32, 64)
    assert find_pattern(w) is None
    w[3, :10] = 0
    assert find_pattern(w) is None
    assert find_pattern(torch.randn(8, 7) * torch.zeros(7)) is None  # 7 has no such group
    assert find_pattern(torch.zeros(0, 8)) is None


def test_all_zero_and_one_dimension():
    assert str(find_pattern(torch.zeros(32, 32))) == "1:32 transposable"
    assert find_pattern(torch.tensor([1.0, 0, 0, 2]), dim=0) == FoundPattern(1, 2, False)


def test_transposable_asks_for_whole_tiles():
    mask = transposable_mask(torch.randn(6, 8), 2, 4)
    assert str(find_pattern(mask)) == "2:4"


def test_nan_counts_as_kept():
    w = torch.tensor([[1.0, torch.nan, 0, 0]])
    assert str(find_pattern(w)) == "2:4"


def test_messages():
    with pytest.raises(MaskError, match="find_pattern needs values"):
        find_pattern(torch.zeros(4, 4, device="meta"))
    with pytest.raises(MaskError, match=r"dim=1 is not a dimension of shape \(4,\)"):
        find_pattern(torch.zeros(4))
    with pytest.raises(MaskError, match=r"dim=1\.0 is of type float"):
        find_pattern(torch.zeros(4, 4), 1.0)
