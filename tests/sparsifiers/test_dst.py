"""DST: the estimator, both gradients, the reset, the budget, the guard, and the common life."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import Dense, Masked, Rule, SparsifierError
from sparsefx.sparsifiers import DST, SRSTE, ThresholdMask, long_tailed
from sparsefx.sparsifiers.budget import shifts

DENSE = sfx.SparseConfig(rules=[], codegen="aot_eager")
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


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


def test_a_resumed_run_is_the_same_run(mlp, tmp_path):
    whole = mlp()
    dst = DST(whole, density=0.3, steps=8)
    optimizer = sgd(dst)
    train(whole, dst, optimizer, range(5))
    torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / "saved")
    train(whole, dst, optimizer, range(5, 10))
    model = mlp(1)
    again = DST(model, density=0.3, steps=8)
    second = sgd(again)
    weights, moments = torch.load(tmp_path / "saved", weights_only=True)
    model.load_state_dict(weights)
    second.load_state_dict(moments)
    assert again.steps == 5
    train(model, again, second, range(5, 10))
    assert again.sad(total=True) == dst.sad(total=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    DST(other := mlp())
    with pytest.raises(
        SparsifierError, match=r"is unstructured 0.3, this sparsifier's is unstruct"
    ):
        other.load_state_dict(weights)


def test_equal_state_gives_equal_masks_on_every_rank(mlp):
    """Nothing is drawn: replicas whose parameters are equal get equal masks and alphas."""
    pair = [mlp(), mlp()]
    for seed, model in enumerate(pair):
        torch.manual_seed(seed)
        dst = DST(model, density=0.3, steps=4)
        train(model, dst, sgd(dst), range(6))
    for key, value in pair[0].state_dict().items():
        assert torch.equal(pair[1].state_dict()[key], value), key


def test_squash_leaves_plain_weights(mlp):
    model, plain = mlp(), mlp()
    dst = DST(model, density=0.3, steps=3)
    train(model, dst, sgd(dst), range(4))
    x, masks = torch.randn(3, 16), copy.deepcopy(dst.masks())
    expected = model(x)
    assert torch.equal(model.eval()(x), expected)
    assert dst.squash() is model
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight != 0, masks["0"])
    with pytest.raises(SparsifierError, match="this DST was squashed"):
        dst.step()
    assert dst.squash() is model


@pytest.mark.parametrize("backend", ["aot_eager", "sparsefx"])
def test_one_compilation_serves_a_training(mlp, backend):
    results = []
    for compiled in (False, True):
        model = mlp()
        dst = DST(model, density=0.3, steps=4)
        forward: Any = model
        if compiled:
            options = {"config": DENSE} if backend == "sparsefx" else None
            forward = torch.compile(model, backend=backend, fullgraph=True, options=options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(forward, dst, sgd(dst), range(6))
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value)
    if backend == "sparsefx":
        assert str(sfx.explain(forward)).count("stored mask 100%") == 3


# --- the thresholds' optimizer


def test_thresholds_do_not_decay(mlp):
    model = mlp()
    dst = DST(model, check_every=1)
    groups = dst.parameter_groups(0.1, threshold_lr=0.5)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [len(group["params"]) for group in groups] == [4, 2]
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]
    dst.attach(optimizer)
    train(model, dst, optimizer, range(2))
    optimizer.param_groups[1]["weight_decay"] = 0.1
    kept = copy.deepcopy(dst.masks())
    with pytest.raises(
        SparsifierError, match=r"decays the threshold of layer '0' \(weight_decay=0"
    ):
        dst.step()
    assert all(torch.equal(dst.masks()[name], mask) for name, mask in kept.items())
    assert dst.steps == 2


def test_an_optimizer_that_does_not_fit(mlp):
    model = mlp()
    early = torch.optim.SGD(model.parameters(), 0.1)
    dst = DST(model)
    with pytest.raises(SparsifierError, match=r"doesn't hold the threshold of layer '0'"):
        dst.attach(early)
    with pytest.raises(SparsifierError, match=r"DST: optimizer is int; pass a torch.optim.Opt"):
        dst.attach(3)
    with pytest.raises(SparsifierError, match=r"decays the threshold of layer '0'"):
        dst.attach(torch.optim.AdamW(model.parameters(), 0.1))


# --- what is not finite


@pytest.mark.parametrize("what", ["weight", "threshold", "gradient", "threshold gradient"])
def test_no_mask_moves_on_what_is_not_finite(mlp, what):
    model = mlp()
    dst = DST(model, check_every=4)
    train(model, dst, sgd(dst), range(1))
    kept = copy.deepcopy(dst.masks())
    with torch.no_grad():
        dst.thresholds()["0"].fill_(0.1)  # would turn entries of another layer
        holder = weight(model[2]) if "threshold" not in what else dst.thresholds()["2"]
        (holder.grad if "gradient" in what else holder).view(-1)[3] = math.inf
    dst.step()
    dst.step()
    message = r"layer '2' held a weight, threshold or gradient that is not finite at step 2; masks"
    with pytest.raises(SparsifierError, match=message):
        dst.step()
    with pytest.raises(SparsifierError, match=message):
        dst.squash()
    assert dst.steps == 3
    assert all(torch.equal(dst.masks()[name], mask) for name, mask in kept.items())


def test_a_scaler_skips_infinite_gradients_itself(mlp):
    model = mlp()
    dst = DST(model, check_every=1, check_gradients=False)
    optimizer = sgd(dst)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.full((1, 16), math.inf)).sum() + dst.loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    dst.step()
    assert dst.steps == 1
    assert dst.density() == 1.0


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, r"DST: alpha=-1.0 must be a number of at least 0 and below inf"),
        ({"alpha": math.nan}, r"DST: alpha=nan must be a number"),
        ({"alpha": "a"}, r"DST: alpha='a' must be a number"),
        ({"density": 1, "steps": 3}, r"DST: density=1 must be a number of at least 0 and below 1"),
        ({"density": 0.1}, r"DST: density=0.1 needs steps=..., the optimizer steps until"),
        ({"steps": 10}, r"DST: steps=10 is read with density= only; leave it out"),
        ({"density": 0.1, "steps": 0}, r"DST: steps=0 must be an int of at least 1"),
        ({"density": 0.01, "steps": 9}, r"density=0.01 must be above reset=0.01, the share that"),
        ({"reset": 1.0}, r"DST: reset=1.0 must be a number of at least 0 and below 1"),
        ({"check_every": 0}, r"DST: check_every=0 must be an int of at least 1"),
        ({"rules": ["nothing"]}, r"rule 'nothing' matches no layer; there are: 0, 2"),
    ],
)
def test_bad_options(mlp, snapshot, options, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=message):
        DST(model, **options)
    before.assert_same()


def test_bad_models(mlp):
    with pytest.raises(SparsifierError, match=r"model is int; pass an nn.Module"):
        DST(3)
    with pytest.raises(SparsifierError, match=r"no layer is left to sparsify"):
        DST(nn.ReLU())
    model = mlp()
    SRSTE(model)
    with pytest.raises(SparsifierError, match=r"a sparsifier is already on layer '0'"):
        DST(model)


def test_a_layer_of_no_rows():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 0))
    dst = DST(model, density=0.5, steps=2)
    dst.step()
    dst.step()
    assert dst.kept() == {"0": 16, "1": 0}
    assert dst.densities() == {"0": 0.5, "1": 0.0}
    assert isinstance(dst.layers["0"].mask, ThresholdMask)
