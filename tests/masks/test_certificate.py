"""Certificates: they hold for the best mask, for no other, and not when tampered with."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from sparsefx.errors import MaskError
from sparsefx.masks import Certificate, certify, is_valid, prices, transposable_mask

CASES = [
    ((8, 12), 2, 4),
    ((64, 64), 4, 8),
    ((20, 13), 4, 8),
    ((13, 30), 2, 8),
    ((9, 7, 2), 3, 4),
    ((16, 12, 3, 3), 2, 4),
    ((24, 16, 2), 6, 8),
    ((3, 3), 4, 8),
    ((40, 33), 9, 16),
]


@pytest.mark.parametrize("kind", ["normal", "ties", "zero"])
@pytest.mark.parametrize(("shape", "n", "m"), CASES)
def test_the_best_mask_is_certified(shape, n, m, kind):
    w = torch.randn(shape)
    w = {"normal": w, "ties": w.round(), "zero": 0 * w}[kind]
    mask, proof = transposable_mask(w, n, m, return_certificate=True)
    assert proof.holds(w, mask)
    assert torch.equal(mask, transposable_mask(w, n, m))
    tiles = (-(-shape[0] // m), -(-shape[1] // m), *shape[2:])
    assert proof.rows.shape == (shape[0], tiles[1], *shape[2:])
    assert proof.cols.shape == (tiles[0], shape[1], *shape[2:])
    assert proof.primal.shape == proof.dual.shape == proof.gap.shape == tiles
    assert float(proof.primal.sum()) == pytest.approx(float(w.double().abs()[mask].sum()))
    assert float(proof.gap.abs().max()) <= 1e-12 * float(1 + proof.dual.max())


@pytest.mark.parametrize("solver", ["greedy", "entropic"])
def test_another_mask_is_refused_and_its_gap_is_what_it_misses(solver):
    w = torch.randn(32, 24, dtype=torch.float64)
    best, proof = transposable_mask(w, 4, 8, return_certificate=True)
    mask, bound = transposable_mask(w, 4, 8, solver, return_certificate=True)
    missed = float(w.abs()[best].sum() - w.abs()[mask].sum())
    assert missed > 0
    assert float(bound.gap.sum()) == pytest.approx(missed)
    assert (bound.gap > -1e-12).all()
    for one in (proof, bound):
        verdict = one.holds(w, mask)
        assert not verdict
        assert "keeps less than its bound: it keeps" in verdict.reason
    assert bound.holds(w, best)
    assert proof.holds(w, mask, tolerance=0.1)


def test_one_worse_tile_is_named():
    w = torch.randn(16, 24)
    mask, proof = transposable_mask(w, 4, 8, return_certificate=True)
    mask[8:, 16:] = transposable_mask(1 / w[8:, 16:], 4, 8)
    assert proof.holds(w, mask).reason.startswith("tile (1, 2) keeps less than its bound")
    assert (certify(w, mask, 4, 8).gap > 1e-9).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("at", [(slice(0, 2), 0), (0, slice(0, 3))])
def test_a_mask_over_or_under_the_limits_is_refused(at):
    w = torch.randn(8, 8)
    mask, proof = transposable_mask(w, 2, 4, return_certificate=True)
    for value in (True, False):
        other = mask.clone()
        other[at] = value
        reason = proof.holds(w, other).reason
        assert reason.startswith("tile (0, 0) breaks the limits or holds fewer than fit: it keeps")


def test_tampered_prices_prove_nothing():
    w = torch.randn(6, 8)  # the lower tiles are cut off: their columns can't all be full at n = 3
    mask, proof = transposable_mask(w, 3, 4, return_certificate=True)
    assert proof.holds(w, mask)
    assert not replace(proof, rows=proof.rows + 0.1).holds(w, mask)
    assert not replace(proof, cols=proof.cols * 2 + 1).holds(w, mask)
    w, n, m = torch.randn(4, 3), 2, 4  # 3 columns of 2 are full, 4 rows of 2 can't all be
    mask, proof = transposable_mask(w, n, m, return_certificate=True)
    assert (proof.rows >= 0).all()
    shifted = replace(proof, rows=proof.rows - 9.0, cols=proof.cols + 9.0)
    assert shifted.holds(w, mask).reason.startswith("tile (0, 0) has a negative price")


def test_a_mask_from_elsewhere():
    w = torch.ones(8, 8)
    diagonal = torch.eye(8, dtype=torch.bool)
    assert certify(w, diagonal, 1, 8).holds(w, diagonal)
    assert certify(w, diagonal.flip(0), 1, 8).holds(w, diagonal)
    w[0, 0] = 0
    assert not certify(w, diagonal, 1, 8).holds(w, diagonal)


def test_nan_and_infinity():
    w = torch.randn(16, 16)
    w[0, 0], w[9, 3:5] = torch.nan, torch.inf
    mask, proof = transposable_mask(w, 4, 8, return_certificate=True)
    assert proof.holds(w, mask)
    assert proof.primal.isfinite().all()
    worse = mask.clone()
    j = int((~mask[0, :8]).nonzero()[0])
    i = int((mask[:8, j] & ~mask[:8, 0]).nonzero()[0])
    worse[0, 0], worse[0, j], worse[i, j], worse[i, 0] = False, True, False, True
    assert is_valid(worse, 4, 8, transposable=True, exact=True)
    assert not proof.holds(w, worse)


def test_integers_and_complex_numbers():
    for w in (torch.randint(-99, 99, (16, 8)), torch.randn(16, 8, dtype=torch.complex64)):
        mask, proof = transposable_mask(w, 3, 8, return_certificate=True)
        assert proof.holds(w, mask)


@settings(max_examples=40)
@given(st.integers(2, 7), st.data())
def test_a_bound_on_every_mask_whatever_the_prices(m, data):
    n = data.draw(st.integers(1, m - 1))
    rows, cols = data.draw(st.integers(1, 2 * m)), data.draw(st.integers(1, 2 * m))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9999)))
    w = torch.randn(rows, cols, generator=generator)
    mask, proof = transposable_mask(w, n, m, return_certificate=True)
    assert proof.holds(w, mask)
    noise = torch.rand(proof.rows.shape, generator=generator)
    shaken = replace(proof, rows=proof.rows.clamp(min=0) + noise, cols=proof.cols.clamp(min=0))
    assert not shaken.holds(w, mask).reason.endswith("negative price")
    other = transposable_mask(torch.rand(rows, cols, generator=generator), n, m)
    missed = certify(w, other, n, m)
    assert (missed.gap >= -1e-12 * missed.dual).all()


def test_prices_of_a_mask_that_is_not_the_best_come_to_an_end():
    level = torch.arange(16.0, dtype=torch.float64).view(1, 4, 4) ** 2
    worst = transposable_mask(1 / (level[0] + 1), 2, 4)[None]
    of_rows, of_cols = prices.tile_prices(level, worst, 2)
    assert of_rows.isfinite().all()
    assert of_cols.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (5, 0, 3)])
def test_empty(shape):
    w = torch.empty(shape)
    mask, proof = transposable_mask(w, 2, 4, return_certificate=True)
    assert isinstance(proof, Certificate)
    assert proof.holds(w, mask)
    assert proof.gap.numel() == 0


def test_messages():
    w = torch.randn(8, 8)
    mask, proof = transposable_mask(w, 2, 4, return_certificate=True)
    with pytest.raises(MaskError, match=r"w is of shape \(8, 12\).*row prices of shape \(8, 2\)"):
        proof.holds(torch.randn(8, 12), torch.ones(8, 12, dtype=torch.bool))
    with pytest.raises(
        MaskError, match=r"mask is torch.float32 of shape \(8, 8\); pass torch.bool"
    ):
        proof.holds(w, w)
    with pytest.raises(MaskError, match=r"mask is torch.bool of shape \(4, 8\); pass torch.bool"):
        certify(w, mask[:4], 2, 4)
    with pytest.raises(MaskError, match="a certificate needs values"):
        certify(w.to("meta"), mask, 2, 4)
    with pytest.raises(MaskError, match="a mask needs values"):
        certify(w, mask.to("meta"), 2, 4)
    with pytest.raises(MaskError, match="n=4 of every m=4"):
        certify(w, mask, 4, 4)
    with pytest.raises(MaskError, match=r"shape \(8,\) has 1"):
        certify(w[0], mask[0], 2, 4)
