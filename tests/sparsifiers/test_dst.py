"""DST: the estimator, both gradients, the reset, the budget, the guard, and the common life."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsefx import Dense, Masked, Rule
from sparsefx.sparsifiers import DST, long_tailed
from sparsefx.sparsifiers.budget import shifts


def weight(model: nn.Module) -> nn.Parameter:
    return model.parametrizations.weight.original


def sgd(dst: DST, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(dst.parameter_groups(), lr, momentum=0.9)


def train(model: Any, dst: DST, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(i))
        optimizer.zero_grad()
        (model(x).square().mean() + dst.loss()).backward()
        optimizer.step()
        dst.step()


def by_hand(w: Tensor, t: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight [out, ...] and threshold [out], row by row, from the formula."""
    of_w, of_t = torch.empty_like(w), torch.empty_like(t)
    for row in range(len(w)):
        q = w[row].abs() - t[row]
        through = grad[row] * w[row] * long_tailed(q)
        of_w[row] = grad[row] * (q > 0) + through * w[row].sign()
        of_t[row] = -through.sum()
    return of_w, of_t


def test_the_estimator():
    x = torch.tensor([0, 0.1, 0.4, 1, 1.01, -0.1, -0.4, -1, -1.01], dtype=torch.float64)
    wanted = torch.tensor([2, 1.6, 0.4, 0.4, 0, 1.6, 0.4, 0.4, 0], dtype=torch.float64)
    torch.testing.assert_close(long_tailed(x), wanted, rtol=0, atol=1e-15)
    assert long_tailed(x.float()).dtype is torch.float32
    grid = torch.linspace(-2, 2, 400001, dtype=torch.float64)
    assert float(long_tailed(grid).sum() * 1e-5) == pytest.approx(1.44, abs=1e-4)


LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (3, 7)),
    "one input": (lambda: nn.Linear(1, 5), (3, 1)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 2), (2, 3, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_the_formula(name):
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.mul_(3)  # some margins beyond 0.4, some beyond 1
    dst = DST(nn.Sequential(layer))
    (threshold,) = dst.thresholds().values()
    with torch.no_grad():
        threshold.copy_(torch.rand_like(threshold))
    dst.step()
    (mask,) = dst.masks().values()
    w, x = weight(layer), torch.randn(shape, dtype=torch.float64)
    assert torch.equal(mask, w.abs() > threshold.view(-1, *[1] * (w.dim() - 1)))
    with torch.no_grad():
        plain.weight.copy_(w * mask)
    layer(x).sin().sum().backward()
    plain(x).sin().sum().backward()
    of_w, of_t = by_hand(w.detach(), threshold.detach(), plain.weight.grad)
    torch.testing.assert_close(w.grad, of_w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(threshold.grad, of_t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = nn.Sequential(nn.Linear(16, 8)).to(dtype)
    dst = DST(model, density=0.5, steps=1)
    model(torch.randn(4, 16, dtype=dtype)).sum().backward()
    (threshold,) = dst.thresholds().values()
    assert (threshold.dtype, threshold.grad.dtype) == (torch.float32, torch.float32)
    assert weight(model[0]).grad.dtype is dtype
    dst.step()
    assert abs(dst.density() - 0.5) <= 0.01


def test_a_layer_stored_the_other_way_round():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 7).double()  # weight [7, 5]: 5 output units
    dst = DST(nn.Sequential(layer))
    (threshold,) = dst.thresholds().values()
    assert threshold.shape == (5,)
    with torch.no_grad():
        threshold.copy_(torch.rand_like(threshold) * 0.03)
    dst.step()
    w, x = weight(layer), torch.randn(3, 7, dtype=torch.float64)
    layer(x).square().sum().backward()
    y = (x @ (w * (w.abs() > threshold)) + layer.bias).detach()
    of_w, of_t = by_hand(w.detach().t(), threshold.detach(), (x.t() @ (2 * y)).t())
    torch.testing.assert_close(w.grad, of_w.t())
    torch.testing.assert_close(threshold.grad, of_t)


def test_attention_projections(fit):
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    names = [name for name, _ in layer.named_parameters()]
    dst = DST(layer)
    assert {name: t.shape[0] for name, t in dst.thresholds().items()}["in_proj_weight"] == 24
    x = torch.randn(2, 3, 8)
    (layer(x, x, x)[0].square().sum() + dst.loss()).backward()
    assert all(t.grad is not None for t in dst.thresholds().values())
    assert [name for name, _ in dst.squash().named_parameters()] == names


def test_per_sample_gradients():
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    dst = DST(model)
    parameters = dict(model.named_parameters())
    x = torch.randn(5, 4)

    def loss(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (row,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    model(x).square().sum().backward()
    assert len(each) == 3
    for name, p in parameters.items():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-5, atol=1e-5)
    assert dst.steps == 0


def test_the_regulariser(mlp):
    dst = DST(mlp(), 0.01)
    assert dst.loss().item() == pytest.approx(0.01 * 32)
    with torch.no_grad():
        dst.thresholds()["2"].fill_(math.log(2))
    dst.loss().backward()
    assert dst.loss().item() == pytest.approx(0.01 * (24 + 4))
    torch.testing.assert_close(dst.thresholds()["2"].grad, torch.full((8,), -0.005))


def test_a_layer_that_keeps_next_to_nothing_is_reset():
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 10))
    dst = DST(model)
    with torch.no_grad():
        for name, count in (("0", 2), ("1", 2)):  # 1 % of 200, 2 % of 100
            dst.thresholds()[name].fill_(1.0)
            weight(model[int(name)]).fill_(0.5).view(-1)[:count] = 2.0
    dst.step()
    assert dst.kept() == {"0": 200, "1": 2}
    assert dst.thresholds()["0"].eq(0).all()
    assert dst.thresholds()["1"].eq(1).all()
    never = DST(nn.Sequential(nn.Linear(20, 10)), reset=0)
    with torch.no_grad():
        never.thresholds()["0"].fill_(1.0)
    never.step()
    assert never.kept() == {"0": 0}


def test_counts_are_sums_of_masks(mlp):
    model = mlp()
    dst = DST(model, rules=[Rule("0", forward=Masked()), Rule("2", forward=Dense())])
    with torch.no_grad():
        dst.thresholds()["0"].fill_(0.1)
    dst.step()
    mask = dst.masks()["0"]
    assert dst.kept() == {"0": int((weight(model[0]).abs() > 0.1).sum())} == {"0": int(mask.sum())}
    assert dst.densities() == {"0": dst.density()} == {"0": int(mask.sum()) / (16 * 24)}
    assert dst.report().rows[0].kept == pytest.approx(dst.density())
    assert dst.skipped == {"2": "the rule says Dense()"}
    assert dst.sad()["0"] == 16 * 24 - int(mask.sum())


SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@given(SIZES, st.floats(0.05, 0.95), st.sampled_from([0.0, 0.01, 0.04]), st.integers(0, 999))
def test_one_number_meets_the_budget(sizes, density, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    margins = [torch.randn(n, generator=generator) * (i + 1) for i, n in enumerate(sizes)]
    moves = shifts(margins, density, floor)
    kept = [int((m > move).sum()) for m, move in zip(margins, moves, strict=True)]
    total, least = sum(sizes), [int(floor * n) + 1 if floor else 0 for n in sizes]
    wanted = min(max(round(density * total), 1), total - 1)
    if total > 1:
        assert sum(kept) == max(wanted, sum(least))
    assert all(k >= n for k, n in zip(kept, least, strict=True))


def test_the_budget_is_met_from_its_step_on(mlp):
    model = mlp()
    dst = DST(model, density=0.2, steps=30)
    optimizer = sgd(dst)
    train(model, dst, optimizer, range(29))
    alphas = [float(dst.strength(layer)) for layer in dst.layers.values()]
    assert alphas[0] == alphas[1] > 5e-4
    for step in range(29, 34):
        train(model, dst, optimizer, range(step, step + 1))
        assert abs(dst.density() - 0.2) <= 2 / 576
        for name, layer in dst.layers.items():
            assert torch.equal(
                dst.masks()[name], layer.weight.abs() > dst.thresholds()[name][:, None]
            )
    assert "unstructured 0.2" in str(dst.report())


def test_no_layer_is_emptied_by_the_budget():
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    dst = DST(model, density=0.1, steps=1)
    dst.step()
    assert dst.kept() == {"0": 75, "1": 5}
