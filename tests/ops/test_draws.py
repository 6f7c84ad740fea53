"""Draws: probabilities, exactly k, unbiased, with the variance that the closed forms give.

Where a draw depends on one number its expectation is computed exactly, by walking through the
pieces on which it is constant; elsewhere over many draws, within 3.5 standard errors.
"""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from sparsefx import ops
from sparsefx.ops.draws import inclusion

DRAWS = 40_000


def score_lists(least=1, most=12):
    values = st.one_of(st.sampled_from([0.0, 1.0, 1.0, 3.0]), st.floats(1e-3, 1e3))
    return st.lists(values, min_size=least, max_size=most)


def systematic(scores, u, k):
    return ops.systematic_indices(scores, torch.as_tensor(u, dtype=torch.float64).view(1), k)


# --- probabilities


def water_level(scores, k):
    """Min(1, c * s) that sum to k, by bisection."""
    low, high = 0.0, 1e30
    for _ in range(400):
        c = math.sqrt(max(low, 1e-30) * high)
        low, high = (c, high) if sum(min(1, c * s) for s in scores) < k else (low, c)
    return [min(1.0, high * s) for s in scores]


@settings(max_examples=150, deadline=None)
@given(scores=score_lists(), data=st.data())
@example(scores=[0.0, 0.0, 5.0], data=None)
def test_inclusion_is_water_filling(scores, data):
    k = data.draw(st.integers(0, len(scores))) if data is not None else 2
    p = inclusion(torch.tensor(scores, dtype=torch.float64), k).tolist()
    assert sum(p) == pytest.approx(k, abs=1e-9)
    assert all(0 <= v <= 1 for v in p)
    positive = sum(s > 0 for s in scores)
    if positive >= k:
        assert p == pytest.approx(water_level(scores, k) if k else [0.0] * len(p), abs=1e-6)
    else:  # what is left over goes evenly to scores of 0
        even = (k - positive) / (len(scores) - positive)
        assert p == pytest.approx([1.0 if s else even for s in scores])


def test_equal_scores_are_equally_probable():
    assert inclusion(torch.full((8,), 0.3), 2).tolist() == pytest.approx([0.25] * 8)
    assert inclusion(torch.zeros(8), 2).tolist() == pytest.approx([0.25] * 8)


@pytest.mark.parametrize("wild", [math.nan, math.inf])
def test_what_is_not_finite_is_taken(wild):
    scores = torch.tensor([1.0, wild, 2.0, 3.0])
    noise = torch.rand(1)
    for indices, scale in (
        ops.systematic_indices(scores, noise, 2),
        ops.bernoulli_indices(scores, torch.rand(4), 2, 4),
        ops.with_replacement_indices(scores, torch.rand(2), 2),
    ):
        taken = indices[scale > 0].tolist()
        assert 1 in taken
        assert torch.isfinite(scale).all()
    assert 1 in ops.topk_indices(scores, 1).tolist()
    assert 1 in ops.mass_indices(scores, 2, 1, 0.9)[0].tolist()
    several = torch.tensor([wild, 1.0, wild, 2.0, wild])
    indices, scale = ops.mass_indices(several, 4, 1, 0.1)
    assert indices[scale > 0].tolist() == [0, 2, 4]


@pytest.mark.parametrize("unit", [1e-310, 1e-45, 1e300, 5e307])
def test_only_ratios_of_scores_matter(unit):
    plain = torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(inclusion(plain * unit, 2), inclusion(plain, 2))
    noise = torch.tensor([0.1, 0.9], dtype=torch.float64)
    found = ops.with_replacement_indices(plain * unit, noise, 2)
    for one, other in zip(found, ops.with_replacement_indices(plain, noise, 2), strict=True):
        torch.testing.assert_close(one, other)


# --- systematic


def pieces(scores, k):
    """(length, indices, scale) of every stretch of u on which the draw is constant."""
    ends = inclusion(scores.double(), k).cumsum(0).tolist()
    cuts = sorted({0.0, 1.0, *(end % 1.0 for end in ends)})
    for low, high in itertools.pairwise(cuts):
        if high - low > 1e-9:
            yield high - low, *systematic(scores, (low + high) / 2, k)


@settings(max_examples=60, deadline=None)
@given(scores=score_lists(2, 9), data=st.data())
def test_systematic_is_exactly_unbiased_and_keeps_k(scores, data):
    k = data.draw(st.integers(1, len(scores)))
    scores = torch.tensor(scores, dtype=torch.float64)
    frequency, mean = torch.zeros_like(scores), torch.zeros_like(scores)
    for length, indices, scale in pieces(scores, k):
        assert len(indices) == k
        assert (indices.diff() > 0).all()
        frequency[indices] += length
        mean[indices] += length * scale
    p = inclusion(scores, k)
    torch.testing.assert_close(frequency, p, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(mean, (p > 0).double(), atol=1e-5, rtol=1e-5)


def test_systematic_variance_is_that_of_its_pieces():
    torch.manual_seed(0)
    x, w, k = torch.randn(6, 30).double(), torch.randn(30, 5).double(), 9
    scores = ops.mm_scores(x, w, "product")
    exact, variance = x @ w, 0.0
    for length, indices, scale in pieces(scores, k):
        y = ops.sampled_mm(x, w, indices, None, scale)
        variance += length * float((y - exact).square().sum())
    u = torch.rand(4000, 1, dtype=torch.float64)
    indices, scale = ops.systematic_indices(scores.expand(4000, -1), u, k)
    errors = estimates(x, w, indices, scale) - exact
    assert errors.square().sum((1, 2)).mean().item() == pytest.approx(variance, rel=0.03)
    within(errors)


@pytest.mark.parametrize("depth", [1, 2, 100, 4096])
def test_rounding_never_repeats_a_pair(depth):
    torch.manual_seed(depth)
    for scores in (torch.rand(depth), torch.ones(depth), torch.rand(depth).exp().exp()):
        for k in {1, depth // 3, depth - 1, depth} - {0}:
            for u in (0.0, 0.5, 1 - 2**-24):
                indices, scale = systematic(scores, u, k)
                assert len(indices.unique()) == k
                assert (indices.diff() > 0).all()
                assert (scale >= 1 - 1e-6).all()


# --- many draws


def estimates(x, w, indices, scale):
    """[draws, M, N]: x[:, S] * scale @ w[S]."""
    left = x.t()[indices] * scale.unsqueeze(-1)  # [draws, k, M]
    return left.mT @ w[indices]


def within(errors, deviations=3.5):
    """No entry's mean over the draws is further from 0 than so many standard errors."""
    z = errors.mean(0) / (errors.std(0) / len(errors) ** 0.5)
    # of many entries some exceed 3.5: judge their mean square, which is 1, and none beyond 5
    assert abs(z.mean().item()) < deviations / z.numel() ** 0.5 * 1.5
    assert z.abs().max().item() < 5


def operands(mean=0.0):
    torch.manual_seed(1)
    x = torch.randn(4, 40, dtype=torch.float64) * torch.linspace(0.1, 2, 40) + mean
    return x, torch.randn(40, 3, dtype=torch.float64) + mean


@pytest.mark.parametrize("kind", ["product", "left", "uniform", "estimated"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_bernoulli(mean, kind):
    x, w = operands(mean)
    k, size = 12, 40
    scores = ops.mm_scores(x, w, kind)
    noise = torch.rand(DRAWS, 40)
    indices, scale = ops.bernoulli_indices(scores.expand(DRAWS, -1), noise, k, size)
    p = inclusion(scores, k)
    counts = (scale > 0).sum(1).double()
    assert counts.mean().item() == pytest.approx(k, rel=0.02)
    errors = estimates(x, w, indices, scale) - x @ w
    within(errors)
    closed = ((1 - p) / p * (x.norm(dim=0) * w.norm(dim=1)).square()).sum()
    assert errors.square().sum((1, 2)).mean().item() == pytest.approx(closed.item(), rel=0.03)


@pytest.mark.parametrize("kind", ["product", "right", "uniform"])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_with_replacement(mean, kind):
    x, w = operands(mean)
    k, scores = 12, ops.mm_scores(x, w, kind)
    noise = torch.rand(DRAWS, k)
    indices, scale = ops.with_replacement_indices(scores.expand(DRAWS, -1), noise, k)
    p = scores / scores.sum()
    draws = (scale * k * p[indices]).sum(1)
    torch.testing.assert_close(draws, torch.full_like(draws, k))  # every draw is counted
    errors = estimates(x, w, indices, scale) - x @ w
    within(errors)
    # sum |x_i|^2 |w_i|^2 / p_i, less the product: ((sum score)^2 - |xw|^2) / k for p ~ score
    products = (x.norm(dim=0) * w.norm(dim=1)).square()
    closed = ((products / p).sum() - (x @ w).square().sum()) / k
    if kind == "product":
        assert closed.item() == pytest.approx(
            ((scores.sum() ** 2 - (x @ w).square().sum()) / k).item()
        )
    assert errors.square().sum((1, 2)).mean().item() == pytest.approx(closed.item(), rel=0.03)


def test_what_overflows_is_thinned_without_bias():
    torch.manual_seed(2)
    x, w = operands()
    scores, k, size = ops.mm_scores(x, w, "product"), 12, 10  # most draws overflow
    noise = torch.rand(DRAWS, 40)
    indices, scale = ops.bernoulli_indices(scores.expand(DRAWS, -1), noise, k, size)
    assert indices.shape == (DRAWS, size)
    assert (scale > 0).all(1).double().mean() > 0.5
    within(estimates(x, w, indices, scale) - x @ w)


def test_a_sure_pair_is_in_every_draw():
    scores = torch.tensor([100.0, 1, 1, 1, 1])
    u = torch.rand(200, 5)
    for indices, scale in (
        ops.systematic_indices(scores.expand(200, -1), u[:, :1], 2),
        ops.bernoulli_indices(scores.expand(200, -1), u, 2, 5),
    ):
        assert (indices[:, 0] == 0).all()
        torch.testing.assert_close(scale[:, 0], torch.ones(200))


# --- the largest, and a share of the sum


@settings(max_examples=80, deadline=None)
@given(scores=score_lists(), data=st.data())
def test_the_largest(scores, data):
    k = data.draw(st.integers(0, len(scores)))
    found = ops.topk_indices(torch.tensor(scores), k).tolist()
    order = sorted(range(len(scores)), key=lambda i: (-torch.tensor(scores)[i].item(), i))
    assert found == sorted(order[:k])


@settings(max_examples=120, deadline=None)
@given(scores=st.lists(st.sampled_from([0.0, 1.0, 2.0, 4.0]), min_size=1, max_size=10),
       mass=st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, 1.0]), least=st.integers(1, 4))  # fmt: skip
def test_the_fewest_that_hold_a_share(scores, mass, least):
    depth = len(scores)
    k = min(depth, max(least, math.ceil(mass * depth)))
    indices, scale = ops.mass_indices(torch.tensor(scores, dtype=torch.float64), k, least, mass)
    order = sorted(range(depth), key=lambda i: (-scores[i], i))
    need, held = 0, 0.0
    while need < depth and held < mass * sum(scores):
        held += scores[order[need]]
        need += 1
    assert need <= k  # the natural cap always suffices
    used = indices[scale > 0].tolist()
    assert used == sorted(order[: min(k, max(need, least))])
    assert set(scale.tolist()) <= {0.0, 1.0}
    assert len(indices) == k


def test_a_cap_on_a_share():
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    indices, scale = ops.mass_indices(scores, 2, 1, 0.99)
    assert (indices.tolist(), scale.tolist()) == ([0, 1], [1.0, 1.0])


# --- every draw


CALLS = {
    "topk": lambda s, k: (ops.topk_indices(s, k), None),
    "mass": lambda s, k: ops.mass_indices(s, k, 1, 0.5),
    "systematic": lambda s, k: ops.systematic_indices(s, torch.rand(*s.shape[:-1], 1), k),
    "bernoulli": lambda s, k: ops.bernoulli_indices(
        s, torch.rand(s.shape), k, min(s.shape[-1], k + 2)
    ),
    "with_replacement": lambda s, k: ops.with_replacement_indices(
        s, torch.rand(*s.shape[:-1], k), k
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (0, 7), (0,), (2, 0), (1,)])
def test_shapes_order_and_dtypes(shape, dtype, name):
    torch.manual_seed(3)
    scores = torch.rand(shape, dtype=dtype)
    for k in {0, 1, shape[-1] // 2, shape[-1]}:
        if k > shape[-1]:
            continue
        indices, scale = CALLS[name](scores, k)
        size = min(shape[-1], k + 2) if name == "bernoulli" else k
        assert indices.shape == (*shape[:-1], size)
        assert indices.dtype == torch.int64
        assert (indices.diff() > 0).all()
        if scale is not None:
            assert (scale.shape, scale.dtype) == (indices.shape, dtype)
            assert (scale >= 0).all()
            assert torch.isfinite(scale).all()


@pytest.mark.parametrize("name", CALLS)
def test_scores_of_zero_are_no_trouble(name):
    for scores in (torch.zeros(6), torch.tensor([0.0, 0, 0, 1, 0, 0])):
        for _ in range(20):
            indices, scale = CALLS[name](scores, 3)
            assert len(indices.unique()) == len(indices) >= 3
            assert scale is None or torch.isfinite(scale).all()
            if scores.any():
                assert 3 in (indices if scale is None else indices[scale > 0]).tolist()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_draws_equal_eager_ones(name, dynamic):
    def call(scores):
        return CALLS[name](scores, 3)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for depth in (8, 11):
        scores = torch.rand(2, depth)
        torch.manual_seed(7)
        found = compiled(scores)
        torch.manual_seed(7)
        for one, other in zip(found, call(scores), strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
