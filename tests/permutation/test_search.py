"""The search: never worse, close to the best there is, the same on every machine."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx import masks
from sparsefx.errors import MaskError
from sparsefx.permutation import search
from sparsefx.permutation.search import _Grouping, _Hats


def kept(w: Tensor, n: int, m: int) -> float:
    w = w.double()
    return float((w.abs() * masks.nm_mask(w, n, m)).sum())


def best_kept(w: Tensor, n: int, m: int) -> float:
    """Of all orders of 8 columns in two groups of 4."""
    assert (w.shape[1], m) == (8, 4)
    orders = [[*one, *(i for i in range(8) if i not in one)]
              for one in itertools.combinations(range(8), 4) if 0 in one]  # fmt: skip
    return max(kept(w[:, order], n, m) for order in orders)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_finds_the_best_grouping_of_eight_columns(n: int):
    for seed in range(10):
        w = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))
        order = search(w, n, 4)
        assert kept(w[:, order], n, 4) == pytest.approx(best_kept(w, n, 4), rel=1e-6)


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 6),
    pattern=st.sampled_from([(1, 2), (2, 4), (3, 4), (4, 8), (1, 16), (16, 32)]),
    seed=st.integers(0, 99),
    ties=st.booleans(),
)
@settings(max_examples=40)
def test_never_worse_and_always_a_permutation(rows, groups, pattern, seed, ties):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, groups * m, generator=generator)
    w = w.round() if ties else w
    free = torch.rand(groups * m, generator=generator) < 0.8
    order = search(w, n, m, movable=free, budget=10, seed=seed)
    assert sorted(order.tolist()) == list(range(groups * m))
    assert torch.equal(order[~free], torch.arange(groups * m)[~free])
    assert kept(w[:, order], n, m) >= kept(w, n, m)
    assert torch.equal(order, search(w, n, m, movable=free, budget=10, seed=seed))


def test_columns_of_uneven_scale_gain_much():
    w = torch.randn(128, 128) * torch.randn(128).exp()
    before, after = masks.retained(w, masks.nm_mask(w, 2, 4)), None
    w = w[:, search(w, 2, 4)]
    after = masks.retained(w, masks.nm_mask(w, 2, 4))
    assert after > before + 0.02


def test_several_matrices_are_added_up():
    one, two = torch.randn(8, 16), torch.randn(4, 16)
    together = search([one, two], 2, 4)
    assert torch.equal(together, search(torch.cat([one, two]), 2, 4))


def test_a_larger_budget_is_never_worse():
    w = torch.randn(32, 64) * torch.randn(64).exp()
    found = [kept(w[:, search(w, 2, 4, budget=budget)], 2, 4) for budget in (1, 10, 100, 300)]
    assert found == sorted(found)
    assert found[0] > kept(w, 2, 4)


def test_the_gain_of_a_swap_is_what_it_says():
    """M, by distances and by hats, against swapping and measuring."""
    n, m = 2, 4
    w = torch.randn(16, 16).abs()
    grouping = _Grouping(w.T.contiguous(), n, m, torch.arange(16), torch.ones(16, dtype=torch.bool))
    hats = _Grouping(grouping.x, n, m, grouping.order, grouping.free, _Hats.of(grouping.x))
    for p, q in itertools.product(range(0, 16, 3), range(16)):
        if p // m == q // m:
            continue
        order = torch.arange(16)
        order[p], order[q] = q, p
        gain = kept(w[:, order], n, m) - kept(w, n, m)
        said = [
            float(g.adds[p, q] + g.adds[q, p] - g.adds[p, p] - g.adds[q, q])
            for g in (grouping, hats)
        ]
        assert said[0] == pytest.approx(gain, abs=1e-4)
        assert said[1] == pytest.approx(gain, abs=0.5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 4), (3, 0)])
def test_nothing_to_order(shape: tuple[int, int]):
    assert torch.equal(search(torch.randn(shape), 2, 4), torch.arange(shape[1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype):
    w = (torch.randn(8, 16) * torch.randn(16).exp()).to(dtype)
    assert kept(w[:, search(w, 2, 4)], 2, 4) > kept(w, 2, 4)


def test_bad_arguments():
    w = torch.randn(4, 8)
    for call, message in [
        (lambda: search([], 2, 4), "there is no matrix to search"),
        (lambda: search(torch.randn(4, 6), 2, 4), r"shape \(4, 6\); pass \[rows, K\]"),
        (lambda: search([w, torch.randn(4, 12)], 2, 4), r"shape \(4, 12\)"),
        (lambda: search(torch.randn(2, 4, 8), 2, 4), r"shape \(2, 4, 8\)"),
        (lambda: search(w, 4, 4), "prunes nothing"),
        (lambda: search(w, 2, 4, budget=True), "budget=True is no number of rounds"),
        (lambda: search(w, 2, 4, movable=torch.ones(8)), r"movable is torch.float32"),
        (lambda: search(w * torch.nan, 2, 4), "holds NaN or infinity"),
        (lambda: search(w.to("meta"), 2, 4), "meta"),
    ]:
        with pytest.raises(MaskError, match=message):
            call()
