"""DST's life: resume, squash, compilation, its optimizer, what is not finite, what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import sparsefx as sfx
from sparsefx import SparsifierError
from sparsefx.sparsifiers import DST, SRSTE, ThresholdMask

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


def test_one_compilation_serves_a_training(mlp):
    results = []
    for compiled in (False, True):
        model = mlp()
        dst = DST(model, density=0.3, steps=4)
        forward: Any = model
        if compiled:
            options = {"config": DENSE}
            forward = torch.compile(model, backend="sparsefx", fullgraph=True, options=options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(forward, dst, sgd(dst), range(6))
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value)
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


def test_a_training_that_ends_early(mlp):
    model = mlp()
    dst = DST(model, density=0.3, steps=9)
    train(model, dst, sgd(dst), range(3))
    with pytest.raises(SparsifierError, match=r"density=0.3 is met from step 9 on, and this is st"):
        dst.squash()
    dst.settle()
    assert abs(dst.density() - 0.3) <= 0.01
    dst.step()
    with pytest.raises(SparsifierError, match=r"call settle\(\) before squash\(\), or train on"):
        dst.squash()
    dst.settle()
    dst.squash()
    assert int(model[0].weight.count_nonzero() + model[2].weight.count_nonzero()) == 173
    with pytest.raises(SparsifierError, match="this DST was squashed"):
        dst.settle()
    with pytest.raises(SparsifierError, match=r"settle\(\) is for density=..., and none was asked"):
        DST(mlp()).settle()
