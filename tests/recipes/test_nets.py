"""The paper's nets: their sizes, what each of their layers becomes, that a step trains them."""

import dataclasses

import pytest
import torch
from torch import nn

import sparsefx as sfx
from sparsefx import Rule, Sampled, SparseConfig

TOPK = Sampled(0.5, min_k=10)
OUTPUT = "feeds the model's output (keep_output_dense=True)"


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "millions"),
    [
        ("MLP", (1, 28, 28), {}, 0.648),
        ("CNN", (1, 28, 28), {}, 3.275),
        ("ResNet", (3, 32, 32), {}, 11.174),
        ("ResNet", (3, 32, 32), {"depth": 34}, 21.282),
        ("WideResNet", (3, 32, 32), {}, 36.479),
        ("WideResNet", (3, 32, 32), {"depth": 16, "width": 4}, 2.749),
    ],
)
def test_parameters(kit, name, shape, sizes, millions):
    """Those of the published nets, where they are published: ResNet-18, WRN-28-10, WRN-16-4."""
    with torch.device("meta"):
        net = getattr(kit.networks, name)(shape, 10, **sizes)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=6e-4)
    convolutions = sum(
        isinstance(m, nn.Conv2d | nn.Linear) and "shortcut" not in n for n, m in net.named_modules()
    )
    if name.endswith("ResNet"):
        depth = sizes.get("depth", 28 if name == "WideResNet" else 18)
        assert convolutions == (depth - 2 if name == "WideResNet" else depth)


@pytest.mark.parametrize("name", ["MLP", "CNN", "ResNet", "WideResNet"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 9)])
def test_any_image_goes_in(kit, name, shape):
    small = {"depth": 10, "width": 2} if "ResNet" in name else {}
    net = getattr(kit.networks, name)(shape, 7, **small)
    assert net(torch.randn(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "depth", "message"),
    [
        ("ResNet", 50, r"^depth=50: a ResNet of basic blocks has \[10, 18, 34\] layers$"),
        ("WideResNet", 4, r"^depth=4: a WideResNet has 6 n \+ 4 layers"),
        ("WideResNet", 27, r"^depth=27: a WideResNet has 6 n \+ 4 layers"),
    ],
)
def test_a_depth_that_there_is_not(kit, name, depth, message):
    with pytest.raises(kit.networks.SizeError, match=message):
        getattr(kit.networks, name)((3, 32, 32), 10, depth=depth)


def decisions(net: nn.Module, config: SparseConfig, shape: tuple[int, ...]) -> dict[str, list]:
    report = sfx.explain(net, config=config)(torch.randn(32, *shape))
    assert not report.failures
    out: dict[str, list] = {}
    for row in report.sites:
        out.setdefault(row.layer, []).append(row.decision or row.reason)
    return out


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("ResNet", {"depth": 10, "width": 16}), ("WideResNet", {"depth": 10, "width": 1})],
)
def test_every_convolution_but_the_stem_is_sampled(kit, name, sizes):
    net = getattr(kit.networks, name)((3, 8, 8), 10, **sizes)
    config = SparseConfig(rules=[Rule("*", forward=TOPK)], codegen="aot_eager")
    found = decisions(net, config, (3, 8, 8))
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(found) == set(layers)
    assert found.pop("stem") == ["k = K = 3: exact", "the derivative of a dense forward"]
    assert found.pop("fc") == [OUTPUT] * 3
    assert set(map(tuple, found.values())) == {(TOPK,) * 3}
    assert len(found) == len(layers) - 2


SAID = "the rule says Dense()"


@pytest.mark.parametrize(
    ("recipe", "sampling", "wanted"),
    [
        ("mlp", "forward", [TOPK] * 3),
        ("mlp", "backward", [SAID, TOPK, TOPK]),
        ("mlp", "black-box", [TOPK, SAID, SAID]),
        ("cnn", "forward", [TOPK] * 3),
        ("cnn", "backward", [SAID, TOPK, TOPK]),
    ],
)
def test_what_the_recipes_sample(kit, recipe, sampling, wanted):
    chosen = kit.training.RECIPES[recipe]
    net = chosen.make((1, 8, 8), 10)
    config = kit.training.config_of(sampling, TOPK, "aot_eager")
    found = decisions(net, config, (1, 8, 8))
    assert found.pop(next(iter(found)))[0] == SAID
    assert found.pop(list(found)[-1]) == [OUTPUT] * 3
    assert found
    assert all(rows == wanted for rows in found.values()), found


class Net(nn.Module):
    """A stem of 24 channels, which min_k alone would sample; two layers of each kind behind it."""

    def __init__(self):
        super().__init__()
        self.patches, self.deep = nn.Conv1d(24, 32, 1), nn.Conv1d(32, 32, 3)
        self.narrow, self.wide, self.out = nn.Linear(32, 10), nn.Linear(10, 40), nn.Linear(40, 4)

    def forward(self, x):
        x = self.deep(self.patches(x).relu()).relu().mean(2)
        return self.out(self.wide(self.narrow(x).relu()).relu())


@pytest.mark.parametrize(
    ("preset", "sampled"),
    [
        ("adelman-mlp", {"deep", "narrow"}),
        ("adelman-cnn", {"patches", "deep", "narrow"}),
        ("adelman-resnet", {"deep"}),
    ],
)
def test_what_the_presets_sample(preset, sampled):
    config = dataclasses.replace(sfx.preset(preset), codegen="aot_eager")
    found = decisions(Net(), config, (24, 9))
    assert {layer for layer, rows in found.items() if rows[0] == TOPK} == sampled
    assert found["out"] == [OUTPUT] * 3
    if preset != "adelman-resnet":
        assert found["wide"][0] == "k = K = 10: exact"


def test_without_sampling_nothing_is(kit):
    config = kit.training.config_of("none", TOPK, "aot_eager")
    assert config == SparseConfig(rules=[], codegen="aot_eager")


def test_a_run_of_a_residual_net(kit):
    """One epoch of a few images: it learns, tests exactly, and recalibrates batch norm."""
    whole = kit.images.load(None)
    few = dataclasses.replace(
        whole,
        train_x=whole.train_x[:128],
        train_y=whole.train_y[:128],
        test_x=whole.test_x[:50],
        test_y=whole.test_y[:50],
    )
    recipe = kit.training.RECIPES["wideresnet"]
    net = recipe.make(few.shape, few.classes, depth=10, width=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    config = kit.training.config_of("forward", TOPK, "aot_eager")
    run = kit.training.prepare("small", net, config, few.prepared(few.train_x[:32]))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    ticks = []
    kit.training.train(run, recipe, few, batch=32, epochs=1, tick=lambda: ticks.append(1))
    assert len(ticks) == 1
    assert len(run.seconds) == 4
    assert all(
        not torch.equal(value, before[name])
        for name, value in net.state_dict().items()
        if name.endswith(("weight", "running_mean"))
    )
    with torch.no_grad():
        right = net.eval()(few.prepared(few.test_x)).argmax(1) == few.test_y
    assert run.accuracies == [pytest.approx(100 * right.double().mean().item())]
