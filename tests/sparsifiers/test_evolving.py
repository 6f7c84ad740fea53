"""Static, SET and RigL: exact numbers of weights, rounds by hand, optimizer state, resume."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx import Dense, Rule, SparsifierError
from sparsefx.sparsifiers import SET, Evolving, RigL, Sparsifier, Static
from sparsefx.sparsifiers.initial import counts_for_density, counts_for_epsilon
from sparsefx.sparsifiers.regrow import generator_for, largest, smallest

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}
MAKE: dict[str, Any] = {
    "static": lambda model, held, **more: Static(model, **{"density": 0.25, **more}),
    "set": lambda model, held, **more: SET(
        model, **{"every": 2, "optimizer": held, "density": 0.25, **more}
    ),
    "rigl": lambda model, held, **more: RigL(
        model, **{"steps": 40, "every": 2, "optimizer": held, "density": 0.25, **more}
    ),
}
MOVING = ["set", "rigl"]


def build(mlp: Any, name: str, kind: str = "sgd", at: int = 0, **more: Any) -> tuple[Any, ...]:
    model = mlp(at)
    optimizer = OPTIMIZERS[kind](model.parameters())
    return model, MAKE[name](model, optimizer, **more), optimizer


def weights(sparsifier: Sparsifier) -> dict[str, Tensor]:
    return {name: layer.weight.detach() for name, layer in sparsifier.layers.items()}


def kept(sparsifier: Sparsifier) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in sparsifier.masks().items()}


def check_zero_outside(sparsifier: Sparsifier) -> None:
    for name, mask in sparsifier.masks().items():
        assert not weights(sparsifier)[name][~mask].any()


# --- how many weights each layer keeps


def test_erdos_renyi_by_hand():
    """Mocanu et al.: eps (n + m) weights, none more than there are."""
    assert counts_for_epsilon([(4000, 3072), (10, 1000), (3, 4)], 20, "erdos_renyi") == [
        141_440,
        10_000,
        12,
    ]
    assert counts_for_epsilon([(8, 4, 3, 3)], 1, "erdos_renyi") == [round(12 / 32 * 288)]
    assert counts_for_epsilon([(8, 4, 3, 3)], 8, "erk") == [8 * (8 + 4 + 3 + 3)]


def test_a_large_layer_keeps_eps_n_plus_m():
    model = nn.Linear(3072, 4000)
    mask = Static(model, epsilon=20).masks()["weight"]
    assert int(mask.sum()) == 141_440
    rows = mask.sum(1).double()  # places are uniform: rows as a hypergeometric draw has them
    assert rows.mean() == pytest.approx(141_440 / 4000)
    assert rows.var() == pytest.approx(35.36, rel=0.1)


@pytest.mark.parametrize("init", ["erdos_renyi", "erk", "uniform"])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.93, 1.0])
def test_the_total_density_is_exact(init, density):
    shapes = [(64, 3, 3, 3), (128, 64, 3, 3), (128, 128, 1, 1), (10, 128), (0, 5), (7, 3, 5)]
    sizes = [math.prod(shape) for shape in shapes]
    counts = counts_for_density(shapes, density, init)
    assert sum(counts) == round(density * sum(sizes))
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if density == 0.1 and init == "erk":  # small layers are whole, the others share by scale
        free = [i for i in (0, 1, 2, 3, 5) if counts[i] < sizes[i]]
        assert len(free) < 5
        epsilons = [counts[i] / sum(shapes[i]) for i in free]
        assert max(epsilons) - min(epsilons) < 1
    if init == "uniform":
        assert all(abs(c - density * s) < 1 for c, s in zip(counts, sizes, strict=True))


def test_layouts_and_skipped_layers():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, 3, groups=2),
            "gpt": transformers.Conv1D(5, 7),
            "attention": nn.MultiheadAttention(8, 2),
            "last": nn.Linear(8, 3),
        }
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = SET(
        model,
        every=1,
        optimizer=optimizer,
        init="erk",
        density=0.4,
        rules=[Rule("last", forward=Dense()), "*"],
    )
    assert list(sparsifier.layers) == [
        "conv",
        "gpt",
        "attention.in_proj_weight",
        "attention.out_proj",
    ]
    assert sparsifier.skipped == {"last": "the rule says Dense()"}
    sizes = sum(mask.numel() for mask in sparsifier.masks().values())
    before = kept(sparsifier)
    assert sum(before.values()) == round(0.4 * sizes)
    assert not sparsifier.masks()["conv"].is_contiguous()
    for _ in range(3):
        x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
        loss = model["conv"](x).square().sum() + model["gpt"](torch.randn(3, 7)).square().sum()
        loss = loss + model["attention"](*[torch.randn(4, 8)] * 3)[0].square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        check_zero_outside(sparsifier)
    assert kept(sparsifier) == before
    assert all(flips > 0 for flips in sparsifier.sad().values())


def test_seeds_and_names_decide_the_draws(mlp):
    masks = [Static(mlp(), density=0.2, seed=seed).masks() for seed in (0, 0, 1)]
    assert torch.equal(masks[0]["0"], masks[1]["0"])
    assert not torch.equal(masks[0]["0"], masks[2]["0"])
    states = {generator_for(*key).initial_seed() for key in ((0, 1, "a"), (1, 0, "a"), (0, 1, "b"))}
    assert len(states) == 3
    model = mlp()
    before = torch.get_rng_state()
    Static(model, density=0.5)
    assert torch.equal(torch.get_rng_state(), before)


# --- one round


def test_what_is_dropped_by_hand():
    values = torch.tensor([0.5, -0.1, 0.1, -0.9, 0.2, -0.2, 0.1, -0.3, 0.0, 0.7])
    # 4 negative and 6 others: half of each, nearest to zero, ties in order
    assert smallest(values, 0.5, "separate").tolist() == [8, 1, 2, 6, 5]
    assert smallest(values, 0.5, "together").tolist() == [8, 1, 2, 6, 4]
    assert smallest(values, 0.3, "separate").tolist() == [8, 1]  # floors of 1.2 and 1.8
    assert smallest(values, 0.0, "separate").tolist() == []
    assert len(smallest(torch.ones(100), 0.29, "together")) == 29


def test_what_is_largest_by_hand():
    values = torch.tensor([0.5, 2.0, 0.5, 3.0, 0.5])
    assert largest(values, 4).tolist() == [1, 3, 0, 2]
    assert largest(values, 1).tolist() == [3]
    assert largest(values, 0).tolist() == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MOVING)
def test_a_round_by_hand(mlp, fit, name, kind):
    model, sparsifier, optimizer = build(mlp, name, kind)
    fit(model, sparsifier, optimizer, 3)
    before = copy.deepcopy(sparsifier.masks())
    moved = run_to_the_optimizer(model, optimizer, 3)
    old = {name: w.clone() for name, w in weights(sparsifier).items()}
    held = {name: states(optimizer, layer.weight) for name, layer in sparsifier.layers.items()}
    sparsifier.step()
    for layer, mask in sparsifier.masks().items():
        gone, new = before[layer] & ~mask, mask & ~before[layer]
        values, stays = old[layer], before[layer] & mask
        zeta = 0.3 if name == "set" else 0.15 * (1 + math.cos(math.pi * 4 / 30))
        assert new.sum() == gone.sum() == expected_drops(values[before[layer]], zeta, name)
        if name == "rigl":
            assert values[gone].abs().max() <= values[stays].abs().min()
            grad, empty = moved[layer].abs(), ~before[layer]
            assert grad[new].min() >= grad[empty & ~mask].max()
        w = weights(sparsifier)[layer]
        assert torch.equal(w[stays], values[stays])
        assert not w[~stays].any()
        for was, now in zip(
            held[layer], states(optimizer, layer_of(sparsifier, layer)), strict=True
        ):
            assert torch.equal(now[stays], was[stays])
            assert not now[gone | new].any()
            assert was[gone].any()
    assert sparsifier.sad() == {
        layer: int((mask != before[layer]).sum()) for layer, mask in sparsifier.masks().items()
    }


def layer_of(sparsifier: Sparsifier, name: str) -> nn.Parameter:
    return sparsifier.layers[name].weight


def states(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    return [v.clone() for v in optimizer.state[weight].values() if v.shape == weight.shape]


def expected_drops(values: Tensor, zeta: float, name: str) -> int:
    if name == "rigl":
        return math.floor(zeta * len(values))
    negative = int((values < 0).sum())
    return math.floor(zeta * negative) + math.floor(zeta * (len(values) - negative))


def run_to_the_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> Any:
    """One step up to the sparsifier's; returns the dense gradients, by hand."""
    generator = torch.Generator().manual_seed(1000 + i)
    x, y = torch.randn(32, 16, generator=generator), torch.randn(32, 8, generator=generator)
    plain = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    with torch.no_grad():
        for layer in (0, 2):
            plain[layer].weight.copy_(model[layer].weight)
            plain[layer].bias.copy_(model[layer].bias)
    (plain(x) - y).square().mean().backward()
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()
    return {str(layer): plain[layer].weight.grad for layer in (0, 2)}


def test_new_weights_may_be_normal(mlp, fit):
    model, sparsifier, optimizer = build(mlp, "set", every=1, std=0.5, density=0.5, zeta=0.9)
    fit(model, sparsifier, optimizer, 1)
    before = copy.deepcopy(sparsifier.masks())
    fit(model, sparsifier, optimizer, 1, 1)
    grown = torch.cat(
        [
            w[m & ~before[n]]
            for (n, w), m in zip(
                weights(sparsifier).items(), sparsifier.masks().values(), strict=True
            )
        ]
    )
    assert grown.std().item() == pytest.approx(0.5, rel=0.2)
    check_zero_outside(sparsifier)


def test_a_layer_with_little_room_drops_no_more_than_grows(mlp, fit):
    model, sparsifier, optimizer = build(mlp, "set", every=1, density=0.95, init="uniform")
    before = copy.deepcopy(sparsifier.masks())
    fit(model, sparsifier, optimizer, 1)
    for name, mask in sparsifier.masks().items():
        assert mask[~before[name]].all()  # every empty place is filled
        assert mask.sum() == before[name].sum()


def test_a_dense_layer_and_one_without_rows_have_no_rounds():
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 0))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = SET(model, every=1, optimizer=optimizer, density=1.0)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    sparsifier.step()
    assert sparsifier.sad() == {"0": 0, "1": 0}
    assert sparsifier.masks()["0"].all()


# --- a training


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", MAKE)
def test_numbers_of_weights_stay_and_nothing_lives_outside(mlp, fit, name, kind):
    model, sparsifier, optimizer = build(mlp, name, kind)
    before = kept(sparsifier)
    assert sum(before.values()) == round(0.25 * (16 * 24 + 24 * 8))
    first = copy.deepcopy(sparsifier.masks())
    check_zero_outside(sparsifier)
    for i in range(20):
        masks = copy.deepcopy(sparsifier.masks())
        fit(model, sparsifier, optimizer, 1, i)
        assert kept(sparsifier) == before
        check_zero_outside(sparsifier)
        assert not any(layer_of(sparsifier, n).grad[~mask].any() for n, mask in masks.items())
    same = all(torch.equal(mask, first[layer]) for layer, mask in sparsifier.masks().items())
    assert same == (name == "static")
    x = torch.randn(4, 16)
    expected = model(x)
    assert sparsifier.squash() is model
    assert torch.equal(model(x), expected)
    assert int((model[0].weight != 0).sum()) <= before["0"]


def test_rounds_end(mlp, fit):
    model, sparsifier, optimizer = build(mlp, "set", every=2, until=4)
    fit(model, sparsifier, optimizer, 3)
    total = sparsifier.sad(total=True)
    assert total["0"] > 0
    fit(model, sparsifier, optimizer, 3, 3)
    assert sparsifier.sad(total=True) == total
    rigl = build(mlp, "rigl", steps=8, every=1)[1]
    assert [rigl.due(step) for step in (1, 5, 6, 8)] == [True, True, False, False]
    assert [round(rigl.zeta(step), 6) for step in (0, 3, 6, 9)] == [0.3, 0.15, 0, 0]
    assert not any(build(mlp, "rigl", stop=0)[1].due(step) for step in range(40))


def test_a_frozen_layer_stays(mlp, fit):
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    sparsifier = SET(model, every=1, optimizer=optimizer)
    fit(model, sparsifier, optimizer, 2)
    assert sparsifier.sad(total=True)["0"] == 0
    assert sparsifier.sad(total=True)["2"] > 0


def test_static_masks_hold_under_momentum_from_before(mlp, fit):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    dense = Static(model, density=1.0)
    fit(model, dense, optimizer, 2)
    dense.squash()
    sparsifier = Static(model, density=0.3)
    fit(model, sparsifier, optimizer, 2)
    check_zero_outside(sparsifier)


# --- RigL's gradient


def test_gradients_are_dense_at_rounds_until_the_optimizer_steps(mlp, data):
    model, sparsifier, optimizer = build(mlp, "rigl", every=2)
    for i in range(4):
        x, y = data(i)
        optimizer.zero_grad()
        for _ in range(2):  # accumulated
            (model(x) - y).square().mean().backward()
        outside = {n: layer_of(sparsifier, n).grad[~m] for n, m in sparsifier.masks().items()}
        assert bool(outside["0"].any()) == (i % 2 == 1)
        optimizer.step()
        masks = sparsifier.masks()
        assert not any(layer_of(sparsifier, n).grad[~m].any() for n, m in masks.items())
        assert all(layer_of(sparsifier, n).grad[m].any() for n, m in masks.items())
        sparsifier.step()


def test_a_skipped_optimizer_step_skips_the_round(mlp, data):
    model, sparsifier, optimizer = build(mlp, "rigl", every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, factor in enumerate((1.0, math.inf, 1.0)):
        x, y = data(i)
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        before = sparsifier.sad(total=True)["0"]
        sparsifier.step()
        assert (sparsifier.sad(total=True)["0"] > before) == (factor == 1)


def test_squash_takes_the_hooks_off(mlp, fit):
    model, sparsifier, optimizer = build(mlp, "rigl")
    fit(model, sparsifier, optimizer, 2)
    assert optimizer._optimizer_step_pre_hooks
    sparsifier.squash()
    assert not optimizer._optimizer_step_pre_hooks
    assert not model[0].weight._post_accumulate_grad_hooks


def test_gradients_stay_inside_once_the_sparsifier_is_gone(mlp, data):
    model, sparsifier, optimizer = build(mlp, "rigl", every=1)
    mask = sparsifier.masks()["0"]
    del sparsifier
    x, y = data(0)
    (model(x) - y).square().mean().backward()
    optimizer.step()
    assert not model[0].parametrizations.weight.original.grad[~mask].any()


# --- resume, ranks, compilation


def reloaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("name", MAKE)
def test_resume(mlp, fit, name, kind):
    more = {} if name == "static" else {"std": 0.1}
    whole = build(mlp, name, kind, **more)
    fit(*whole, 10)
    first = build(mlp, name, kind, **more)
    fit(*first, 5)
    saved = reloaded([first[0].state_dict(), first[2].state_dict()])
    again = build(mlp, name, kind, 7, seed=5, **more)  # the checkpoint's seed counts
    again[0].load_state_dict(saved[0])
    again[2].load_state_dict(saved[1])
    assert again[1].steps == 5
    fit(*again, 5, 5)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(again[0].state_dict()[key], value), key
    assert again[1].sad(total=True) == whole[1].sad(total=True)
    for mine, theirs in zip(
        again[2].state_dict()["state"].values(),
        whole[2].state_dict()["state"].values(),
        strict=True,
    ):
        for key, value in theirs.items():
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value)), key


@pytest.mark.parametrize("name", MOVING)
def test_equal_state_gives_equal_masks_whatever_the_global_draws(mlp, fit, name):
    """What keeps ranks equal: two lives from one state, under other global generators."""
    masks = []
    for seed in (1, 2):
        model, sparsifier, optimizer = build(mlp, name, std=0.1)
        torch.manual_seed(seed)
        fit(model, sparsifier, optimizer, 4)
        masks.append(sparsifier.masks())
    assert all(torch.equal(masks[0][layer], masks[1][layer]) for layer in masks[0])


def test_a_checkpoint_of_another_density_is_refused(mlp):
    saved = build(mlp, "set", density=0.25)[0].state_dict()
    other = build(mlp, "set", density=0.3)[0]
    with pytest.raises(SparsifierError, match="construct it with the checkpoint's pattern"):
        other.load_state_dict(saved)


def test_parameters_that_were_replaced(mlp, fit):
    model, sparsifier, optimizer = build(mlp, "rigl", every=1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(SparsifierError, match="the optimizer doesn't hold the weight of layer '0'"):
        sparsifier.step()
    with pytest.raises(SparsifierError, match="the optimizer doesn't hold the weight of layer '0'"):
        sparsifier.attach(optimizer)
    fresh = OPTIMIZERS["sgd"](model.parameters())
    sparsifier.attach(fresh)
    before = kept(sparsifier)
    fit(model, sparsifier, fresh, 2)
    assert sparsifier.sad(total=True)["0"] > 0
    assert kept(sparsifier) == before


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", MOVING)
def test_one_compilation_serves_a_training(mlp, fit, name):
    plain, alike, optimizer = build(mlp, name, "adamw")
    fit(plain, alike, optimizer, 4)
    model, sparsifier, optimizer = build(mlp, name, "adamw")
    config = sfx.SparseConfig(rules=[], codegen="aot_eager")
    compiled = torch.compile(model, backend="sparsefx", fullgraph=True, options={"config": config})
    with torch._dynamo.config.patch(error_on_recompile=True):
        fit(compiled, sparsifier, optimizer, 4)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value)
    assert "stored mask" in str(sfx.explain(compiled))


# --- what is refused


class Fake(Evolving):
    def grow(self, layer, empty, count, generator):
        return empty[:0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("static", {"density": 0.0}, r"Static: density=0.0 must be a number in \(0, 1\]"),
        ("static", {"density": True}, r"Static: density=True must be a number in"),
        ("static", {"density": 0.1, "epsilon": 2}, r"density=0.1 and epsilon=2 say the same"),
        ("static", {"density": None, "epsilon": 0}, r"epsilon=0 must be a finite number above 0"),
        (
            "static",
            {"density": None, "epsilon": 2, "init": "uniform"},
            r"epsilon=2 with init='uniform': give density there",
        ),
        (
            "static",
            {"init": "dense"},
            r"init='dense' is not one of 'erdos_renyi', 'erk', 'uniform'",
        ),
        ("static", {"seed": -1}, r"Static: seed=-1 must be an int of at least 0"),
        ("static", {"seed": 2**63}, r"seed=9223372036854775808 must be below 2\*\*63"),
        (
            "static",
            {"density": 1e-4},
            r"layer '0', \(24, 16\), would keep 0 weights: raise density or",
        ),
        ("set", {"every": 0}, r"SET: every=0 must be an int of at least 1"),
        ("set", {"until": 1.5}, r"SET: until=1.5 must be an int of at least 0"),
        ("set", {"zeta": 1.5}, r"SET: zeta=1.5 must be a number in \[0, 1\]"),
        ("set", {"zeta": "all"}, r"SET: zeta='all' must be a finite number or a schedule"),
        ("set", {"signs": "both"}, r"SET: signs='both' must be 'separate' or 'together'"),
        ("set", {"std": -1}, r"SET: std=-1 must be a finite number of at least 0"),
        ("set", {"optimizer": 3}, r"SET: optimizer is int; pass the torch.optim.Optimizer"),
        (
            "set",
            {"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)},
            r"SET: the optimizer doesn't hold the weight of layer '0'",
        ),
        ("rigl", {"steps": 0}, r"RigL: steps=0 must be an int of at least 1"),
        ("rigl", {"stop": 1.5}, r"RigL: stop=1.5 must be a number in \[0, 1\]"),
        ("rigl", {"zeta": None}, r"RigL: zeta=None must be a number in \[0, 1\]"),
    ],
)
def test_bad_options(mlp, snapshot, name, options, message):
    model = mlp()
    before = snapshot(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(SparsifierError, match=message):
        MAKE[name](model, optimizer, **options)
    before.assert_same()


def test_a_schedule_out_of_range_and_a_nan_change_nothing(mlp, fit):
    model, sparsifier, optimizer = build(mlp, "set", every=1, zeta=lambda step: float(step))
    fit(model, sparsifier, optimizer, 1)
    before = copy.deepcopy(sparsifier.masks())
    with pytest.raises(SparsifierError, match=r"zeta=2.0 must be a number in \[0, 1\]"):
        sparsifier.step()
    sparsifier.zeta = lambda step: 0.3
    with torch.no_grad():
        layer_of(sparsifier, "2")[0, 0] = math.nan
    with pytest.raises(SparsifierError, match="layer '2' holds NaN in its weight at step 2: train"):
        sparsifier.step()
    assert all(torch.equal(mask, before[layer]) for layer, mask in sparsifier.masks().items())
    assert sparsifier.steps == 1


@pytest.mark.parametrize("name", MOVING)
def test_sharded_weights_are_refused(mlp, monkeypatch, name):
    sparsifier = build(mlp, name, every=1)[1]
    monkeypatch.setattr("sparsefx.sparsifiers.evolving.is_sharded", lambda weight: True)
    with pytest.raises(SparsifierError, match=r"layer '0' is sharded \(FSDP2\), and masks that"):
        sparsifier.attach()
    with pytest.raises(SparsifierError, match=r"train with DDP, or use Static"):
        sparsifier.step()
    assert sparsifier.steps == 0


def test_growing_nothing_drops_nothing(mlp, fit):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = Fake(model, every=1, optimizer=optimizer)
    before = copy.deepcopy(sparsifier.masks())
    fit(model, sparsifier, optimizer, 2)
    assert all(torch.equal(mask, before[layer]) for layer, mask in sparsifier.masks().items())


# --- digits


@pytest.mark.slow
@pytest.mark.parametrize("name", MOVING)
def test_digits(name):
    """Weights begin as the paper's, N(0, 0.1 squared); half of the recipe's 40 epochs."""
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
    x, x_test, y, y_test = [
        torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts
    ]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
    )
    for layer in (0, 2, 4):
        nn.init.normal_(model[layer].weight, std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    more = {"until": 400} if name == "set" else {"steps": 400}
    rules = [Rule("4", forward=Dense()), "*"]
    sparsifier = MAKE[name](
        model, optimizer, every=20, density=None, epsilon=8, rules=rules, **more
    )
    before = kept(sparsifier)
    assert before == {"0": 8 * 368, "2": 8 * 408}
    for _ in range(20):
        for batch in torch.randperm(len(x))[: len(x) // 64 * 64].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            sparsifier.step()
        assert kept(sparsifier) == before
    assert sparsifier.sad(total=True)["0"] > 0
    with torch.no_grad():
        right = (model(x_test).argmax(1) == y_test).float().mean().item()
    assert 100 * right >= 95.0
