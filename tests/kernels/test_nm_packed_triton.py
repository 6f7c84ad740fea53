"""Packed weights on CUDA: bit by bit as the reference packs, and products as good as eager's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefx import masks, ops
from sparsefx.errors import MaskError
from sparsefx.kernels.nm_packed.triton import packing
from sparsefx.kernels.nm_packed.triton import product as packed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = [
    (1, 2), (2, 4), (1, 4), (3, 4), (1, 3), (5, 8), (4, 6), (5, 12), (2, 16), (3, 17), (16, 32),
    (31, 32),
]  # fmt: skip
BITS = {2: torch.int16, 4: torch.int32}


def same_bits(found, expected):
    """Equal, NaN payloads and signs of zeros too."""
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.is_contiguous()) == (other.dtype, other.shape, True)
        if one.is_floating_point():
            one, other = one.view(BITS[one.itemsize]), other.view(BITS[one.itemsize])
        assert torch.equal(one, other)


def random_bits(rows, depth, dtype, device):
    """Ties, both zeros, subnormals, infinities and NaNs of every sign and payload."""
    levels = torch.tensor([0.0, -0.0, 1, -1, 1e-7, torch.inf, -torch.inf, torch.nan])
    w = levels[torch.randint(8, (rows, depth))].to(dtype)
    payload = torch.randint(2, 100, (rows, depth)) * w.isnan()
    sign = torch.iinfo(BITS[dtype.itemsize]).min * torch.randint(2, (rows, depth))
    bits = w.view(BITS[dtype.itemsize]).to(torch.int64) | payload | sign
    return bits.to(BITS[dtype.itemsize]).view(dtype).to(device)


def hidden(t):
    """The same values strided inside a larger buffer: any read outside the view shows."""
    rows, cols = t.shape
    bad = float("nan") if t.is_floating_point() else 1
    buffer = torch.full((2 * rows + 3, 3 * cols + 5), bad, dtype=t.dtype, device=t.device)
    return buffer[1 : 2 * rows + 1 : 2, 2 : 3 * cols + 2 : 3].copy_(t)


def weight(rows, groups, n, m, dtype, device):
    w = torch.randn(rows, groups * m, dtype=dtype, device=device)
    return ops.REFERENCES[ops.nm_pack](w, n, m)


def transposable(down, across, n, m):
    """Keep n of m along both dimensions: in each tile a random order of a cyclic pattern."""
    cyclic = (torch.arange(m)[:, None] - torch.arange(m)) % m < n
    rows = [
        torch.cat([cyclic[torch.randperm(m)][:, torch.randperm(m)] for _ in range(across)], 1)
        for _ in range(down)
    ]
    return torch.cat(rows)


def unpacked(values, codes, n, m):
    return ops.REFERENCES[ops.nm_unpack](values, codes, n, m, values.shape[1] // n * m)


# --- packing


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_packs_as_the_reference(n, m, device):
    """Odd rows, a chunk that its groups don't fill, ties, and more than one program."""
    for dtype in DTYPES if m < 5 else DTYPES[1:2]:
        w = random_bits(37 if m < 16 else 5, 3 * m, dtype, device)
        same_bits(packing.nm_pack(w, n, m), ops.REFERENCES[ops.nm_pack](w, n, m))
        values, codes = packing.nm_pack(w, n, m)
        kept = packed.nm_unpack(values, codes, n, m, 3 * m)
        same_bits([kept], [unpacked(values, codes, n, m)])


def test_packs_many_chunks(device):
    w = random_bits(3, 300, torch.bfloat16, device)
    for n, m in [(2, 4), (1, 3), (2, 12)]:
        values, codes = packing.nm_pack(w, n, m)
        same_bits((values, codes), ops.REFERENCES[ops.nm_pack](w, n, m))
        same_bits([packed.nm_unpack(values, codes, n, m, 300)], [unpacked(values, codes, n, m)])


@settings(max_examples=6)
@given(
    pattern=st.integers(2, 32).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    shape=st.tuples(st.integers(0, 9), st.integers(0, 7)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_pattern_and_size(pattern, shape, dtype):
    (n, m), (rows, groups) = pattern, shape
    w = random_bits(rows, groups * m, dtype, "cpu")
    same_bits(packing.nm_pack(w, n, m), ops.REFERENCES[ops.nm_pack](w, n, m))


def test_any_strides_are_packed(device):
    w = hidden(random_bits(8, 16, torch.float32, device))
    mask = hidden(masks.nm_mask(w, 2, 4, 1))
    for one, marked in [(w, mask), (w.T, mask.T), (w[:, :4].expand(8, 4), mask[:, :4])]:
        same_bits(packing.nm_pack(one, 2, 4), ops.REFERENCES[ops.nm_pack](one, 2, 4))
        both = packing.nm_pack_both(one, marked, 2, 4)
        same_bits(both, ops.REFERENCES[ops.nm_pack_both](one, marked, 2, 4))
    values, codes = packing.nm_pack(w, 2, 4)
    found = packed.nm_unpack(hidden(values), hidden(codes), 2, 4, 16)
    same_bits([found], [unpacked(values, codes, 2, 4)])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 6), (3, 17), (16, 32)])
def test_both_orientations(n, m, device):
    """Of a transposable mask, of one that keeps less, and of one that keeps more."""
    down, across = (3, 5) if m < 16 else (1, 2)
    w = random_bits(down * m, across * m, torch.float16 if m == 4 else torch.float32, device)
    square = transposable(down, across, n, m).to(device)
    fewer = square & (torch.rand(w.shape) < 0.5).to(device)
    for mask in (square, fewer, torch.ones_like(square)) if m < 16 else (fewer,):
        found = packing.nm_pack_both(w, mask, n, m)
        same_bits(found, ops.REFERENCES[ops.nm_pack_both](w, mask, n, m))
    values, codes, values_t, codes_t = packing.nm_pack_both(w, square, n, m)
    kept = torch.where(square, w, 0)
    same_bits([unpacked(values, codes, n, m)], [kept])
    same_bits([unpacked(values_t, codes_t, n, m)], [kept.T.contiguous()])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
def test_nothing_is_packed_and_unpacked(shape, device):
    w = torch.randn(shape, device=device)
    values, codes = packing.nm_pack(w, 2, 4)
    same_bits((values, codes), ops.REFERENCES[ops.nm_pack](w, 2, 4))
    same_bits([packed.nm_unpack(values, codes, 2, 4, shape[1])], [w])
    both = packing.nm_pack_both(w, w > 0, 2, 4)
    same_bits(both, ops.REFERENCES[ops.nm_pack_both](w, w > 0, 2, 4))


def test_what_no_kernel_packs_takes_the_reference(monkeypatch, device):
    for name in ("_pack_kernel", "_pack_both_kernel"):
        monkeypatch.setattr(packing, name, None)  # a launch would raise
    monkeypatch.setattr(packed, "_unpack_kernel", None)
    for w, n, m in [
        (torch.randn(64, 128, device=device), 3, 64),
        (torch.randn(8, 8, dtype=torch.float64, device=device), 2, 4),
    ]:
        values, codes = packing.nm_pack(w, n, m)
        mask = masks.nm_mask(w, n, m, 1)
        expected = torch.where(mask, w, 0)
        assert torch.equal(packed.nm_unpack(values, codes, n, m, w.shape[1]), expected)
        values, codes, *_ = packing.nm_pack_both(w, mask, n, m)
        assert torch.equal(unpacked(values, codes, n, m), expected)


def test_launchers_say_what_is_wrong(device):
    w = torch.randn(8, 6, device=device)
    with pytest.raises(MaskError, match="not a multiple of m=4"):
        packing.nm_pack(w, 2, 4)
    with pytest.raises(MaskError, match="n=2 of every m=2 prunes nothing"):
        packing.nm_pack(w, 2, 2)
    with pytest.raises(MaskError, match=r"n=2 of every m=2 prunes nothing"):
        packing.nm_pack_both(w, w > 0, 2, 2)
    with pytest.raises(MaskError, match=r"shape \(8, 6\) can't be packed both ways.*m=4 divides"):
        packing.nm_pack_both(w, w > 0, 2, 4)
    with pytest.raises(MaskError, match=r"mask is torch.float32 \(8, 6\); pass a bool tensor"):
        packing.nm_pack_both(w, w, 1, 2)
    with pytest.raises(MaskError, match=r"mask is torch.bool \(6, 8\).*shape \(8, 6\)"):
        packing.nm_pack_both(w, w.T > 0, 1, 2)


# --- products


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "groups"), [(1, 1, 1), (3, 70, 40), (19, 33, 21)])
def test_product(dtype, rows, outputs, groups, device, assert_as_good_as_eager):
    values, codes = weight(outputs, groups, 2, 4, dtype, device)
    x = torch.randn(rows, 4 * groups, dtype=dtype, device=device)
    bias = torch.randn(outputs, dtype=dtype, device=device)
    dense = unpacked(values, codes, 2, 4).T
    for b in (bias, None):
        assert_as_good_as_eager(packed.streamed(x, values, codes, b, 2, 4), x, dense, b)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_patterns(n, m, device, assert_as_good_as_eager):
    values, codes = weight(20, 9, n, m, torch.float32, device)
    for rows in (2, 6):  # multiplied and added, and by the dot
        x = torch.randn(rows, 9 * m, device=device)
        y = packed.streamed(x, values, codes, None, n, m)
        assert_as_good_as_eager(y, x, unpacked(values, codes, n, m).T)


@pytest.mark.parametrize("splits", [1, 2, 3, 9])
def test_splits_are_added_in_one_order(splits, monkeypatch, device, assert_as_good_as_eager):
    """9: more than there are tiles, so that some hold nothing."""
    gemm = packed._tiles.packed_gemm

    def split(*shape):
        steps = 6  # of 32 lanes
        return gemm(*shape) | {"splits": splits, "each": -(-steps // splits)}

    monkeypatch.setattr(packed._tiles, "packed_gemm", split)
    values, codes = weight(40, 48, 2, 4, torch.float32, device)
    x, bias = torch.randn(5, 192, device=device), torch.randn(40, device=device)
    y = packed.streamed(x, values, codes, bias, 2, 4)
    assert_as_good_as_eager(y, x, unpacked(values, codes, 2, 4).T, bias)
    assert torch.equal(y, packed.streamed(x, values, codes, bias, 2, 4))


@pytest.mark.parametrize("rows", [3, 7])
def test_any_strides_are_multiplied(rows, device, assert_as_good_as_eager):
    values, codes = weight(10, 12, 3, 4, torch.float32, device)
    x, bias = torch.randn(rows, 48, device=device), torch.randn(10, device=device)
    spread = hidden(bias[None])[0]
    y = packed.streamed(hidden(x.T).T, hidden(values), hidden(codes), spread, 3, 4)
    assert_as_good_as_eager(y, x, unpacked(values, codes, 3, 4).T, bias)


# numpy, under the interpreter, remarks on the infinity times zero that this test is about
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("rows", [2, 5])
def test_nan_and_infinity_stay_in_their_places(rows, device):
    values, codes = weight(6, 9, 2, 4, torch.float32, device)
    values[1, 3], values[4, 17] = torch.nan, torch.inf
    x = torch.rand(rows, 36, device=device) + 1
    y = packed.streamed(x, values, codes, None, 2, 4)
    assert torch.equal(y.isnan().all(0), torch.arange(6, device=device) == 1)
    assert torch.equal(y.isinf().all(0), torch.arange(6, device=device) == 4)
    assert torch.equal(~y.isfinite(), ~(x @ unpacked(values, codes, 2, 4).T).isfinite())


@pytest.mark.parametrize(("rows", "outputs", "groups"), [(0, 4, 2), (3, 0, 2), (3, 4, 0)])
def test_empty_products(rows, outputs, groups, device):
    values, codes = weight(outputs, groups, 2, 4, torch.float32, device)
    x, bias = torch.randn(rows, 4 * groups, device=device), torch.randn(outputs, device=device)
    for b, sums in [(bias, bias.expand(rows, outputs)), (None, torch.zeros(rows, outputs))]:
        same_bits([packed.streamed(x, values, codes, b, 2, 4)], [sums.to(device).contiguous()])
        assert packed.nm_packed_mm(x, values, codes, b, 2, 4).shape == (rows, outputs)


@pytest.mark.parametrize("inside", [True, False])
def test_launcher_takes_the_way_that_the_tiles_say(inside, monkeypatch, device):
    monkeypatch.setattr(packed._tiles, "packed_in_gemm", lambda *shape: inside)
    values, codes = weight(8, 4, 2, 4, torch.float32, device)
    x, bias, taken = torch.randn(5, 16, device=device), torch.randn(8, device=device), []
    streamed, unpack = packed.streamed, packed.nm_unpack
    monkeypatch.setattr(packed, "streamed", lambda *a: (taken.append(True), streamed(*a))[1])
    monkeypatch.setattr(packed, "nm_unpack", lambda *a: (taken.append(False), unpack(*a))[1])
    y = packed.nm_packed_mm(x, values, codes, bias, 2, 4)
    torch.testing.assert_close(y, ops.REFERENCES[ops.nm_packed_mm](x, values, codes, bias, 2, 4))
    assert taken == [inside]


def test_what_no_kernel_multiplies_takes_the_reference(monkeypatch, device):
    for name in ("streamed", "nm_unpack"):
        monkeypatch.setattr(packed, name, None)  # a call would raise
    for dtype, n, m in [(torch.float64, 2, 4), (torch.float32, 2, 64)]:
        values, codes = weight(8, 2, n, m, dtype, device)
        x = torch.randn(5, 2 * m, dtype=dtype, device=device)
        y = packed.nm_packed_mm(x, values, codes, None, n, m)
        torch.testing.assert_close(y, x @ unpacked(values, codes, n, m).T)
    values, codes = weight(8, 4, 2, 4, torch.float32, device)
    x, one = torch.randn(5, 16, device=device), torch.ones(1, device=device)
    broadcast = packed.nm_packed_mm(x, values, codes, one, 2, 4)
    torch.testing.assert_close(broadcast, x @ unpacked(values, codes, 2, 4).T + 1)


def test_contradictions_are_the_reference_s_to_refuse(device):
    values, codes = weight(8, 4, 2, 4, torch.float32, device)
    x = torch.randn(5, 16, device=device)
    with pytest.raises(RuntimeError, match="dtype"):
        packed.nm_packed_mm(x, values.half(), codes, None, 2, 4)
    with pytest.raises(RuntimeError):
        packed.nm_packed_mm(x, values, codes[:, :1], None, 2, 4)
    with pytest.raises(RuntimeError):
        packed.nm_packed_mm(x, values, codes, torch.randn(4, device=device), 2, 4)
    with pytest.raises(RuntimeError):
        packed.nm_unpack(values, codes, 2, 4, 8)


def test_codes_that_nothing_writes_read_and_write_nothing_outside(device):
    """4 bits hold 6 .. 15 as well: no place is theirs, so their values are left out."""
    values, codes = weight(6, 3, 1, 6, torch.float32, device)
    codes.fill_(255)
    values.fill_(torch.nan)
    assert torch.equal(packed.nm_unpack(values, codes, 1, 6, 18), torch.zeros(6, 18))
    y = packed.streamed(torch.ones(2, 18, device=device), values, codes, None, 1, 6)
    assert torch.equal(y, torch.zeros_like(y))
