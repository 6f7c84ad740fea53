"""_tiles: every choice fits the chip and the pattern, and turns where the reasoning says."""

import pytest

from sparsefx.kernels import _tiles

SIZES = [1, 3, 16, 65, 300, 4096]
CHIPS = {"h200": _tiles.Chip(227 * 1024, 132), "small": _tiles.Chip(64 * 1024, 20)}


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("group", [1, 2, 8, 32])
def test_gemm_fits(chip, itemsize, group):
    for rows in SIZES:
        for cols in SIZES:
            for depth in (0, *SIZES):
                t = _tiles.gemm(rows, cols, depth, itemsize, group, chip)
                sides = t["BM"], t["BN"], t["BK"]
                assert all(side & (side - 1) == 0 and side >= 16 for side in sides)
                assert t["BN"] % group == t["BK"] % group == 0  # a group lies in one tile
                stage = (t["BM"] + t["BN"]) * t["BK"] * itemsize
                masked = t["BN"] * t["BK"] * itemsize
                assert t["num_stages"] * stage + masked <= chip.shared
                assert t["BM"] * t["BN"] / (32 * t["num_warps"]) <= 64  # sums held by a thread


def test_a_small_grid_takes_narrower_tiles():
    chip = CHIPS["h200"]
    assert _tiles.gemm(4096, 4096, 4096, 2, 4, chip)["BN"] == 128
    assert _tiles.gemm(128, 4096, 4096, 2, 4, chip)["BN"] == 32


@pytest.mark.parametrize(("size", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (32, 32), (33, 64)])
def test_power_of_2(size, power):
    assert _tiles.power_of_2(size) == power


def test_few_rows_mask_inside_and_many_outside():
    assert _tiles.mask_in_gemm(16, 4096, 4096, 2, 2, 4)
    assert not _tiles.mask_in_gemm(4096, 4096, 4096, 2, 2, 4)
    assert not _tiles.mask_in_gemm(4096, 4096, 4096, 4, 16, 32)


def test_small_sides_gather_inside_and_large_outside():
    assert _tiles.columns_in_gemm(64, 512, 150, 2)
    assert not _tiles.columns_in_gemm(4096, 4096, 1229, 2)
    assert _tiles.rows_in_gemm(512, 512, 512, 2, copies=1)
    assert not _tiles.rows_in_gemm(8192, 8192, 8192, 2, copies=2)
    assert _tiles.rows_in_gemm(0, 0, 0, 4, copies=1)
