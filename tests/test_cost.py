"""What a product costs, and when sparse is not worth it on this machine."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsefx as sfx
from sparsefx import cost
from sparsefx.config import NM, Dense, Masked, Rule, Sampled, SparseConfig
from sparsefx.cost.work import packed_work
from sparsefx.plan import Site


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
        reason = cost.unprofitable([site(device=device)], NM(2, 4))
        assert reason == f"not profitable: N:M runs as a masked dense product on {device}"
        reason = cost.unprofitable([site(device=device)], Masked())
        assert reason == f"not profitable: a stored mask runs as a masked dense product on {device}"
    assert cost.unprofitable([site()], Dense()) == ""


# --- time


def layer(m, n, k, **changes):
    """The three products of a linear layer."""
    shapes = {"forward": (m, n, k), "grad_input": (m, k, n), "grad_weight": (k, n, m)}
    return [site(shape, role=role, **changes) for role, shape in shapes.items()]


def conv(batch, inner, outer, image, taps=9, groups=1):
    shapes = layer(batch * image**2, outer * groups, inner * taps, kind="conv")
    return [replace(one, channels=(inner, outer, groups, batch)) for one in shapes]


def took(sites, pattern, device="cpu"):
    return cost.pace_of(sites[0].kind, device).time(cost.sampled_work(sites, pattern))


def test_work_of_a_dense_product():
    forward, grad_input, grad_weight = layer(6, 4, 10)
    moved = 4 * (6 * 10 + 10 * 4 + 6 * 4)
    for product in (forward, grad_input, grad_weight):
        assert cost.dense_work(product) == cost.Work(2 * 6 * 4 * 10, moved, 0, 1)
    three = site((6, 4, 10), batch=3, kind="bmm")
    assert cost.dense_work(three) == cost.Work(3 * 480, 3 * moved, 0, 1)
    for product in conv(2, 8, 12, 7, taps=9):
        elements = 2 * 49 * 8 + 12 * 8 * 9 + 2 * 49 * 12
        assert cost.dense_work(product) == cost.Work(2 * 98 * 12 * 72, 4 * elements, 0, 1)
    assert cost.dense_work(site(dtype="float64")).flops == 2 * cost.dense_work(site()).flops


def test_work_of_a_sampled_layer():
    found = cost.sampled_work(layer(6, 4, 10), Sampled(0.5))
    x, w, y = 60, 40, 24
    scores, gathers = x + w, 1.5 * (x + w)
    products = (x / 2 + w / 2 + y) + (y + w / 2 + x / 2) + (x / 2 + y + w / 2)
    zeros = 1.5 * x + 1.5 * w
    assert found.flops == 3 * 480  # so few pairs take what all of them take
    assert found.moved == 4 * (scores + gathers + products + zeros)
    assert (found.ranked, found.calls) == (10, 10)


def test_few_pairs_take_what_32_take():
    flops = [cost.sampled_work(layer(6, 4, 64), Sampled(r)).flops for r in (0.1, 0.5, 0.75, 1.0)]
    assert [one / (6 * 6 * 4 * 64) for one in flops] == [0.5, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("scores", "read"),
    [("product", 100), ("input", 60), ("weight", 40), ("uniform", 0), ("estimated", 0)],
)
def test_scores_read_what_they_are_made_of(scores, read):
    found = cost.sampled_work(layer(6, 4, 10)[:1], Sampled(0.5, scores=scores))
    assert found.moved == 4 * (read + 150 + 30 + 20 + 24)


@pytest.mark.parametrize("estimator", ["topk_mean", "systematic", "bernoulli", "with_replacement"])
@pytest.mark.parametrize("sites", [layer(512, 256, 1024), conv(8, 64, 64, 14)])
def test_what_is_more_than_the_largest_takes_longer(sites, estimator):
    assert took(sites, Sampled(0.3)) < took(sites, Sampled(0.3, estimator=estimator))


def test_a_mass_takes_what_its_cap_takes():
    sites = layer(512, 256, 1000)
    assert took(sites, Sampled(mass=0.5)) == took(sites, Sampled(0.5))


@given(
    st.tuples(*[st.integers(1, 4096)] * 3),
    st.sampled_from(["cpu", "cuda"]),
    st.floats(0.05, 0.9),
)
def test_fewer_pairs_never_take_longer_and_all_of_them_take_longer_than_dense(shape, device, ratio):
    sites, pace = layer(*shape, device=device), cost.PACES["mm", device]
    dense = sum(pace.time(cost.dense_work(one)) for one in sites)
    few, more, every = (took(sites, Sampled(r), device) for r in (ratio, ratio + 0.05, 1.0))
    assert few <= more * (1 + 1e-9)
    assert more <= every * (1 + 1e-9)
    assert every > dense


def test_large_layers_are_worth_it_and_small_ones_say_what_they_would_take(monkeypatch):
    assert cost.unprofitable(layer(1024, 2048, 2048), Sampled(0.3)) == ""
    monkeypatch.setitem(cost.PACES, ("mm", "cpu"), cost.Pace(5.0, 50.0, 0.05, 10.0))
    assert cost.unprofitable(layer(64, 32, 16), Sampled(0.3)) == (
        "not profitable at 64 rows: never sparse (all three: 104 us sampled, 33.1 us dense on cpu)"
    )
    assert cost.unprofitable(layer(64, 256, 256)[:1], Sampled(0.3)) == (
        "not profitable at 64 rows: sparse from 249 rows on "
        "(forward: 131 us sampled, 71.6 us dense on cpu)"
    )
    assert cost.unprofitable(layer(1024, 2048, 2048)[:1], Sampled(0.9999)).endswith(
        " dense on cpu)"
    )
    assert " ms sampled" in cost.unprofitable(layer(1024, 2048, 2048)[:1], Sampled(0.9999))


def test_a_forward_is_worth_what_it_and_its_gradients_are_worth(monkeypatch):
    sites, pattern = layer(512, 256, 256), Sampled(0.1)
    free = replace(cost.PACES["mm", "cpu"], ranked=0.0)

    def gain(of):
        """Microseconds that are there for choosing 256 pairs."""
        dense = sum(free.time(cost.dense_work(one)) for one in of)
        return (cost.MARGIN * dense - free.time(cost.sampled_work(of, pattern))) / 256

    alone, together = gain(sites[:1]), gain(sites)
    assert 0 < alone < together
    for ranked, one, all_three in (
        (0.9 * alone, True, True),
        ((alone + together) / 2, False, True),
        (1.1 * together, False, False),
    ):
        monkeypatch.setitem(cost.PACES, ("mm", "cpu"), replace(free, ranked=ranked))
        assert (not cost.unprofitable(sites[:1], pattern)) == one
        assert (not cost.unprofitable(sites, pattern)) == all_three


def test_an_empty_layer_is_left_alone():
    for shape in ((0, 4, 4), (4, 0, 4), (4, 4, 0)):
        assert "not profitable" in cost.unprofitable(layer(*shape), Sampled(0.5))


def test_another_device_is_judged_as_a_cpu():
    assert cost.unprofitable(layer(1024, 2048, 2048, device="xpu"), Sampled(0.3)) == ""


# --- packed once


def decode(rows, dtype="float32", has_backward=False, **changes):
    """A forward of a few rows, as generation token by token has it."""
    shape = (rows, 4096, 4096)
    return [site(shape, dtype=dtype, has_backward=has_backward, **changes)]


def test_packed_weights_pay_for_few_rows_on_a_cpu():
    for pattern in (NM(2, 4), NM(1, 8), NM(2, 4, transposable=True)):
        for one in (decode(1), decode(8), decode(1, "bfloat16")):
            assert cost.unprofitable(one, pattern, packed=True) == ""
    assert cost.unprofitable(decode(1), NM(31, 32), packed=True) == (
        "not profitable: forward: 3.47 ms packed, 3.12 ms dense on cpu"
    )


def test_packed_weights_pay_for_some_rows_on_cuda():
    """All pairs are multiplied there, and what is read is less."""
    for dtype in ("float16", "bfloat16"):
        for one in (decode(1, dtype, device="cuda"), decode(64, dtype, device="cuda")):
            for pattern in (NM(2, 4), NM(1, 4), NM(1, 2)):
                assert cost.unprofitable(one, pattern, packed=True) == ""
    one = decode(16, "bfloat16", device="cuda")
    work, dense = packed_work(one[0], NM(2, 4)), cost.dense_work(one[0])
    assert work.flops == dense.flops
    assert work.moved < 0.6 * dense.moved
    for pattern in (NM(3, 4), NM(4, 8), NM(1, 8)):  # more instructions than the bytes take time
        assert "masked dense product" in cost.unprofitable(one, pattern, packed=True)


@pytest.mark.parametrize(
    "one",
    [
        decode(9),
        [replace(decode(1)[0], shape=(1, 1023, 1024))],
        decode(1, "float64"),
        decode(1, has_backward=True),
        decode(1, device="cuda"),
        decode(65, "bfloat16", device="cuda"),
        decode(1, "float64", device="cuda"),
        decode(1, device="xpu"),
        decode(1, kind="conv", channels=(4096, 4096, 1, 1)),
    ],
)
def test_nothing_else_is_known_to(one):
    assert "masked dense product" in cost.unprofitable(one, NM(2, 4), packed=True)
    assert "masked dense product" in cost.unprofitable(decode(1), NM(2, 4))


def test_packing_is_weighed_where_inductor_freezes():
    layer = torch.nn.Linear(1024, 1024)
    config = SparseConfig([Rule("*", NM(2, 4))], False, select="profitable", freeze=True)

    def decided():
        with torch.no_grad():
            return sfx.explain(layer, config=config)(torch.randn(1, 1024)).sites[0].sparse_op

    assert decided() == ""
    with torch._inductor.config.patch(freezing=True):
        assert decided() == "nm_packed_mm"
