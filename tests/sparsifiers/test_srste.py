"""SRSTE: the exact gradient, once per step, scaled, decoupled; masks that follow the weights."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsefx import NM, Rule, SparsifierError
from sparsefx.masks import is_valid, nm_mask
from sparsefx.sparsifiers import SRSTE, Step, TransposableNM

DECAY = 0.1


def dense_gradients(model: nn.Sequential, masks: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Gradients with respect to the masked weights of a two-layer MLP, by hand."""
    first, second = model[0], model[2]
    w = {
        name: (layer.parametrizations.weight.original * masks[name]).detach().requires_grad_()
        for name, layer in (("0", first), ("2", second))
    }
    hidden = nn.functional.linear(x, w["0"], first.bias.detach()).relu()
    nn.functional.linear(hidden, w["2"], second.bias.detach()).square().sum().backward()
    return {name: weight.grad for name, weight in w.items()}


def backward(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def weights(sparsifier: SRSTE) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in sparsifier.layers.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposable", [False, True])
def test_the_gradient_is_exact(mlp, dtype, transposable):
    model = mlp().to(dtype)
    sparsifier = SRSTE(model, decay=DECAY, transposable=transposable)
    x = torch.randn(5, 16, dtype=dtype)
    expected = dense_gradients(model, sparsifier.masks(), x)
    backward(model, x)
    for name, w in weights(sparsifier).items():
        mask = sparsifier.masks()[name]
        assert torch.equal(w.grad, expected[name] + DECAY * (~mask * w)), name


SHAPES = st.tuples(*[st.integers(1, 4)] * 3, st.sampled_from([1, 2]), st.integers(0, 2))


@given(SHAPES, st.integers(0, 2**16), st.booleans())
def test_any_layer(shape, seed, ties):
    """Every group keeps n of m, and the gradient is G + decay (1 - mask) W, whatever the layer."""
    out, blocks, taps, groups, kind = shape
    n, m = ((1, 2), (2, 4), (3, 5))[kind]
    torch.manual_seed(seed)
    depth = blocks * m
    layer = nn.Conv1d(depth * groups, out * groups, taps, groups=groups)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.mul(8).round() if ties else layer.weight)
    plain = copy.deepcopy(layer)
    sparsifier = SRSTE(nn.Sequential(layer), n, m, decay=DECAY)
    (w,), (mask,) = weights(sparsifier).values(), sparsifier.masks().values()
    assert is_valid(mask, n, m, dim=1)
    assert int(mask.sum()) * m == mask.numel() * n
    x = torch.randn(2, depth * groups, taps + 1)
    with torch.no_grad():
        plain.weight.mul_(mask)
    plain(x).square().sum().backward()
    layer(x).square().sum().backward()
    assert torch.equal(w.grad, plain.weight.grad + DECAY * (~mask * w))


def test_the_gradient_against_float64(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=DECAY)
    x = torch.randn(5, 16)
    backward(model, x)
    got = {name: w.grad for name, w in weights(sparsifier).items()}
    expected = dense_gradients(model.double(), sparsifier.masks(), x.double())
    for name, w in weights(sparsifier).items():
        wanted = expected[name] + DECAY * (~sparsifier.masks()[name] * w)
        torch.testing.assert_close(got[name].double(), wanted, rtol=1e-4, atol=1e-4)


def test_no_decay_is_the_plain_straight_through_estimator(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=0)
    x = torch.randn(5, 16)
    expected = dense_gradients(model, sparsifier.masks(), x)
    backward(model, x)
    for name, w in weights(sparsifier).items():
        assert torch.equal(w.grad, expected[name])
        assert not w._backward_hooks


def test_accumulated_gradients_take_the_decay_once(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=DECAY)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):  # a second round: step() lets the decay in again
        optimizer.zero_grad()
        batches = [torch.randn(5, 16) for _ in range(3)]
        parts = [dense_gradients(model, sparsifier.masks(), x) for x in batches]
        for x in batches:
            backward(model, x)
        for name, w in weights(sparsifier).items():
            decay = DECAY * (~sparsifier.masks()[name] * w)
            assert torch.equal(w.grad, parts[0][name] + decay + parts[1][name] + parts[2][name])
        optimizer.step()
        sparsifier.step()


def test_gradients_thrown_away_take_their_decay_with_them(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=DECAY)
    x = torch.randn(5, 16)
    expected = dense_gradients(model, sparsifier.masks(), x)
    for _ in range(2):
        model.zero_grad()  # no step() between
        backward(model, x)
        for name, w in weights(sparsifier).items():
            assert torch.equal(w.grad, expected[name] + DECAY * (~sparsifier.masks()[name] * w))


def test_gradients_zeroed_in_place_are_decayed_after_a_step(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=DECAY)
    x = torch.randn(5, 16)
    expected = dense_gradients(model, sparsifier.masks(), x)
    backward(model, x)
    sparsifier.step()
    model.zero_grad(set_to_none=False)
    backward(model, x)
    for name, w in weights(sparsifier).items():
        assert torch.equal(w.grad, expected[name] + DECAY * (~sparsifier.masks()[name] * w))


def test_a_weight_used_twice_is_decayed_once():
    model = nn.Sequential(layer := nn.Linear(8, 8), nn.Tanh(), layer)
    sparsifier = SRSTE(model, decay=DECAY)
    x = torch.randn(3, 8)
    w = weights(sparsifier)["0"]
    masked = (w * sparsifier.masks()["0"]).detach().requires_grad_()
    b = layer.bias.detach()
    hidden = nn.functional.linear(x, masked, b).tanh()
    nn.functional.linear(hidden, masked, b).square().sum().backward()
    backward(model, x)
    decay = DECAY * (~sparsifier.masks()["0"] * w)
    torch.testing.assert_close(w.grad, masked.grad + decay, rtol=1e-6, atol=1e-6)


def test_under_autocast_the_decay_keeps_the_parameters_precision(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=1e-3)
    with torch.no_grad():
        model[2].parametrizations.weight.original.fill_(1.0 + 2**-12)  # no bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(5, 16)).float().mul(0).sum().backward()
    w = weights(sparsifier)["2"]
    assert torch.equal(w.grad, 1e-3 * (~sparsifier.masks()["2"] * w))


def test_the_decay_survives_unscaling(mlp):
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    sparsifier = SRSTE(model, decay=DECAY, grad_scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for scale in (1024.0, 2048.0):
        optimizer.zero_grad()
        x = torch.randn(5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        assert scaler.get_scale() == scale
        scaler.scale(loss * 0).backward()
        scaler.unscale_(optimizer)
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        for name, w in weights(sparsifier).items():
            decay = DECAY * (~sparsifier.masks()[name] * w)
            torch.testing.assert_close(w.grad, decay, rtol=1e-6, atol=0)
        assert total > 0
        scaler.step(optimizer)
        scaler.update()
        sparsifier.step()


def test_a_step_that_the_scaler_skips(mlp):
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sparsifier = SRSTE(model, decay=DECAY, grad_scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: w.detach().clone() for name, w in weights(sparsifier).items()}
    scaler.scale(model(torch.full((1, 16), math.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    sparsifier.step()
    for name, w in weights(sparsifier).items():
        assert torch.equal(w, before[name])
    assert scaler.get_scale() == 512.0
    assert sparsifier.steps == 1


def test_clipping_sees_the_decayed_gradient(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=DECAY)
    backward(model, torch.randn(5, 16))
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 0.5), norm)
    sparsifier.step()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_the_decoupled_decay_is_not_rescaled(mlp, data, make):
    model = mlp()
    # the second layer has a rate of its own
    groups = [
        {"params": [*model[0].parameters()]},
        {"params": [*model[2].parameters()], "lr": 0.03},
    ]
    optimizer = make(groups, lr=0.1)
    sparsifier = SRSTE(model, decay=DECAY, decoupled=True, optimizer=optimizer)
    for i in range(3):
        x, y = data(i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        masks = {name: mask.clone() for name, mask in sparsifier.masks().items()}
        moved = {name: w.detach().clone() for name, w in weights(sparsifier).items()}
        assert not any(w._backward_hooks for w in weights(sparsifier).values())
        sparsifier.step()
        for name, lr in (("0", 0.1), ("2", 0.03)):
            w = moved[name]
            expected = w - lr * DECAY * (~masks[name] * w)
            torch.testing.assert_close(weights(sparsifier)[name], expected, rtol=1e-6, atol=0)
            assert torch.equal(sparsifier.masks()[name], nm_mask(expected, 2, 4))


def test_the_coupled_decay_is_rescaled_by_adam(mlp):
    """What the decoupled form is for: under Adam 1000 times the decay moves weights alike."""
    moves = []
    for decay in (1e-3, 1.0):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), 0.1, eps=1e-30)
        sparsifier = SRSTE(model, decay=decay)
        before = weights(sparsifier)["0"].detach().clone()
        (model(torch.randn(5, 16)) * 0).sum().backward()
        optimizer.step()
        moves.append((weights(sparsifier)["0"] - before)[~sparsifier.masks()["0"]])
    torch.testing.assert_close(*moves)


def test_frozen_masks_stay(mlp, fit):
    model = mlp()
    sparsifier = SRSTE(model, 1, 4, freeze=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    fit(model, sparsifier, optimizer, 3)
    assert sparsifier.sad()["0"] > 0
    before, total = sparsifier.masks()["0"].clone(), sparsifier.sad(total=True)
    fit(model, sparsifier, optimizer, 3, 3)
    assert torch.equal(sparsifier.masks()["0"], before)
    assert sparsifier.sad(total=True) == total


@pytest.mark.parametrize("refresh", [1, 3, Step(((0, 1), (3, 2)))])
def test_masks_follow_the_weights(mlp, data, refresh):
    model = mlp()
    sparsifier = SRSTE(model, 1, 4, refresh=refresh)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    totals = dict.fromkeys(sparsifier.masks(), 0)
    for i in range(1, 7):
        x, y = data(i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        before = {name: mask.clone() for name, mask in sparsifier.masks().items()}
        last = sparsifier.sad()
        sparsifier.step()
        due = i % (refresh if isinstance(refresh, int) else round(refresh(i))) == 0
        for name, w in weights(sparsifier).items():
            mask = sparsifier.masks()[name]
            assert torch.equal(mask, nm_mask(w, 1, 4) if due else before[name])
            flips = int((mask != before[name]).sum())
            totals[name] += flips
            assert sparsifier.sad()[name] == (flips if due else last[name])
    assert sparsifier.sad(total=True) == totals
    assert totals["0"] > 0


def test_ties_and_an_all_zero_weight(mlp):
    model = mlp()
    sparsifier = SRSTE(model)
    with torch.no_grad():
        weights(sparsifier)["0"].zero_()
    sparsifier.step()
    assert sparsifier.masks()["0"][0, :4].tolist() == [True, True, False, False]


def test_a_layer_of_no_rows():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 0))
    sparsifier = SRSTE(model, decay=DECAY)
    backward(model, torch.randn(2, 8))
    sparsifier.step()
    assert sparsifier.report().rows[1].shape == (0, 4)


def test_rules_give_other_patterns(mlp):
    model = mlp()
    rules = [Rule("0", forward=NM(1, 8)), Rule("2", forward=NM(2, 4, transposable=True))]
    sparsifier = SRSTE(model, rules=rules)
    assert [row.pattern for row in sparsifier.report().rows] == ["1:8", "2:4 transposable"]
    assert sparsifier.masks()["2"].sum(0).unique().tolist() == [4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -1.0}, r"SRSTE: decay=-1.0 must be a finite number of at least 0"),
        ({"decay": math.nan}, r"SRSTE: decay=nan must be a finite number"),
        ({"decay": "a"}, r"SRSTE: decay='a' must be a finite number"),
        ({"refresh": 0}, r"SRSTE: refresh=0 must be an int of at least 1"),
        ({"refresh": 1.5}, r"SRSTE: refresh=1.5 must be an int of at least 1"),
        ({"grad_scaler": 3}, r"SRSTE: grad_scaler is int; pass a torch.amp.GradScaler"),
        ({"decoupled": True}, r"SRSTE: decoupled=True needs optimizer="),
        ({"optimizer": 3}, r"SRSTE: optimizer is read with decoupled=True only"),
        ({"decoupled": True, "optimizer": 3}, r"optimizer is int; pass a torch.optim.Optimizer"),
        (
            {"decoupled": True, "optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)},
            r"SRSTE: the optimizer doesn't hold the weight of layer '0': build it on the model's",
        ),
    ],
)
def test_bad_options(mlp, snapshot, options, message):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=message):
        SRSTE(model, **options)
    before.assert_same()


def test_an_optimizer_of_other_parameters_is_noticed_later(mlp):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = SRSTE(model, decoupled=True, optimizer=optimizer)
    holder = model[0].parametrizations.weight
    holder.original = nn.Parameter(holder.original.detach().clone())
    with pytest.raises(SparsifierError, match=r"doesn't hold the weight of layer '0'"):
        sparsifier.step()
    with pytest.raises(SparsifierError, match=r"doesn't hold the weight of layer '0'"):
        sparsifier.attach(optimizer)
    sparsifier.attach(torch.optim.SGD(model.parameters(), 0.1))
    sparsifier.step()


def test_a_refresh_below_one(mlp):
    sparsifier = SRSTE(mlp(), refresh=lambda step: 0)
    with pytest.raises(SparsifierError, match=r"refresh\(1\) is 0; it must be at least 1"):
        sparsifier.step()


@pytest.mark.parametrize("make", [SRSTE, TransposableNM])
def test_a_weight_that_became_nan_is_told(mlp, make):
    model = mlp()
    sparsifier = make(model, 2, 4, refresh=1)
    sparsifier.step()
    kept = {name: mask.clone() for name, mask in sparsifier.masks().items()}
    with torch.no_grad():
        model[2].parametrizations.weight.original[3, 5] = math.nan
    with pytest.raises(SparsifierError, match="layer '2' holds NaN in its weight at step 2: train"):
        sparsifier.step()
    assert all(torch.equal(mask, kept[name]) for name, mask in sparsifier.masks().items())
