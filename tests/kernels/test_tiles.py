"""_tiles: every choice fits the chip and the pattern, and turns where the reasoning says."""

import itertools

import pytest

from sparsefx.kernels import _tiles
from sparsefx.ops.packed import code_bits

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


PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 5), (4, 6), (5, 12), (4, 16), (3, 17), (16, 32), (31, 32)]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_packed_tiles_fit(n, m, chip):
    chunk = 8 // code_bits(m) * _tiles.power_of_2(m)  # lanes whose codes are whole bytes
    for itemsize, rows, outputs in itertools.product([2, 4], [0, 1, 3, 17, 64], SIZES):
        for groups in (0, 1, 40, 4096 // m):
            t = _tiles.packed_gemm(rows, outputs, groups * m, itemsize, n, m, chip)
            bm, bn, bk = t["BM"], t["BN"], t["BK"]
            assert bk % chunk == 0
            assert min(bn, bk) >= 16
            assert bm >= 16 if t["DOT"] else itemsize == 4 and rows <= bm <= 4
            assert rows <= bm  # the weight is expanded once
            assert bm * bn * (1 if t["DOT"] else bk) / 128 <= 64  # sums held by a thread
            assert bn * bk * _tiles.power_of_2(n) / 128 <= 128  # candidates
            held = bn * bk * _tiles.power_of_2(n) / _tiles.power_of_2(m)
            stage = (held + bm * bk) * itemsize + held * code_bits(m) / 8
            assert t["STAGES"] * stage + bn * bk * itemsize <= chip.shared
            tiles = -(-groups // (bk // _tiles.power_of_2(m)))
            assert (t["splits"] - 1) * t["each"] < max(tiles, 1) <= t["splits"] * t["each"]


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_tiles_of_packing_hold_whole_chunks(n, m):
    chunk = 8 // code_bits(m) * _tiles.power_of_2(m)
    for rows, depth in itertools.product((1, 37, 4096), repeat=2):
        t = _tiles.pack_tile(rows, depth, n, m)
        assert 16 <= t["A"] * t["C"] * chunk <= 2048
        t = _tiles.unpack_tile(depth, m)
        assert t["G"] * _tiles.power_of_2(m) % chunk == 0
        assert t["A"] * t["G"] * _tiles.power_of_2(m) <= 4096
    t = _tiles.pack_both_tile(n, m)
    assert (t["CR"] * chunk, t["CK"] * chunk) == (32, 32)


def test_depth_is_split_where_few_programs_would_run():
    chip = CHIPS["h200"]
    assert _tiles.packed_gemm(1, 4096, 4096, 2, 2, 4, chip)["splits"] == 5
    assert _tiles.packed_gemm(1, 32768, 4096, 2, 2, 4, chip)["splits"] == 1
    # sums of 64 rows in float32 cost what they save
    assert _tiles.packed_gemm(64, 4096, 4096, 2, 2, 4, chip)["splits"] == 2
    assert _tiles.packed_gemm(1, 64, 256, 2, 2, 4, chip)["splits"] == 1  # 4 tiles in all


def test_few_rows_stream_a_packed_weight_and_many_unpack_it():
    for n, m in [(2, 4), (1, 4), (1, 2)]:
        assert _tiles.packed_in_gemm(1, 4096, 4096, 2, n, m)
        assert _tiles.packed_in_gemm(64, 4096, 4096, 2, n, m)
        assert not _tiles.packed_in_gemm(65, 4096, 4096, 2, n, m)
    assert _tiles.packed_in_gemm(16, 4096, 4096, 4, 2, 4)
    assert not _tiles.packed_in_gemm(1, 4096, 4096, 2, 16, 32)  # 16 places to compare a weight with
    assert not _tiles.packed_in_gemm(64, 8192, 8192, 4, 1, 32)  # multiplied without tensor cores
    assert _tiles.packed_in_gemm(0, 0, 0, 4, 2, 4)
