"""Weights on a fixed mask: against lstsq on the data, singular systems, never worse than before."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.errors import SparsifierError
from sparsefx.masks import nm_mask
from sparsefx.sparsifiers import adam_fit, least_squares
from sparsefx.sparsifiers.least_squares import layer_error


def problem(
    out: int = 6, size: int = 12, count: int = 40, rank: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(w [out, K], X [K, T], a 2:4 mask), float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, rank or size, generator=g, dtype=torch.float64)
    x = mix @ torch.randn(rank or size, count, generator=g, dtype=torch.float64)
    w = torch.randn(out, size, generator=g, dtype=torch.float64)
    return w, x, nm_mask(w, 2, 4)


def by_rows(w: Tensor, x: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """One lstsq on the data for each row."""
    found = torch.zeros_like(w)
    for i, kept in enumerate(mask):
        found[i, kept] = torch.linalg.lstsq(x[kept].T, targets[i]).solution
    return found


def test_equals_lstsq_on_the_data():
    w, x, mask = problem()
    found = least_squares(w, x @ x.T, mask, damping=0)
    torch.testing.assert_close(found, by_rows(w, x, mask, w @ x))


def test_other_inputs_than_the_targets():
    w, x, mask = problem()
    dense = x + 0.3 * torch.randn_like(x)
    found = least_squares(w, x @ x.T, mask, dense @ x.T, damping=0)
    torch.testing.assert_close(found, by_rows(w, x, mask, w @ dense))


def test_rows_of_any_length():
    w, x, _ = problem(out=5)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0], mask[1] = False, True
    found = least_squares(w, x @ x.T, mask, damping=0)
    assert not found[0].any()
    torch.testing.assert_close(found[1], w[1])  # nothing pruned, nothing to make up for
    torch.testing.assert_close(found, by_rows(w, x, mask, w @ x))


@pytest.mark.parametrize("chunk", [1, 40, 100])
def test_chunks_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch):
    w, x, mask = problem(out=9)
    mask[3, :4] = True
    whole = least_squares(w, x @ x.T, mask)
    file = sys.modules[least_squares.__module__]  # the package's name of it is the function
    monkeypatch.setattr(file, "CHUNK", chunk)
    torch.testing.assert_close(least_squares(w, x @ x.T, mask), whole)


def test_damping_holds_weights_where_they_are():
    w, x, mask = problem()
    gram = x @ x.T
    shift = 0.1 * gram.diagonal().mean()
    found = least_squares(w, gram, mask, damping=0.1)
    for i, kept in enumerate(mask):
        system = gram[kept][:, kept] + shift * torch.eye(int(kept.sum()))
        expected = torch.linalg.solve(system, (w[i] @ gram)[kept] + shift * w[i, kept])
        torch.testing.assert_close(found[i, kept], expected)
    masked = torch.where(mask, w, 0.0)
    torch.testing.assert_close(least_squares(w, gram, mask, damping=1e9), masked)


def test_a_singular_gram_without_damping_changes_least():
    w, x, mask = problem(rank=3)
    gram = x @ x.T
    found = least_squares(w, gram, mask, damping=0)
    for i, kept in enumerate(mask):
        rest = w[i] @ x - torch.where(kept, w[i], 0.0) @ x
        change = torch.linalg.pinv(x[kept].T, rtol=1e-9) @ rest
        torch.testing.assert_close(found[i, kept], w[i, kept] + change, rtol=1e-5, atol=1e-6)


def test_equal_inputs_do_not_blow_up():
    """A pivot of rounding noise: Cholesky goes through, its solution would be noise."""
    w, x, _ = problem(size=8)
    x[1] = x[0]
    mask = torch.zeros_like(w, dtype=torch.bool)
    mask[:, :4] = True
    found = least_squares(w, x @ x.T, mask, damping=0)
    assert found.abs().max() < 20
    error = layer_error(found, w, x @ x.T)
    kept = x[:4]
    best = (w @ x - w @ x @ torch.linalg.pinv(kept) @ kept).square().sum(1)
    torch.testing.assert_close(error, best)


def test_dead_inputs_keep_their_weights():
    w, x, mask = problem()
    x[[0, 5]] = 0
    for damping in (0.0, 1e-2):
        found = least_squares(w, x @ x.T, mask, damping=damping)
        torch.testing.assert_close(found[:, [0, 5]], torch.where(mask, w, 0.0)[:, [0, 5]])
    nothing = least_squares(w, torch.zeros(12, 12), mask)
    torch.testing.assert_close(nothing, torch.where(mask, w, 0.0))


@given(
    seed=st.integers(0, 1000),
    rank=st.integers(1, 8),
    damping=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
    paired=st.booleans(),
    adam=st.booleans(),
)
@settings(max_examples=80)
def test_never_worse_than_masking(seed: int, rank: int, damping: float, paired: bool, adam: bool):
    w, x, mask = problem(out=4, size=8, count=12, rank=rank, seed=seed)
    dense = x + 0.2 * torch.randn_like(x) if paired else x
    gram, cross, energy = x @ x.T, dense @ x.T, dense @ dense.T
    if adam:
        found = adam_fit(w, gram, mask, cross, lr=10**-damping, steps=5)
    else:
        found = least_squares(w, gram, mask, cross, damping)
    masked = torch.where(mask, w, 0.0)
    before, after = ((v @ x - w @ dense).square().sum(1) for v in (masked, found))
    assert bool((after <= before * (1 + 1e-9) + 1e-9 * energy.trace()).all())
    assert not found[~mask].any()


def test_layer_error_is_that_of_the_data():
    w, x, mask = problem()
    dense = x + torch.randn_like(x)
    v = torch.where(mask, w, 0.0)
    torch.testing.assert_close(layer_error(v, w, x @ x.T), ((v - w) @ x).square().sum(1))
    torch.testing.assert_close(
        layer_error(v, w, x @ x.T, dense @ x.T, dense @ dense.T),
        (v @ x - w @ dense).square().sum(1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_result_has_the_weights_dtype_and_float64_inside(dtype: torch.dtype):
    w, x, mask = problem()
    w = w.to(dtype)
    found = least_squares(w, x @ x.T, mask)
    assert found.dtype == dtype
    assert torch.equal(found, least_squares(w.double(), x @ x.T, mask).to(dtype))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int]):
    w = torch.zeros(shape)
    gram = torch.eye(shape[1])
    assert least_squares(w, gram, w.bool()).shape == shape
    assert adam_fit(w, gram, w.bool(), steps=1).shape == shape


def test_adam_comes_to_the_same_minimum():
    w, x, mask = problem(count=200)
    best = least_squares(w, x @ x.T, mask, damping=0)
    found = adam_fit(w, x @ x.T, mask, count=200, lr=1e-2, steps=1500)
    torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-3)


W, GRAM, MASK = torch.ones(2, 4), torch.eye(4), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, GRAM, MASK[:1]), r"w is \[2, 4\] and the mask torch.bool \[1, 4\]"),
        ((W, GRAM, MASK.float()), r"the mask torch.float32 \[2, 4\]"),
        ((W[0], GRAM, MASK[0]), r"w is \[4\]"),
        ((W, GRAM[:3, :3], MASK), r"gram is \[3, 3\]; pass \[4, 4\] for w \[2, 4\]"),
        ((W, GRAM, MASK, GRAM[:3]), r"cross is \[3, 4\]"),
        ((W * float("nan"), GRAM, MASK), "w holds NaN or infinity"),
        ((W, GRAM * float("inf"), MASK), "gram holds NaN"),
        ((W, GRAM, MASK, GRAM * float("nan")), "cross holds NaN"),
        ((W, GRAM, MASK, None, -0.1), "damping=-0.1 must be finite and >= 0"),
        ((W, GRAM, MASK, None, float("nan")), "damping=nan must be"),
        ((W, GRAM, MASK, None, "much"), "damping='much' is of type str"),
        ((W, GRAM, MASK, None, True), "damping=True is of type bool"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str):
    with pytest.raises(SparsifierError, match=message):
        least_squares(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr=0 must be a positive number"),
        ({"lr": "1"}, "lr='1' must be"),
        ({"steps": 0}, "steps=0 must be an int of at least 1"),
        ({"steps": 1.5}, "steps=1.5 must be"),
    ],
)
def test_bad_arguments_of_adam(options: dict, message: str):
    with pytest.raises(SparsifierError, match=message):
        adam_fit(W, GRAM, MASK, **options)
