"""TransposableNM: true tiles, schedules of n, refresh and start, frozen masks, the dense tail."""

import pytest
import torch
from torch import Tensor, nn

from sparsefx import NM, MaskError, Rule, SparsifierError
from sparsefx.masks import is_valid, transposable_mask
from sparsefx.sparsifiers import Constant, Cubic, Step, TransposableNM


def weights(sparsifier: TransposableNM) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in sparsifier.layers.items()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.5)


def counts(sparsifier: TransposableNM) -> dict[str, int]:
    """Kept per row of an 8 x 8 tile; every row and column of every tile has the same."""
    found = {}
    for name, mask in sparsifier.masks().items():
        tiles = mask.unflatten(1, (-1, 8)).unflatten(0, (-1, 8))  # [R, 8, C, 8]
        sums = torch.cat([tiles.sum(1).flatten(), tiles.sum(3).flatten()])
        assert len(sums.unique()) == 1, name
        found[name] = int(sums[0])
    return found


@pytest.mark.parametrize("solver", ["greedy", "auto"])
def test_masks_follow_the_weights_every_refresh_steps(mlp, fit, solver):
    model = mlp()
    sparsifier = TransposableNM(model, 2, 4, refresh=3, solver=solver)
    optimizer = sgd(model)
    for i in range(1, 8):
        before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
        fit(model, sparsifier, optimizer, 1, i)
        for name, mask in sparsifier.masks().items():
            assert is_valid(mask, 2, 4, transposable=True)
            expected = transposable_mask(weights(sparsifier)[name], 2, 4, solver=solver)
            assert torch.equal(mask, before[name] if i % 3 else expected)
    assert sparsifier.sad(total=True)["0"] > 0


def test_w_and_its_transpose_are_sparse(mlp):
    model = mlp()
    TransposableNM(model, 4, 8)
    for weight in (model[0].weight, model[2].weight):
        assert is_valid(weight, 4, 8, dim=1)
        assert is_valid(weight, 4, 8, dim=0)
        assert weight.count_nonzero() == weight.numel() // 2


def test_a_cubic_ramp_from_dense(mlp, fit):
    model = mlp()
    sparsifier = TransposableNM(model, 2, 8, refresh=100, ramp=10)
    assert counts(sparsifier) == {"0": 8, "2": 8}
    optimizer = sgd(model)
    for step in range(1, 13):
        fit(model, sparsifier, optimizer, 1, step)
        n = 2 + round(6 * (1 - min(step / 10, 1)) ** 3)
        assert counts(sparsifier) == {"0": n, "2": n}
    assert counts(sparsifier) == {"0": 2, "2": 2}


def test_layers_start_one_by_one(mlp, fit):
    model = mlp()
    sparsifier = TransposableNM(model, 4, 8, refresh=2, start={"2": 5}, ramp=Cubic(1, 0, 2))
    optimizer = sgd(model)
    seen = [counts(sparsifier)]
    for step in range(1, 8):
        fit(model, sparsifier, optimizer, 1, step)
        seen.append(counts(sparsifier))
    # n - (8 - 4) * (1/2)^3 rounds to 4 half-way
    assert [found["0"] for found in seen] == [8, 4, 4, 4, 4, 4, 4, 4]
    assert [found["2"] for found in seen] == [8, 8, 8, 8, 8, 8, 4, 4]


def test_one_start_for_all_and_a_dense_tail(mlp, fit):
    model = mlp()
    sparsifier = TransposableNM(model, 4, 8, start=2, dense_tail=4)
    optimizer = sgd(model)
    seen = [counts(sparsifier)["0"]]
    for step in range(1, 6):
        fit(model, sparsifier, optimizer, 1, step)
        seen.append(counts(sparsifier)["0"])
    assert seen == [8, 8, 4, 4, 8, 8]
    assert sparsifier.density() == 1.0
    dense = weights(sparsifier)["0"].detach().clone()
    sparsifier.squash()
    assert torch.equal(model[0].weight, dense)


def test_frozen_masks_follow_no_more_but_n_does(mlp, fit):
    model = mlp()
    optimizer = sgd(model)
    sparsifier = TransposableNM(model, 2, 8, refresh=1, freeze=3, ramp=6)
    seen, flips = [], []
    for step in range(1, 10):
        fit(model, sparsifier, optimizer, 1, step)
        seen.append(counts(sparsifier)["0"])
        flips.append(sparsifier.sad(total=True)["0"])
    assert seen == [5, 4, 3, 2, 2, 2, 2, 2, 2]
    assert flips[3] > flips[2] > flips[1]
    assert flips[3:] == flips[3:4] * 6


def test_refresh_follows_a_schedule(mlp, fit):
    model = mlp()
    sparsifier = TransposableNM(model, 2, 4, refresh=Step(((0, 2), (5, 100))))
    optimizer = sgd(model)
    flips = []
    for step in range(1, 9):
        fit(model, sparsifier, optimizer, 1, step)
        flips.append(sparsifier.sad(total=True)["0"])
    assert 0 == flips[0] < flips[1] == flips[2] < flips[3]
    assert flips[3:] == flips[3:4] * 5


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.01, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=1e-2),
    ],
)
def test_static_zeros_stay_zero(mlp, fit, make):
    model = mlp()
    pretrained = {name: model[int(name)].weight.detach().clone() for name in ("0", "2")}
    optimizer = make(model.parameters())
    sparsifier = TransposableNM(model, 4, 8, static=True)
    masks = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    for name, w in weights(sparsifier).items():
        assert torch.equal(masks[name], transposable_mask(pretrained[name], 4, 8, solver="greedy"))
        assert torch.equal(w, pretrained[name] * masks[name])
    fit(model, sparsifier, optimizer, 100)
    for name, w in weights(sparsifier).items():
        assert torch.equal(sparsifier.masks()[name], masks[name])
        assert torch.equal(w.grad, w.grad * masks[name])
        assert w[~masks[name]].count_nonzero() == 0
        assert not torch.equal(w, pretrained[name] * masks[name])
        for value in optimizer.state[w].values():
            if isinstance(value, Tensor) and value.shape == w.shape:
                assert value[~masks[name]].count_nonzero() == 0
    assert sparsifier.sad(total=True) == {"0": 0, "2": 0}


def test_static_zeros_withstand_momentum_from_before(mlp, data, fit):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x, y = data(0)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    sparsifier = TransposableNM(model, 4, 8, static=True)
    fit(model, sparsifier, optimizer, 5)
    for name, w in weights(sparsifier).items():
        assert w[~sparsifier.masks()[name]].count_nonzero() == 0


def test_static_with_a_dense_tail(mlp, fit):
    model = mlp()
    optimizer = sgd(model)
    sparsifier = TransposableNM(model, 4, 8, static=True, dense_tail=3)
    fit(model, sparsifier, optimizer, 2)
    assert sparsifier.density() == 0.5
    fit(model, sparsifier, optimizer, 3, 2)
    assert sparsifier.density() == 1.0
    assert weights(sparsifier)["0"].count_nonzero() == 24 * 16


@pytest.mark.parametrize("weight_grad", ["dense", "masked"])
def test_decay_and_weight_grad(mlp, data, weight_grad):
    model = mlp()
    sparsifier = TransposableNM(model, 4, 8, decay=0.1, weight_grad=weight_grad)
    x, _ = data(0)
    w, mask = weights(sparsifier)["2"], sparsifier.masks()["2"]
    hidden = model[:2](x).detach()
    model(x).sum().backward()
    dense = torch.ones(32, 8).t() @ hidden
    if weight_grad == "masked":
        dense = dense * mask
    assert torch.equal(w.grad, dense + 0.1 * (~mask * w))


def test_convolutions_have_tiles_for_each_tap():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2))
    mask = TransposableNM(model, 2, 4).masks()["0"]
    assert mask.shape == (16, 8, 3, 3)
    assert is_valid(mask, 2, 4, transposable=True)
    assert mask.float().mean() == 0.5


def test_rules_and_patterns(mlp):
    rules = [Rule("0", forward=NM(2, 4, transposable=True)), "2"]
    sparsifier = TransposableNM(mlp(), 1, 8, rules=rules)
    assert [str(layer.pattern) for layer in sparsifier.layers.values()] == [
        "2:4 transposable",
        "1:8 transposable",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "magic"}, MaskError, r"solver='magic' is unknown"),
        ({"start": -1}, SparsifierError, r"TransposableNM: start=-1 must be an int of at least 0"),
        ({"start": {"9": 3}}, SparsifierError, r"start='9' matches no masked layer; .*: 0, 2"),
        ({"ramp": 0}, SparsifierError, r"TransposableNM: ramp=0 must be an int of at least 1"),
        ({"ramp": Constant(2)}, SparsifierError, r"ramp\(0\) is 2; it must be from 0 \(n\) to 1"),
        ({"dense_tail": 1.5}, SparsifierError, r"dense_tail=1.5 must be an int of at least 0"),
        (
            {"freeze": -1},
            SparsifierError,
            r"freeze=-1 must be an int of at least 0",
        ),
        ({"weight_grad": "half"}, SparsifierError, r"weight_grad='half' must be 'dense' or"),
        ({"static": True, "weight_grad": "dense"}, SparsifierError, r"would move the zeros"),
        ({"static": True, "ramp": 3}, SparsifierError, r"ramp=3 has no meaning with static=True"),
        ({"static": True, "start": 3}, SparsifierError, r"start={'\*': 3} has no meaning with"),
        ({"static": True, "decay": 0.1}, SparsifierError, r"decay=0.1 has no meaning with"),
        (
            {"rules": [Rule("0", forward=NM(2, 4))]},
            SparsifierError,
            r"layer '0' says 2:4: write NM\(2, 4, transposable=True\), or use SRSTE",
        ),
    ],
)
def test_bad_options(mlp, snapshot, options, error, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        TransposableNM(model, 4, 8, **options)
    before.assert_same()
