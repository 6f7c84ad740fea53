"""transposable_mask: both limits in every tile for every solver, the optimum, the edges."""

import math
from functools import partial
from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sparsefx.errors import MaskError
from sparsefx.masks import is_valid, magnitudes, patterns, retained, transposable_mask
from sparsefx.masks.levels import finite_levels

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL = [(1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 4)]
LARGE = [(2, 8), (4, 8), (7, 8), (3, 7), (8, 16), (16, 32), (21, 48)]
SOLVERS = ["exact", "greedy", "entropic"]
INF, NAN = math.inf, math.nan


PACKED = torch.empty(8, 8, dtype=torch.float4_e2m1fn_x2)


def best_total(w, n):
    """The largest total of as many as fit, by the linear program whose corners are the masks."""
    a, b = w.shape
    rows = np.kron(np.eye(a), np.ones(b))
    cols = np.kron(np.ones(a), np.eye(b))
    limits = np.concatenate([rows, cols])
    found = linprog(
        -w.abs().double().numpy().ravel(),
        A_ub=limits,
        b_ub=np.full(a + b, n),
        A_eq=np.ones((1, a * b)),
        b_eq=[most(a, b, n)],
        bounds=(0, 1),
    )
    return -found.fun


def most(a, b, n):
    """The largest count of ones in a x b with at most n per row and column, by flow bounds."""
    return min(a * min(n, b), b * min(n, a))


def tiles(w, m):
    """Every tile of a matrix, the cut ones too."""
    for i, j in product(range(0, w.shape[0], m), range(0, w.shape[1], m)):
        yield w[i : i + m, j : j + m]


@pytest.mark.parametrize(
    ("side", "n", "count"), [(2, 1, 2), (3, 1, 6), (3, 2, 6), (4, 1, 24), (4, 2, 90), (4, 3, 24)]
)
def test_number_of_patterns(side, n, count):
    assert len(set(patterns.legal_patterns(side, side, n))) == count


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("a", "b"), list(product([1, 2, 3], repeat=2)))
def test_patterns_of_cut_tiles_are_all_there_are(a, b, n):
    legal = set()
    for bits in product((0, 1), repeat=a * b):
        tile = np.array(bits).reshape(a, b)
        if max(*tile.sum(0), *tile.sum(1), 0) <= n:
            legal.add(bits)
    top = max(map(sum, legal))
    assert top == most(a, b, n)
    assert set(patterns.legal_patterns(a, b, n)) == {bits for bits in legal if sum(bits) == top}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), SMALL)
def test_exact_is_the_optimum(n, m, dtype):
    w = torch.randn(4 * m, 3 * m).to(dtype)
    mask = transposable_mask(w, n, m, solver="exact")
    for tile, kept in zip(tiles(w, m), tiles(mask, m), strict=True):
        assert (kept.sum(0) == n).all()
        assert (kept.sum(1) == n).all()
        total = float(tile.double().abs()[kept].sum())
        assert total == pytest.approx(best_total(tile, n), rel=1e-9)
    assert torch.equal(transposable_mask(w, n, m), mask)  # "auto"


def test_exact_takes_the_first_of_equals():
    first = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]).bool()
    for value in (0.0, 1.0, 0.3):
        assert torch.equal(transposable_mask(torch.full((12, 8), value), 2, 4), first.repeat(3, 2))


def test_exact_in_chunks(monkeypatch):
    w = torch.randn(24, 20)
    whole = transposable_mask(w, 2, 4)
    monkeypatch.setattr(patterns, "_CHUNK", 7)
    assert torch.equal(transposable_mask(w, 2, 4), whole)


@pytest.mark.parametrize("solver", SOLVERS)
def test_precision_settings_change_nothing(solver):
    w = torch.randn(64, 64) * 1e-3 + 1  # near ties: a sum in bfloat16 could not tell them apart
    mask = transposable_mask(w, 2, 4, solver=solver)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(transposable_mask(w, 2, 4, solver=solver), mask)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("values", ["normal", "ties", "equal", "zero", "diagonal"])
@pytest.mark.parametrize(("n", "m"), SMALL + LARGE)
def test_every_tile_is_full(n, m, values, solver):
    w = torch.randn(2 * m, 3 * m)
    w = {
        "normal": w,
        "ties": w.round(),
        "equal": torch.ones_like(w),
        "zero": torch.zeros_like(w),
        "diagonal": w + 9 * torch.eye(m).repeat(2, 3),
    }[values]
    mask = transposable_mask(w, n, m, solver=solver)
    for kept in tiles(mask, m):
        assert (kept.sum(0) == n).all()
        assert (kept.sum(1) == n).all()
    assert is_valid(mask, n, m, transposable=True, exact=True)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (8, 16)])
def test_a_single_tile_is_what_it_is_in_a_batch(n, m, solver):
    w = torch.randn(5 * m, 4 * m)
    batch = transposable_mask(w, n, m, solver=solver)
    for tile, kept in zip(tiles(w, m), tiles(batch, m), strict=True):
        assert torch.equal(transposable_mask(tile, n, m, solver=solver), kept)
        assert int(kept.sum()) == n * m


@pytest.mark.parametrize(("n", "m", "share"), [(4, 8, 0.99), (2, 8, 0.97), (2, 4, 0.985)])
def test_greedy_comes_near_the_optimum(n, m, share):
    w = torch.randn(m, 50 * m)
    mask = transposable_mask(w, n, m, solver="greedy")
    ratios = []
    for tile, kept in zip(tiles(w, m), tiles(mask, m), strict=True):
        best, all_of_it = best_total(tile, n), float(tile.double().abs().sum())
        total = float(tile.double().abs()[kept].sum())
        ratios.append(total / best)
        assert all_of_it - total < 2 * (all_of_it - best)  # the bound of the paper
    assert np.mean(ratios) >= share
    assert max(ratios) <= 1 + 1e-9


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("shape", "m"),
    [
        *product([(4, 7), (5, 4), (6, 7), (7, 7), (3, 3), (1, 9), (2, 1), (1, 1)], [4]),
        *product([(8, 13), (11, 8), (15, 10), (6, 9), (5, 17)], [8]),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_cut_tiles_hold_as_many_as_the_limits_allow(shape, m, n, solver):
    w = torch.randn(shape)
    mask = transposable_mask(w, n, m, solver=solver)
    assert is_valid(mask, n, m, transposable=True, exact=True)
    for tile, kept in zip(tiles(w, m), tiles(mask, m), strict=True):
        assert int(kept.sum()) == most(*tile.shape, n)
        if solver == "exact":
            total = float(tile.double().abs()[kept].sum())
            assert total == pytest.approx(best_total(tile, n), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(("m", "short"), [(4, 1), (4, 2), (4, 3), (8, 1), (8, 5), (8, 7)])
def test_one_cut_side_is_as_if_padded_with_zeros(n, m, short):
    w = torch.randn(m, 16 + short)
    padded = torch.nn.functional.pad(w, (0, m - short))
    mask = transposable_mask(w, n, m)
    total = float(w.double().abs()[mask].sum())
    kept = transposable_mask(padded, n, m)[:, : 16 + short]
    assert total == pytest.approx(float(w.double().abs()[kept].sum()), rel=1e-9)
    assert int(mask.sum()) == int(kept.sum())


@settings(max_examples=60)
@given(st.data())
def test_valid_for_the_weight_and_its_transpose(data):
    m = data.draw(st.integers(2, 9))
    n = data.draw(st.integers(1, m - 1))
    rows, cols = data.draw(st.integers(1, 3 * m)), data.draw(st.integers(1, 3 * m))
    seed = data.draw(st.integers(0, 9999))
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    w = w.round() if data.draw(st.booleans()) else w
    mask = transposable_mask(w, n, m)
    assert is_valid(mask, n, m, transposable=True)
    assert is_valid(mask.t(), n, m, transposable=True)
    for tile in tiles(mask, m):
        assert int(tile.sum()) == most(*tile.shape, n)
    assert torch.equal(transposable_mask(w * 4, n, m), mask)


@pytest.mark.parametrize("solver", SOLVERS)
def test_twice_is_once(solver):
    w = torch.randn(16, 24)
    mask = transposable_mask(w, 2, 4, solver=solver)
    assert torch.equal(transposable_mask(w * mask, 2, 4, solver=solver), mask)


@pytest.mark.parametrize("solver", SOLVERS)
def test_conv_weights_have_tiles_of_their_own_for_each_tap(solver):
    solve = partial(transposable_mask, n=2, m=4, solver=solver)
    w = torch.randn(8, 12, 3, 2)
    for layout in (w, w.to(memory_format=torch.channels_last), w[:6, :9]):
        mask = solve(layout)
        assert mask.shape == layout.shape
        for i, j in product(range(3), range(2)):
            assert torch.equal(mask[:, :, i, j], solve(layout[:, :, i, j]))
    assert torch.equal(solve(w[..., 0]), solve(w)[..., 0])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (4, 4, 0), (0, 6), (5, 0, 3, 3)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_empty(shape, solver):
    mask = transposable_mask(torch.empty(shape), 2, 4, solver=solver)
    assert mask.shape == shape
    assert mask.dtype == torch.bool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_and_infinity_are_kept_first_and_the_rest_still_counts(solver, dtype):
    w = torch.randn(4, 4).to(dtype)
    w[0, 1], w[0, 2], w[0, 3] = INF, -INF, NAN  # only two of a row fit
    mask = transposable_mask(w, 2, 4, solver=solver)
    assert mask[0].tolist() in ([False, True, False, True], [False, False, True, True])
    assert is_valid(mask, 2, 4, transposable=True)
    if solver == "exact":  # what is finite is as large as the other two choices leave it
        totals = [
            float(w[1:].double().abs().flatten()[torch.tensor(bits[4:]).bool()].sum())
            for bits in patterns.legal_patterns(4, 4, 2)
            if bits[3] and (bits[1] or bits[2])
        ]
        assert float(w[1:].double().abs()[mask[1:]].sum()) == pytest.approx(max(totals))


@pytest.mark.parametrize("n", [1, 3])
def test_all_nan_and_all_infinite(n):
    for value, m, solver in product((NAN, INF), (4, 8), SOLVERS):
        mask = transposable_mask(torch.full((8, 8), value), n, m, solver=solver)
        assert (mask.sum(0) == 8 // m * n).all()
        assert is_valid(mask, n, m, transposable=True)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1.7e308])
def test_levels_order_whole_sums(scale):
    w = torch.rand(1, 4096, dtype=torch.float64) * scale
    w[0, :3] = torch.tensor([NAN, INF, -INF])
    level = finite_levels(w)
    assert level.sum().isfinite()
    assert level[0, 1] == level[0, 2]
    assert level[0, 1] > level[0, 3:].sum()
    assert level[0, 0] > level[0, 1] * 4095 + level[0, 3:].sum()
    assert torch.equal(level[0, 3:].argsort(), w[0, 3:].argsort())


def test_noncontiguous_weights():
    w = torch.randn(16, 24)
    for m, solver in ((4, "exact"), (8, "exact"), (8, "greedy"), (8, "entropic")):
        mask = transposable_mask(w.t().contiguous().t(), 2, m, solver=solver)
        assert torch.equal(mask, transposable_mask(w, 2, m, solver=solver))
        every = transposable_mask(w[::2, 1::3], 2, m, solver=solver)
        assert torch.equal(every, transposable_mask(w[::2, 1::3].clone(), 2, m, solver=solver))


def test_a_parameter():
    mask = transposable_mask(torch.nn.Parameter(torch.randn(8, 8)), 4, 8)
    assert not mask.requires_grad


def test_the_optimum_retains_what_the_literature_measured():
    w = torch.randn(256, 256)
    assert retained(w, transposable_mask(w, 2, 4)) == pytest.approx(0.7023, abs=0.005)
    greedy = retained(w, transposable_mask(w, 2, 4, solver="greedy"))
    assert 0.692 < greedy < retained(w, transposable_mask(w, 2, 4))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_exact_can_be_traced(mode):
    w, other = torch.randn(16, 24), torch.randn(16, 24)
    gm = make_fx(lambda w: transposable_mask(w, 2, 4), tracing_mode=mode)(w)
    assert torch.equal(gm(other), transposable_mask(other, 2, 4))
    compiled = torch.compile(transposable_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(other, 2, 4), transposable_mask(other, 2, 4))


@pytest.mark.parametrize(
    ("m", "options"), [(8, {}), (4, {"solver": "greedy"}), (4, {"return_certificate": True})]
)
def test_what_depends_on_values_is_not_traced(m, options):
    def solve(w):
        return transposable_mask(w, 2, m, **options)

    w = torch.randn(8, 8)
    with pytest.raises(MaskError, match=rf"n=2, m={m}, .* can't be traced.*sparsefx.nm_mask"):
        make_fx(solve)(w)
    with FakeTensorMode() as mode, pytest.raises(MaskError, match="can't be traced"):
        solve(mode.from_tensor(w))
    compiled = torch.compile(solve, backend="eager")  # breaks the graph there, and runs
    assert torch.equal(compiled(w)[0], solve(w)[0])


def test_every_dtype():
    w = torch.randn(16, 24)
    for dtype in magnitudes.FLOATS8:
        for solver in SOLVERS:
            narrow = w.to(dtype)
            mask = transposable_mask(narrow, 2, 8, solver)
            assert torch.equal(mask, transposable_mask(narrow.float(), 2, 8, solver))
    whole = torch.tensor([[-128, 127], [127, -127]], dtype=torch.int8)
    assert transposable_mask(whole, 1, 2).tolist() == [[True, False], [False, True]]
    flags = torch.eye(8, dtype=torch.bool)
    assert torch.equal(transposable_mask(flags, 1, 8), flags)
    turned = torch.polar(w.abs() + 0.1, torch.randn(16, 24))
    assert torch.equal(transposable_mask(turned, 4, 8), transposable_mask(turned.abs(), 4, 8))


@pytest.mark.parametrize(
    ("w", "arguments", "message"),
    [
        (torch.zeros(8, 8), (4, 4), "n=4 of every m=4 prunes nothing"),
        (torch.zeros(8, 8), (0, 4), "n=0 keeps nothing of every m=4"),
        (torch.zeros(8, 8), (2.0, 4), "n=2.0 is of type float; pass an int"),
        (
            torch.zeros(8, 8),
            (2, 4, "best"),
            "solver='best' is unknown; pass 'auto', 'exact'",
        ),
        (torch.zeros(8), (2, 4), r"shape \(8,\) has 1; pass a matrix"),
        (PACKED, (2, 4), "is not defined; convert"),
        (torch.zeros(8, 8, device="meta"), (4, 8), r"shape \(8, 8\) on the meta device has none"),
    ],
)
def test_messages(w, arguments, message):
    with pytest.raises(MaskError, match=message):
        transposable_mask(w, *arguments)
