"""The entropic solver: near the optimum, its plan within the limits, traceable where it says so."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sparsefx.masks import entropic, exact, levels


def share(tiles, kept, n):
    """What a mask keeps of what the best one does, on average."""
    totals = (
        torch.where(mask, tiles.abs(), 0).sum((1, 2)) for mask in (kept, exact.solve(tiles, n))
    )
    return float(torch.div(*totals).mean())


@pytest.mark.parametrize(("n", "m"), [(4, 8), (8, 16), (8, 32), (16, 32)])
@pytest.mark.parametrize("values", ["normal", "heavy tails", "uniform"])
def test_within_half_a_percent_of_the_optimum(n, m, values):
    tiles = torch.randn(24, m, m)
    tiles = {"normal": tiles, "heavy tails": tiles**3, "uniform": torch.rand(24, m, m)}[values]
    kept = entropic.solve(tiles, n)
    assert (kept.sum(1) == n).all()
    assert (kept.sum(2) == n).all()
    assert 0.995 <= share(tiles, kept, n) <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float(dtype):
    tiles = torch.randn(6, 8, 8).to(dtype)
    assert share(tiles.float(), entropic.solve(tiles, 4), 4) > 0.995
    assert torch.equal(entropic.solve(-tiles * 4, 4), entropic.solve(tiles, 4))


@pytest.mark.parametrize(("a", "b", "limits"), [(8, 8, (4, 4)), (5, 8, (3, 3)), (7, 9, (2, 3))])
def test_the_plan_keeps_the_limits(a, b, limits):
    level = levels.integer_levels(torch.randn(9, a * b))[0].view(9, a, b)
    plan = entropic.transport(level, *limits).clamp(max=1)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(2), torch.full((9, a), float(limits[0])), rtol=0.05, atol=0)
    assert (plan.sum(1) <= limits[1] * 1.05).all()


def test_the_plan_can_be_traced():
    level = levels.integer_levels(torch.randn(3, 64))[0].view(3, 8, 8)
    traced = make_fx(lambda x: entropic.transport(x, 4, 4), tracing_mode="symbolic")(level)
    other = level.flip(1)
    assert torch.equal(traced(other), entropic.transport(other, 4, 4))


def test_more_tournaments_keep_more(monkeypatch):
    tiles = torch.randn(40, 16, 16)
    shares = []
    for count in (0, 1, 2):
        monkeypatch.setattr(entropic, "_TOURNAMENTS", count)
        shares.append(share(tiles, entropic.solve(tiles, 8), 8))
    assert shares[0] < shares[1] <= shares[2]


def test_in_chunks(monkeypatch):
    tiles = torch.randn(11, 6, 6)
    whole = entropic.solve(tiles, 3)
    monkeypatch.setattr(entropic, "_CHUNK", 4 * 36)
    assert torch.equal(entropic.solve(tiles, 3), whole)
