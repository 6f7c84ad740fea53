"""SparseGPT: the sweep against explicit inverses, its masks, and what it gains."""

import pytest
import torch
from torch import Tensor, nn

from sparsefx.errors import SparsifierError
from sparsefx.masks import is_valid, nm_mask, transposable_mask
from sparsefx.sparsifiers import SparseGPT, Wanda
from sparsefx.sparsifiers import sparsegpt as file
from sparsefx.sparsifiers.least_squares import layer_error
from sparsefx.sparsifiers.sparsegpt import inverse_factor, obs_scores, sweep


def correlated(out: int, size: int, count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(w [out, K], X X^T [K, K]), float64; inputs are ReLUs of fewer latent variables."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size // 2, generator=g, dtype=torch.float64)
    latent = torch.randn(size // 2, count, generator=g, dtype=torch.float64)
    noise = torch.randn(size, count, generator=g, dtype=torch.float64)
    x = (mix @ latent / (size // 2) ** 0.5 + 0.5 * noise).relu()
    return torch.randn(out, size, generator=g, dtype=torch.float64), x @ x.T


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def by_explicit_inverses(
    w: Tensor, hessian: Tensor, pattern: tuple[int, int] | Tensor
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 as it is derived: the inverse of what is left, anew for each column."""
    w = w.clone()
    mask = pattern.clone() if isinstance(pattern, Tensor) else torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if not isinstance(pattern, Tensor) and j % pattern[1] == 0:
            n, m = pattern
            diagonal = [torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(j, j + m)]
            mask[:, j : j + m] = nm_mask(w[:, j : j + m] ** 2 / torch.stack(diagonal), n, m)
        inverse = torch.linalg.inv(hessian[j:, j:])
        pruned = torch.where(mask[:, j], 0.0, w[:, j])
        w[:, j:] -= (pruned / inverse[0, 0])[:, None] * inverse[0]
    return torch.where(mask, w, 0.0), mask


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (3, 8), (11, 12)], ids=str)
@pytest.mark.parametrize("block", [8, 16, 128])
def test_sweep_is_that_of_explicit_inverses(
    pattern: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(file, "BLOCK", block)
    w, gram = correlated(6, 24)
    new, mask = sweep(w, inverse_factor(gram, 0.01), pattern)
    expected, expected_mask = by_explicit_inverses(w, damped(gram, 0.01), pattern)
    assert torch.equal(mask, expected_mask)
    assert bool((mask.unflatten(1, (-1, pattern[1])).sum(2) == pattern[0]).all())
    torch.testing.assert_close(new, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("block", [7, 128])
def test_sweep_over_a_fixed_mask(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(file, "BLOCK", block)
    w, gram = correlated(6, 20)
    wanted = torch.rand(6, 20, generator=torch.Generator().manual_seed(2)) < 0.5
    new, mask = sweep(w, inverse_factor(gram, 0.01), wanted)
    assert torch.equal(mask, wanted)
    expected, _ = by_explicit_inverses(w, damped(gram, 0.01), wanted)
    torch.testing.assert_close(new, expected, rtol=1e-7, atol=1e-8)


def test_a_full_mask_changes_nothing():
    w, gram = correlated(3, 8)
    new, _ = sweep(w, inverse_factor(gram, 0.01), torch.ones_like(w, dtype=torch.bool))
    assert torch.equal(new, w)


def test_factor_and_scores():
    w, gram = correlated(3, 8)
    inverse = torch.linalg.inv(damped(gram, 0.05))
    factor = inverse_factor(gram, 0.05)
    torch.testing.assert_close(factor.T @ factor, inverse)
    torch.testing.assert_close(factor, factor.triu())
    torch.testing.assert_close(obs_scores(w, factor), w**2 / inverse.diagonal())


@pytest.mark.parametrize("seed", range(3))
def test_beats_wanda_and_magnitude_on_correlated_inputs(seed: int):
    w, gram = correlated(32, 64, seed=seed)
    by_norm = nm_mask(w.abs() * gram.diagonal().sqrt(), 2, 4)
    new, _ = sweep(w, inverse_factor(gram, 0.01), (2, 4))
    error = float(layer_error(new, w, gram).sum())
    for mask in (nm_mask(w, 2, 4), by_norm):
        plain = float(layer_error(torch.where(mask, w, 0.0), w, gram).sum())
        assert error < 0.75 * plain


@pytest.mark.parametrize("transposable", [False, True])
def test_in_a_model_it_beats_wanda(transposable: bool):
    x = torch.randn(500, 16) @ torch.randn(16, 32) + 0.3 * torch.randn(500, 32)
    w = torch.randn(16, 32)
    after = []
    for method in (SparseGPT, Wanda):
        fc = nn.Linear(32, 16)
        fc.weight.data = w.clone()
        (row,) = method(fc, 2, 4, transposable=transposable).calibrate(x.split(100)).rows
        after.append(row.after)
    assert after[0] < 0.75 * after[1]
    assert after[0] < 0.75 * row.before


def test_inputs_that_were_always_zero_are_pruned_first():
    w, gram = correlated(6, 16)
    gram[[1, 4]] = 0
    gram[:, [1, 4]] = 0
    new, mask = sweep(w, inverse_factor(gram, 0.01), (3, 4))
    assert not mask[:, [1, 4]].any()
    live = torch.ones(16, dtype=torch.bool).index_fill(0, torch.tensor([1, 4]), False)
    expected, _ = by_explicit_inverses(w[:, live], damped(gram, 0.01)[live][:, live], mask[:, live])
    torch.testing.assert_close(new[:, live], expected, rtol=1e-7, atol=1e-8)
    _, one_of_four = sweep(w[:, :4], inverse_factor(torch.diag(gram.diagonal()[:4]), 0.01), (1, 4))
    assert not one_of_four[:, 1].any()


def test_no_input_at_all_is_magnitude_pruning():
    w, gram = correlated(6, 16)
    new, mask = sweep(w, inverse_factor(torch.zeros_like(gram), 0.01), (2, 4))
    assert torch.equal(mask, nm_mask(w, 2, 4))
    assert torch.equal(new, torch.where(mask, w, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_weights_dtype_and_float64_inside(dtype: torch.dtype):
    w, gram = correlated(4, 8)
    w = w.to(dtype)
    factor = inverse_factor(gram, 0.01)
    new, mask = sweep(w, factor, (2, 4))
    again, same = sweep(w.double(), factor, (2, 4))
    assert new.dtype == dtype
    assert torch.equal(mask, same)
    assert torch.equal(new, again.to(dtype))


@pytest.mark.parametrize("transposable", [False, True])
def test_conv_takes_inputs_tap_by_tap(transposable: bool):
    """A 2x1 conv with groups is, for each group, a linear layer over [tap, channel]."""
    conv = nn.Conv2d(8, 8, (2, 1), groups=2, bias=False)
    w, x = conv.weight.detach().double().clone(), torch.randn(6, 8, 5, 3)
    sparsifier = SparseGPT(conv, 2, 4, transposable=transposable)
    sparsifier.calibrate([x])
    sparsifier.squash()
    assert is_valid(conv.weight, 2, 4, dim=1, transposable=transposable)
    factors, flat = [], []
    for g in range(2):
        inputs = x[:, 4 * g : 4 * g + 4].double()
        rows = torch.cat([inputs[:, :, :-1], inputs[:, :, 1:]], 1).movedim(1, 0).flatten(1)
        factors.append(inverse_factor(rows @ rows.T, 0.01))
        flat.append(w[4 * g : 4 * g + 4, :, :, 0].mT.flatten(1))  # [out, tap, channel]
    patterns: list = [(2, 4), (2, 4)]
    if transposable:
        costs = [
            obs_scores(*pair).unflatten(1, (2, 4)).mT for pair in zip(flat, factors, strict=True)
        ]
        mask = transposable_mask(torch.cat(costs), 2, 4)
        patterns = [part.mT.flatten(1) for part in mask.chunk(2)]
    done = [sweep(f, h, p)[0] for f, h, p in zip(flat, factors, patterns, strict=True)]
    expected = torch.cat([d.unflatten(1, (2, 4)).mT for d in done])[..., None]
    torch.testing.assert_close(conv.weight.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_bad_arguments(mlp, snapshot):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(SparsifierError, match="damping=0 leaves a singular Hessian"):
        SparseGPT(model, damping=0)
    with pytest.raises(SparsifierError, match="damping=-1 must be finite and >= 0"):
        SparseGPT(model, damping=-1)
    before.assert_same()
    with pytest.raises(SparsifierError, match="gram holds NaN or infinity"):
        inverse_factor(torch.full((2, 2), float("nan")), 0.01)
