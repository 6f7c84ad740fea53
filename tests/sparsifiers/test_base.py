"""The common life: frozen masks, report, squash, copies, averages, attached parameters."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsefx import NM, SparsifierError
from sparsefx.masks import retained
from sparsefx.sparsifiers import SRSTE, Sparsifier, TransposableNM


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 8)
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mha(x, x, x)[0]


def hugging_face() -> nn.Module:
    module = pytest.importorskip("transformers.pytorch_utils")
    return nn.Sequential(module.Conv1D(12, 8), nn.Linear(12, 8))


MODELS = [
    pytest.param(lambda: nn.Linear(8, 12), (3, 8), id="linear"),
    pytest.param(conv_net, (2, 8, 4, 4), id="conv"),
    pytest.param(lambda: nn.Sequential(nn.Conv1d(8, 8, 3)), (2, 8, 5), id="conv1d"),
    pytest.param(lambda: nn.Sequential(nn.Conv3d(4, 4, 2)), (2, 4, 3, 3, 3), id="conv3d"),
    pytest.param(Attention, (2, 5, 8), id="attention"),
    pytest.param(hugging_face, (3, 8), id="hf"),
]


@pytest.mark.parametrize(("make", "shape"), MODELS)
@pytest.mark.parametrize("transposable", [False, True])
def test_train_and_squash(make, shape, transposable):
    plain, model = make(), make()
    model.load_state_dict(plain.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    sparsifier = TransposableNM(model, 2, 4) if transposable else SRSTE(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(shape)).square().sum().backward()
        optimizer.step()
        sparsifier.step()
    model.eval()
    x, before = torch.randn(shape), [id(p) for p in optimizer.param_groups[0]["params"]]
    expected = model(x)
    held = {name: layer.weight * layer.mask.mask for name, layer in sparsifier.layers.items()}
    assert sparsifier.squash() is model
    assert torch.equal(model(x), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [id(p) for p in model.parameters()] == before
    for name, layer in sparsifier.layers.items():
        assert torch.equal(layer.target.module._parameters[layer.target.tensor_name], held[name])
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(x), expected)
    state = [p.clone() for p in model.parameters()]
    model(x).square().sum().backward()
    optimizer.step()
    assert not all(torch.equal(p, q) for p, q in zip(state, model.parameters(), strict=True))


def test_after_squash_there_is_no_step(mlp):
    model = mlp()
    sparsifier = SRSTE(model)
    sparsifier.squash()
    assert sparsifier.squash() is model
    for method in (sparsifier.step, sparsifier.report, sparsifier.attach):
        with pytest.raises(SparsifierError, match=r"this SRSTE was squashed: construct a new one"):
            method()
    SRSTE(model, 1, 4).squash()


def test_squash_refuses_another_parametrization_on_top(mlp, snapshot):
    model = mlp()
    sparsifier = SRSTE(model)
    parametrizations.weight_norm(model[2])
    before = snapshot(model)
    with pytest.raises(SparsifierError, match=r"layer '2' carries another parametrization on top"):
        sparsifier.squash()
    before.assert_same()


def test_two_sparsifiers_squash_apart(mlp):
    model = mlp()
    keys = list(model.state_dict())
    first, second = SRSTE(model, rules=["0"]), TransposableNM(model, 2, 4, rules=["2"])
    first.squash()
    assert list(second.layers) == ["2"]
    second.step()
    second.squash()
    assert list(model.state_dict()) == keys


def test_the_base_keeps_its_masks(mlp, fit):
    model = mlp()
    sparsifier = Sparsifier(model, NM(2, 4))
    before = copy.deepcopy(sparsifier.masks())
    fit(model, sparsifier, torch.optim.Adam(model.parameters(), 0.1), 3)
    assert sparsifier.steps == 3
    for name, mask in sparsifier.masks().items():
        assert torch.equal(mask, before[name])
    assert sparsifier.sad(total=True) == {"0": 0, "2": 0}
    assert torch.equal(sparsifier.loss(), torch.zeros(()))
    assert sparsifier.density() == 0.5


def test_report(mlp, fit):
    model = mlp()
    model.append(nn.Linear(8, 3))
    model.append(nn.Linear(3, 2))
    sparsifier = SRSTE(model, rules=["0", "4", "3", "2"])
    model[3].weight.data.zero_()
    fit(nn.Sequential(*model[:3]), sparsifier, torch.optim.SGD(model.parameters(), 0.5), 3)
    report = sparsifier.report()
    row = report.rows[0]
    layer = sparsifier.layers["0"]
    assert (row.layer, row.shape, row.pattern, row.kept) == ("0", (24, 16), "2:4", 0.5)
    assert row.retained == retained(layer.weight, layer.mask.mask)
    assert row.flips == sparsifier.sad()["0"]
    assert row.total_flips == sparsifier.sad(total=True)["0"] > 0
    skipped = {"4": "weight (2, 3): in_features=3 is not a multiple of m=4"}
    data = report.to_dict()
    assert data["skipped"] == skipped
    assert data["rows"][0]["shape"] == [24, 16]
    assert data["steps"] == 3
    text = str(report)
    line = [
        "0",
        "24x16",
        "2:4",
        "50.0%",
        f"{row.retained:.1%}",
        f"{row.flips}",
        f"{row.total_flips}",
    ]
    assert text.splitlines()[2].split() == line
    assert "after 3 steps\ndense:\n  4: weight (2, 3): in_features=3 is" in text


def test_a_replaced_parameter_is_not_silent(mlp, data):
    model = mlp()
    sparsifier = SRSTE(model, decay=0.1)
    holder = model[0].parametrizations.weight
    holder.original = nn.Parameter(holder.original.detach().clone())
    with pytest.raises(SparsifierError, match=r"layer '0' has no hooks.*call attach\(\)"):
        sparsifier.step()
    assert sparsifier.steps == 0
    sparsifier.attach()
    model(data(0)[0]).sum().backward()
    decay = 0.1 * holder.original * ~sparsifier.masks()["0"]
    masked = model[0].weight.detach().requires_grad_()
    out = nn.functional.linear(data(0)[0], masked, model[0].bias).relu()
    nn.functional.linear(out, model[2].weight.detach(), model[2].bias).sum().backward()
    assert torch.equal(holder.original.grad, masked.grad + decay)
    sparsifier.step()


def test_without_hooks_nothing_needs_attaching(mlp):
    model = mlp()
    sparsifier = SRSTE(model, decay=0)
    holder = model[0].parametrizations.weight
    holder.original = nn.Parameter(holder.original.detach().clone())
    sparsifier.step()
    assert sparsifier.steps == 1


def test_load_with_assign_attaches(mlp, data):
    model = mlp()
    sparsifier = SRSTE(model, decay=0.1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model(data(0)[0]).sum().backward()
    sparsifier.step()
    layer = sparsifier.layers["0"]
    assert layer.mask.mask is model[0].parametrizations.weight[0].mask
    assert len(layer.weight._post_accumulate_grad_hooks) == 1


def test_a_frozen_weight_has_no_hooks_until_attached(mlp):
    model = mlp().requires_grad_(False)
    sparsifier = SRSTE(model)
    sparsifier.step()
    model.requires_grad_(True)
    with pytest.raises(SparsifierError, match=r"call attach\(\)"):
        sparsifier.step()
    sparsifier.attach()
    sparsifier.step()


def test_a_copy_is_independent(mlp, fit):
    model = mlp()
    sparsifier = SRSTE(model)
    clone = copy.deepcopy(model)
    state = copy.deepcopy(clone.state_dict())
    fit(model, sparsifier, torch.optim.SGD(model.parameters(), 0.5), 3)
    for key, value in clone.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not clone[0].parametrizations.weight.original._post_accumulate_grad_hooks
    clone.load_state_dict(model.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(clone(x), model(x))


def test_an_average_keeps_the_masks_in_step(mlp, data):
    model = mlp()
    sparsifier = SRSTE(model, 1, 4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for i in range(4):
        x, y = data(i)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        average.update_parameters(model)
    assert sparsifier.sad(total=True)["0"] > 0
    inner = average.module[0].parametrizations.weight
    assert torch.equal(inner[0].mask, sparsifier.masks()["0"])
    assert not torch.equal(inner.original, sparsifier.layers["0"].weight)
    assert torch.equal(average.module[0].weight, inner.original * sparsifier.masks()["0"])


def test_a_sparsifier_is_no_cycle(mlp):
    """Models hold much memory: they must go when the last reference goes."""
    import gc
    import weakref

    model = mlp()
    sparsifier = SRSTE(model)
    gone = weakref.ref(sparsifier)
    gc.disable()
    try:
        del sparsifier
        assert gone() is None
    finally:
        gc.enable()
    model(torch.randn(2, 16)).sum().backward()
