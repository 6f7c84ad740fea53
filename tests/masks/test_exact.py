"""The exact solver: an LP, brute force, symmetries; C++ and torch come to the same mask."""

from itertools import product

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

from sparsefx import compat
from sparsefx.errors import KernelError, SparsefxWarning
from sparsefx.masks import exact, flow, is_valid, levels, native, patterns, transposable_mask

INF, NAN = torch.inf, torch.nan


def lp_totals(tiles, n):
    """The largest total of each square tile: the linear program whose corners are the masks."""
    count, m, _ = tiles.shape
    one = np.ones((1, m))
    rows = np.kron(np.eye(m), one)
    cols = np.kron(one, np.eye(m))
    limits = vstack([csr_matrix(rows), csr_matrix(cols)])
    totals = []
    for tile in tiles.abs().double().numpy().reshape(count, -1):
        found = linprog(-tile, A_eq=limits, b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs")
        totals.append(-found.fun)
    return torch.tensor(totals, dtype=torch.float64)


def totals(tiles, kept):
    return torch.where(kept, tiles.abs().double(), 0).sum((1, 2))


def random_tiles(count, a, b, kind):
    w = torch.randn(count, a, b)
    if kind == "ties":
        return w.round()
    if kind == "not finite":
        w[torch.rand_like(w) < 0.05] = INF
        w[torch.rand_like(w) < 0.05] = NAN
    if kind == "tiny":
        return w.double() * 1e-300
    return torch.zeros_like(w) if kind == "zero" else w


@pytest.mark.parametrize(("n", "m"), [(2, 8), (4, 8), (6, 8), (8, 16)])
def test_equal_to_a_linear_program_on_200_tiles(n, m):
    tiles = torch.randn(200, m, m)
    kept = exact.solve(tiles, n)
    assert (kept.sum(1) == n).all()
    assert (kept.sum(2) == n).all()
    torch.testing.assert_close(totals(tiles, kept), lp_totals(tiles, n), rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["normal", "ties", "not finite", "tiny", "zero"])
@pytest.mark.parametrize(
    ("a", "b", "n"),
    [
        *[(8, 8, 4), (8, 8, 1), (16, 16, 8), (9, 9, 5), (7, 5, 3), (3, 8, 4), (8, 3, 4), (5, 8, 6)],
        *[(13, 16, 15), (32, 32, 8), (64, 48, 21), (1, 9, 2), (9, 1, 2)],
    ],
)
def test_cpp_and_torch_find_the_same_mask(a, b, n, kind):
    tiles = random_tiles(1 if a > 16 else 8, a, b, kind)
    kept = flow.solve(tiles, n)
    assert torch.equal(native.solve(tiles, n), kept)
    assert (kept.sum((1, 2)) == min(a * min(n, b), b * min(n, a))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_cpp_and_torch_agree_for_every_float(dtype):
    tiles = torch.randn(20, 8, 8).to(dtype)
    assert torch.equal(native.solve(tiles, 3), flow.solve(tiles, 3))


@pytest.mark.parametrize("kind", ["normal", "ties", "not finite"])
@pytest.mark.parametrize(("a", "b"), list(product([1, 2, 3, 4], repeat=2)))
@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_tiles_by_brute_force(a, b, n, kind):
    tiles = random_tiles(20, a, b, kind)
    level = levels.integer_levels(tiles.flatten(1))[0]
    legal = torch.tensor(patterns.legal_patterns(a, b, n), dtype=torch.float64)
    best = (level @ legal.T).amax(1)
    for solve in (flow.solve, native.solve, exact.solve):
        assert torch.equal(torch.where(solve(tiles, n).flatten(1), level, 0).sum(1), best)


@settings(max_examples=40)
@given(st.integers(2, 9), st.data())
def test_symmetries(m, data):
    n, seed = data.draw(st.integers(1, m - 1)), data.draw(st.integers(0, 9999))
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(4, m, m, generator=generator)
    w = w.round() if data.draw(st.booleans()) else w
    kept = exact.solve(w, n)
    best = totals(w, kept)
    assert torch.equal(exact.solve(-w * 2.0 ** data.draw(st.integers(-60, 60)), n), kept)
    rows, cols = (torch.randperm(m, generator=generator) for _ in range(2))
    moved = w[:, rows][:, :, cols]
    for other in (moved, w.transpose(1, 2)):
        torch.testing.assert_close(totals(other, exact.solve(other, n)), best, rtol=1e-12, atol=0)
    dropped = totals(w, torch.ones_like(kept)) - best  # the rest is the lightest (m - n):m mask
    light = w.abs().amax() + 1 - w.abs()
    lightest = totals(w, exact.solve(light, m - n))
    torch.testing.assert_close(lightest, dropped, rtol=1e-5, atol=1e-5)


def test_shortest_paths_in_chunks(monkeypatch):
    tiles = torch.randn(23, 6, 6)
    whole = flow.solve(tiles, 3)
    monkeypatch.setattr(flow, "_CHUNK", 5 * 36)
    assert torch.equal(flow.solve(tiles, 3), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_levels_keep_what_they_promise(dtype):
    w = torch.randn(9, 64, dtype=dtype) * torch.logspace(
        -290 if dtype.itemsize == 8 else -36, 30, 9
    )[:, None].to(dtype)
    level, unit = levels.integer_levels(w)
    assert torch.equal(level, level.round())
    assert (level < 2.0**46).all()
    wide = w.double().abs()
    assert ((level * unit - wide).abs() <= wide.amax(1, True) * 2.0**-46).all()
    if dtype == torch.float32:
        large = wide > wide.amax(1, True) * 2.0**-21
        assert torch.equal((level * unit)[large], wide[large])  # exactly


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(source):
        raise KernelError("C++ can't be built here: no compiler")

    monkeypatch.setattr(native, "build_cpp", refuse)
    native._library.cache_clear()
    yield
    native._library.cache_clear()


def test_without_a_compiler_one_warning_and_the_same_mask(no_compiler):
    w = torch.randn(24, 20)
    with pytest.warns(
        SparsefxWarning, match=r"to the same masks but more slowly: C.. can't"
    ) as seen:
        mask = transposable_mask(w, 4, 8)
    assert torch.equal(
        transposable_mask(w, 4, 8), mask
    )  # not a second warning: it is an error here
    assert len(seen) == 1
    native._library.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "build_cpp", compat.build_cpp)
        assert torch.equal(transposable_mask(w, 4, 8), mask)


@pytest.mark.parametrize(
    ("source", "reason"), [("this is not C++", "CppCompileError: C.. compile error")]
)
def test_what_the_compiler_says_is_told(source, reason):
    with pytest.raises(KernelError, match=f"C.. can't be built here: {reason}; install a C.. comp"):
        compat.build_cpp(source)


def test_no_compiler_at_all_is_told(monkeypatch):
    import torch._inductor.cpp_builder as builder
    from torch._inductor import exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    with pytest.raises(KernelError, match=r"InvalidCxxCompiler: No working C.. compiler found"):
        compat.build_cpp("extern int nothing;")


def test_4096_tiles_of_each_thread_are_all_solved():
    w = torch.randn(512, 512)
    mask = transposable_mask(w, 4, 8)
    assert is_valid(mask, 4, 8, transposable=True, exact=True)
    tiles = w.view(64, 8, 64, 8).transpose(1, 2).reshape(-1, 8, 8)
    kept = mask.view(64, 8, 64, 8).transpose(1, 2).reshape(-1, 8, 8)
    assert torch.equal(kept, flow.solve(tiles, 4))


def test_a_tensor_of_another_kind_is_solved_by_operators(monkeypatch):
    class Wrapped(torch.Tensor):
        pass

    w = torch.randn(16, 8)
    mask = transposable_mask(w, 3, 8)
    monkeypatch.setattr(native, "solve", lambda *_: pytest.fail("reads memory"))
    assert torch.equal(
        transposable_mask(w.as_subclass(Wrapped), 3, 8).as_subclass(torch.Tensor), mask
    )
