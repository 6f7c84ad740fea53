"""Figures: equal to what a few lines of float64 give; sums of parts are those of the whole."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.diagnostics.figures import Comparison, Sums, together


def sums_of(exact: Tensor, *draws: Tensor) -> Sums:
    comparison = Comparison(exact)
    for draw in draws:
        comparison.add(draw)
    return comparison.sums()


def test_figures_are_those_of_a_hand_computation():
    exact, draws = torch.randn(7, 5), [torch.randn(7, 5) for _ in range(6)]
    error = sums_of(exact, *draws).error()
    e, found = exact.double(), torch.stack(draws).double()
    off, norm = found - e, e.norm()
    assert error.mean == pytest.approx(off.mean().item())
    assert error.std == pytest.approx(off.std(correction=0).item())
    assert error.max == off.abs().max().item()
    assert error.relative == pytest.approx((off.square().sum() / 6).sqrt().item() / norm.item())
    assert error.bias == pytest.approx((off.mean(0).norm() / norm).item())
    noise = found.var(0, correction=0).sum().sqrt()
    assert error.noise == pytest.approx((noise / norm).item())
    assert error.norm == pytest.approx(norm.item())
    cosines = torch.nn.functional.cosine_similarity(found.flatten(1), e.flatten()[None])
    assert error.cosine == pytest.approx(cosines.mean().item())


def test_bias_and_noise_make_up_the_error():
    exact, draws = torch.randn(40), [torch.randn(40) for _ in range(5)]
    error = sums_of(exact, *draws).error()
    assert error.relative**2 == pytest.approx(error.bias**2 + error.noise**2)


def test_what_is_the_same_has_no_error():
    exact = torch.randn(9, 4) * 1e-30
    error = sums_of(exact, exact.clone()).error()
    assert error.cosine == 1
    assert not any((error.mean, error.std, error.max, error.relative, error.bias, error.noise))


@pytest.mark.parametrize(
    ("exact", "found", "relative", "cosine"),
    [
        (torch.zeros(3), torch.zeros(3), 0.0, 1.0),
        (torch.zeros(3), torch.ones(3), math.inf, 0.0),
        (torch.ones(3), torch.zeros(3), 1.0, 0.0),
        (torch.ones(3), -torch.ones(3), 2.0, -1.0),
        (torch.ones(0, 3), torch.ones(0, 3), 0.0, 1.0),
        (torch.ones(2), torch.tensor([1.0, math.nan]), math.nan, math.nan),
        (torch.zeros(2), torch.tensor([1.0, math.nan]), math.nan, 0.0),
    ],
)
def test_ends(exact: Tensor, found: Tensor, relative: float, cosine: float):
    error = sums_of(exact, found).error()
    assert error.relative == pytest.approx(relative, nan_ok=True)
    assert error.cosine == pytest.approx(cosine, nan_ok=True)
    assert math.isnan(error.max) == math.isnan(relative)


def test_sums_don_t_lose_what_half_precision_would():
    exact = torch.full((1000,), 256.0, dtype=torch.bfloat16)
    error = sums_of(exact, exact + 2).error()
    assert error.mean == 2
    assert error.relative == pytest.approx(2 / 256)


def test_complex_entries_count_as_pairs():
    exact, found = torch.tensor([3 + 4j]), torch.tensor([3 + 1j])
    assert sums_of(exact, found).error().relative == pytest.approx(3 / 5)


@given(
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    draws=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_parts_add_up(sizes: list[int], draws: int, seed: int):
    torch.manual_seed(seed)
    exact = [torch.randn(size) for size in sizes]
    found = [[torch.randn(size) for size in sizes] for _ in range(draws)]
    parts = [sums_of(e, *(draw[i] for draw in found)) for i, e in enumerate(exact)]
    whole = sums_of(torch.cat(exact), *map(torch.cat, found))
    for key, value in vars(together(parts).error()).items():
        assert value == pytest.approx(getattr(whole.error(), key), abs=1e-9), key
