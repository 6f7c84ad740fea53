"""Provable filter pruning: sensitivities, shared eps, selection, and filters that nobody reads."""

import copy
import io
import math

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import Dense, Rule, SparsifierError
from sparsefx.sparsifiers import ProvableFilterPruner
from sparsefx.sparsifiers.pfp import (
    channel_sensitivity,
    draws_for,
    expected_unique,
    sample_complexity,
    sample_size,
)
from sparsefx.sparsifiers.pfp.allocation import Allocation, Demand
from sparsefx.sparsifiers.pfp.selection import multinomial, select

EQUAL = torch.full((64,), 1 / 64, dtype=torch.float64)


def examples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- sensitivities


def test_three_neurons_by_hand():
    """Weights 1, 1, -2 on inputs 1, 3, 5: shares 1/4 and 3/4 of one half, all of the other."""
    rows, weight = torch.tensor([[[1.0, 3, 5]]]), torch.tensor([1.0, 1, -2]).view(1, 1, 3, 1)
    assert channel_sensitivity(rows, weight).tolist() == [0.25, 0.75, 1.0]
    mixed = channel_sensitivity(torch.tensor([[[-1.0, 3, 0], [2, -2, 0]]]), weight)
    assert mixed.tolist() == [1.0, 1.0, 0.0]  # no positive part stands against a negative one


def test_taps_of_a_channel_add_up_or_the_largest_counts():
    rows = torch.tensor([[[1.0, 1, 1, 1, 2, 0]]])  # two channels of three taps
    weight = torch.ones(1, 1, 2, 3)
    assert channel_sensitivity(rows, weight).tolist() == [0.5, 0.5]
    largest = channel_sensitivity(rows, weight, taps="max")
    torch.testing.assert_close(largest, torch.tensor([1 / 6, 2 / 6]))


@pytest.mark.parametrize("taps", ["sum", "max"])
def test_shares_are_those_of_the_definition_however_they_are_cut(monkeypatch, taps):
    rows, weight = examples(2, 7, 6).double(), examples(2, 5, 3, 2, seed=1).double()
    expected = torch.zeros(2, 3, dtype=torch.float64)
    a = rows.view(2, 7, 1, 3, 2)
    for x in (a.clamp(min=0), (-a).clamp(min=0)):
        for w in (weight.clamp(min=0), (-weight).clamp(min=0)):
            each = x * w.unsqueeze(1)  # [G, T, o, c, taps]
            inside = each.sum(4) if taps == "sum" else each.amax(4)
            share = inside / each.sum((3, 4)).unsqueeze(3)
            expected = torch.maximum(expected, share.nan_to_num(0).amax((1, 2)))
    torch.testing.assert_close(channel_sensitivity(rows, weight, taps), expected.flatten())
    monkeypatch.setattr("sparsefx.sparsifiers.pfp.sensitivity._CHUNK", 13)
    torch.testing.assert_close(channel_sensitivity(rows, weight, taps), expected.flatten())


# --- allocation


def test_published_numbers():
    assert draws_for(EQUAL, 32) == pytest.approx(44.01, abs=0.005)
    assert math.ceil(draws_for(EQUAL, 32)) == 45
    assert expected_unique(EQUAL, draws_for(EQUAL, 32)) == pytest.approx(32, abs=1e-9)
    assert sample_complexity(1.0, 10.0, 1025 * 9, 1e-16) == 69193
    assert sample_size([304, 104, 10], 1e-16) == math.ceil(3 * math.log(8 * 304 * 418 / 1e-16))


def test_unequal_channels_take_more_draws_and_no_number_takes_all():
    skewed = torch.arange(1, 65).double() ** 2
    skewed /= skewed.sum()
    assert draws_for(skewed, 32) > 45
    assert expected_unique(skewed, draws_for(skewed, 50)) == pytest.approx(50, abs=1e-9)
    assert draws_for(EQUAL, 64) == math.inf
    one = torch.ones(1, dtype=torch.float64)
    assert (expected_unique(one, 3), draws_for(one, 0.5)) == (1, 1)


def test_all_kept_but_what_no_example_excites():
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    x = examples(20, 6)
    x[:, 2] = 0
    before = model(x)
    pruner = ProvableFilterPruner(model, [x], 1.0)
    assert not pruner.masks()["0"][:, 2].any()
    assert pruner.masks()["0"].sum() == 5 * 9
    assert torch.equal(model(x), before)


# --- selection


def test_draws_follow_their_probabilities():
    p = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = torch.stack([multinomial(p, 20, generator) for _ in range(400)])
    assert (counts.sum(1) == 20).all()
    assert not counts[:, 1].any()
    error = (20 * p * (1 - p) / 400).sqrt()
    assert ((counts.mean(0) - 20 * p).abs() <= 3 * error).all()
    assert multinomial(p, 10**15, generator).sum() == 10**15
    assert multinomial(p[:1], 7, generator).tolist() == [7]


def errors_of(variant: str, draws: int) -> Tensor:
    """A layer's output errors, [draws, outputs]."""
    w, x = examples(6, 40).double(), examples(40, seed=3).double().abs() * torch.arange(40) / 9
    s = channel_sensitivity(x.view(1, 1, 40), w.view(1, 6, 40, 1))
    demand, generator = Demand(s, 1), torch.Generator().manual_seed(5)
    count = round(draws_for(demand.probabilities, 15))
    allocation = Allocation(1.0, count, 15)
    gamma = torch.stack([select(demand, allocation, variant, generator) for _ in range(draws)])
    return (gamma * x) @ w.T - w @ x


def test_random_is_unbiased_and_hybrid_no_worse():
    wrong, hybrid = errors_of("random", 500), errors_of("hybrid", 300)
    for error in (wrong, hybrid):
        assert (error.mean(0).abs() <= 3 * error.std(0) / len(error) ** 0.5).all()
    assert hybrid.square().mean() <= wrong.square().mean()


def test_variants_of_a_set():
    s = torch.tensor([0.1, 0.9, 0.9, 0.0, 0.3], dtype=torch.float64)
    demand, generator = Demand(s, 1), torch.Generator().manual_seed(0)
    chosen = {k: select(demand, Allocation(1, 9, k), "deterministic", generator) for k in (1, 3)}
    assert chosen[1].tolist() == [0, 1, 0, 0, 0]
    assert chosen[3].tolist() == [0, 1, 1, 0, 1]
    for variant in ("deterministic", "random", "hybrid"):
        for k in range(1, 6):
            weights = select(demand, Allocation(1, 9, k), variant, generator)
            assert weights.count_nonzero() >= 1
            assert variant == "deterministic" or weights[3] == 0
        empty = select(Demand(torch.zeros(3).double(), 1), Allocation(1, 1, 1), variant, generator)
        assert empty.tolist() == [1, 0, 0]


# --- training, saving, compiling


def shrunk(mlp, **options) -> tuple[nn.Module, ProvableFilterPruner]:
    model = mlp()
    return model, ProvableFilterPruner(model, [examples(32, 16)], **options)


def test_zeros_stay_zero_through_training_and_gradients_stay_inside(mlp, fit):
    model, pruner = shrunk(mlp)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    masks = {name: mask.clone() for name, mask in pruner.masks().items()}
    fit(model, pruner, optimizer, 5)
    for name, layer in pruner.layers.items():
        assert torch.equal(layer.mask.mask, masks[name])
        assert not layer.weight[~masks[name]].any()
        assert not layer.weight.grad[~masks[name]].any()
    gone = pruner.gone["0.bias"]
    assert gone.any()
    assert not model[0].bias.grad[gone].any()
    before = model(examples(4, 16))
    assert pruner.squash() is model
    assert torch.equal(model(examples(4, 16)), before)
    assert not model[0].bias[gone].any()
    model[0].bias.data.fill_(1.0)
    assert pruner.squash()[0].bias.eq(1).all()  # squashed once


def test_a_resume_is_exact(mlp, fit):
    model, pruner = shrunk(mlp, variant="hybrid")
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    fit(model, pruner, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    fit(model, pruner, optimizer, 3, first=3)
    file.seek(0)
    state, steps = torch.load(file, weights_only=True)
    again, other = shrunk(mlp, variant="random", keep=0.8, seed=9)
    follower = torch.optim.AdamW(again.parameters(), 0.05)
    again.load_state_dict(state)
    follower.load_state_dict(steps)
    fit(again, other, follower, 3, first=3)
    assert other.report() == pruner.report()
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_equal_seeds_draw_alike_and_leave_the_global_generator_alone(mlp):
    def state(seed: int) -> dict[str, Tensor]:
        return shrunk(mlp, variant="random", seed=seed)[0].state_dict()

    one = state(4)
    model = mlp()
    torch.rand(3)
    before = torch.get_rng_state()
    ProvableFilterPruner(model, [examples(32, 16)], variant="random", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in one.items())
    other = state(5)
    assert any(not torch.equal(other[key], value) for key, value in one.items())


def test_the_compiler_finds_the_masks(mlp):
    model, _ = shrunk(mlp)
    config = sfx.SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(model, backend="sparsefx", options={"config": config})
    x = examples(4, 16)
    torch.testing.assert_close(compiled(x), model(x))
    assert str(sfx.explain(compiled)).count("stored mask") >= 2


def test_the_report_says_what_the_bound_is_worth(mlp):
    _, tight = shrunk(mlp, keep=0.3)
    text = str(tight.report())
    assert text.count("the bound is vacuous at this ratio") == 2
    assert "and the bound asks for" in text
    row = tight.report().filters[0]
    assert row.eps >= 1
    assert (row.inputs, row.filters) == (16, 24)
    assert tight.report().to_dict()["filters"][0]["kept_inputs"] == row.kept_inputs
    _, loose = shrunk(mlp, keep=1.0)
    assert "vacuous" not in str(loose.report())


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep=0.0 must be a share of the budget in \(0, 1\]"),
        ({"keep": True}, "keep=True must"),
        ({"budget": "macs"}, "budget='macs' is not one of 'parameters', 'flops'"),
        ({"variant": "top"}, "variant='top' is not one of 'deterministic', 'random', 'hybrid'"),
        ({"taps": "mean"}, "taps='mean' is not one of 'sum', 'max'"),
        ({"delta": 1.0}, "delta=1.0 must be a probability"),
        ({"seed": 1.5}, "seed=1.5 must be an int"),
        ({"keep": 0.01}, "raise keep, or leave layers out"),
        ({"batches": []}, "there were 0 calibration batches"),
        ({"batches": [3]}, "a batch is of type int"),
        ({"batches": [torch.full((2, 16), torch.nan)]}, "input of layer '0' holds NaN"),
        ({"rules": ["missing"]}, "rule 'missing' matches no layer"),
    ],
)
def test_refusals_change_nothing(mlp, snapshot, options, message):
    model = mlp()
    before = snapshot(model)
    arguments = {"batches": [examples(8, 16)]} | options
    with pytest.raises(SparsifierError, match=message):
        ProvableFilterPruner(model, **arguments)
    before.assert_same()


def test_infinity_in_a_weight_is_refused(mlp):
    model = mlp()
    model[0].weight.data[3, 2] = torch.inf
    with pytest.raises(SparsifierError, match="layer '0' holds infinity in its weight"):
        ProvableFilterPruner(model, [examples(8, 16).abs()])


def test_no_module_and_no_layer_reached():
    with pytest.raises(SparsifierError, match=r"pass an nn\.Module"):
        ProvableFilterPruner("model", [])

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 6), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    pruner = ProvableFilterPruner(Idle(), [examples(3, 4)])
    assert pruner.skipped == {"idle": "no batch reached it"}
    with pytest.raises(SparsifierError, match="no layer is left to prune"):
        ProvableFilterPruner(Idle(), [examples(3, 4)], rules=["idle"])


def test_layers_that_rules_leave_dense_keep_their_filters(mlp):
    model = mlp()
    bias = model[0].bias.detach().clone()
    rules = [Rule("0", forward=Dense()), "*"]
    pruner = ProvableFilterPruner(model, [examples(32, 16)], rules=rules)
    assert set(pruner.layers) == {"2"}
    assert torch.equal(model[0].bias, bias)


# --- accuracy


def by_l1_norm(model: nn.Sequential, share: float) -> nn.Sequential:
    """The same share of every layer's inputs, those with the largest columns."""
    for layer in model[::2]:
        size = layer.weight.abs().sum(0)
        kept = torch.zeros_like(size).index_fill_(0, size.topk(round(share * len(size)))[1], 1)
        layer.weight.data *= kept
    return model


@pytest.mark.slow
def test_digits_without_retraining():
    """A quarter of the weights: the allocation keeps what a uniform share does not."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
    x, x_test, y, y_test = (torch.tensor(p) for p in parts)
    x, x_test = x.float(), x_test.float()

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * (model(x_test).argmax(1) == y_test).float().mean().item()

    half, quarter, uniform = list[float](), list[float](), list[float]()
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(40):
            for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
        for keep, found in ((0.5, half), (0.25, quarter)):
            pruned = copy.deepcopy(model)
            pruner = ProvableFilterPruner(pruned, x.split(64), keep)
            assert keep - 0.01 < pruner.density() <= keep
            found.append(accuracy(pruned))
        share = 0.495  # of each layer's inputs: 32 * 150 + 150 * 51 + 51 * 10 weights, 24.9%
        uniform.append(accuracy(by_l1_norm(model, share)))
    assert sum(half) / 2 >= 97
    assert sum(quarter) / 2 >= 94
    assert sum(uniform) < sum(quarter)
