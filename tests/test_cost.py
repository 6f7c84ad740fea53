"""What a product costs, and when sparse is not worth it on this machine."""

import pytest

from sparsefx import cost
from sparsefx.config import NM, Dense, Masked, Sampled
from sparsefx.plan import Decision, Site


def site(shape=(64, 32, 16), **changes):
    known = {"layer": "fc", "role": "forward", "kind": "mm", "op": "mm", "shape": shape}
    return Site(**{**known, "dtype": "float32", "device": "cpu", "group": 0, **changes})


IMAGE = site((2 * 49, 12, 8 * 9), kind="conv", channels=(8, 12, 1, 2))


@pytest.mark.parametrize(
    ("product", "flops"),
    [
        (site(), 2 * 64 * 32 * 16),
        (site(batch=3, kind="bmm"), 3 * 2 * 64 * 32 * 16),
        (site((0, 32, 16)), 0),
        (IMAGE, 2 * 98 * 12 * 72),
    ],
)
def test_dense_flops(product, flops):
    assert cost.dense_flops(product) == flops


@pytest.mark.parametrize(
    ("product", "pattern", "flops"),
    [
        (site(), Dense(), 2 * 64 * 32 * 16),
        (site(), NM(1, 4), 2 * 64 * 32 * 4),
        (site(), Sampled(0.3), 2 * 64 * 32 * 4),  # int(0.3 * 16) = 4
        (site(), Sampled(0.3, min_k=99), 2 * 64 * 32 * 16),
        (site((64, 32, 0)), Sampled(0.3), 0),
        (site(mask_density=0.25), Masked(), 2 * 64 * 32 * 4),
        (site(mask_density=None), Masked(), 2 * 64 * 32 * 16),
        (IMAGE, Sampled(0.5), 2 * 98 * 12 * 36),
        (IMAGE, Sampled(0.3), 2 * 98 * 12 * 18),  # 2 of 8 channels
    ],
)
def test_sparse_flops(product, pattern, flops):
    assert cost.sparse_flops(product, pattern) == flops


@pytest.mark.parametrize(
    ("dtype", "pattern", "size"),
    [
        ("float32", Dense(), 32 * 16 * 4),
        ("bfloat16", Sampled(0.3), 32 * 16 * 2),
        ("float32", NM(2, 4), 256 * 4 + 256 * 2 // 8),
        ("bfloat16", NM(1, 8), 64 * 2 + 64 * 3 // 8),
        ("float64", NM(3, 5), 307 * 8 + 307 * 3 // 8),
    ],
)
def test_packed_weight_bytes(dtype, pattern, size):
    assert cost.packed_weight_bytes(site(dtype=dtype), pattern) == size


def test_packed_bytes_of_a_stored_mask_count_a_bit_a_weight():
    known, unknown = site(mask_density=0.25), site()
    assert cost.packed_weight_bytes(known, Masked()) == 32 * 16 * 4 // 4 + 32 * 16 // 8
    assert cost.packed_weight_bytes(unknown, Masked()) == 32 * 16 * 4


def test_n_of_m_is_never_profitable_yet():
    for device in ("cpu", "cuda"):
        reason = cost.unprofitable(site(device=device), Decision(NM(2, 4)))
        assert reason == f"not profitable: N:M runs as a masked dense product on {device}"
        reason = cost.unprofitable(site(device=device), Decision(Masked()))
        assert reason == f"not profitable: a stored mask runs as a masked dense product on {device}"


def test_sampling_is_profitable_where_the_product_is_large():
    large, small = site((1024, 2048, 2048)), site((1024, 8, 2048))
    assert cost.unprofitable(large, Decision(Sampled(0.3))) == ""
    assert cost.unprofitable(small, Decision(Sampled(0.3))) == (
        "not profitable: saves 2.35e+07 operations, moves 2.54e+07 more bytes, "
        "worth 8 operations each on cpu"
    )
    assert cost.unprofitable(small, Decision(Dense())) == ""


def test_a_fast_device_needs_more():
    product = (256, 512, 512)
    assert cost.unprofitable(site(product), Decision(Sampled(0.3))) == ""
    there = site(product, device="cuda")
    assert "worth 180 operations each on cuda" in cost.unprofitable(there, Decision(Sampled(0.3)))
