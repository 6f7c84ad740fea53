"""A recipe: a net, the paper's hyper-parameters for it, which products are sampled; and a run."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import networks
import torch
import torch.nn.functional as F
from images import Images
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx.config import reads_input

UNBIASED = "systematic"  # exactly k, unbiased: what a gradient wants
SAMPLING = ("none", "forward", "backward", "black-box")


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters as published; where a learning rate falls, as shares of all epochs."""

    make: Callable[..., nn.Module]
    batch: int
    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer]
    settings: dict[str, float]
    milestones: tuple[float, ...] = ()
    factor: float = 1.0
    resizable: bool = False  # takes depth and width


RECIPES = {
    "mlp": Recipe(networks.MLP, 50, 20, torch.optim.Adam, {"lr": 1e-3}),
    "cnn": Recipe(networks.CNN, 64, 20, torch.optim.SGD, {"lr": 0.01, "momentum": 0.5}),
    "resnet": Recipe(
        networks.ResNet,
        256,
        90,
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        milestones=(1 / 3, 2 / 3),
        factor=0.1,
        resizable=True,
    ),
    "wideresnet": Recipe(
        networks.WideResNet,
        256,
        200,
        torch.optim.SGD,
        {"lr": 0.15, "momentum": 0.9, "weight_decay": 5e-4},
        milestones=(0.3, 0.6, 0.8),
        factor=0.2,
        resizable=True,
    ),
}


def config_of(sampling: str, pattern: sfx.Sampled, codegen: str) -> sfx.SparseConfig:
    """Say which products are sampled.

    The layer that reads the images is exempt by a rule, the last by ``keep_output_dense``, narrow
    ones by the pattern's ``min_k``.
    """
    rules = {
        "none": [],
        "forward": [sfx.Rule("*", forward=pattern)],
        "backward": [sfx.Rule("*", grad_input=pattern, grad_weight=pattern)],
        "black-box": [
            sfx.Rule("*", forward=pattern, grad_input=sfx.Dense(), grad_weight=sfx.Dense())
        ],
    }[sampling]
    exempt = [sfx.Rule(reads_input, forward=sfx.Dense())] if rules else []
    return sfx.SparseConfig(rules=exempt + rules, codegen=codegen)


@dataclass
class Run:
    """One net under one config, and what came of it, seed by seed."""

    name: str
    net: nn.Module
    compiled: Callable[[Tensor], Tensor]
    report: Any
    accuracies: list[float] = field(default_factory=list)
    uncalibrated: list[float] = field(default_factory=list)  # before batch norm's recalibration
    seconds: list[float] = field(default_factory=list)  # of a training step

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)


def prepare(name: str, net: nn.Module, config: sfx.SparseConfig, x: Tensor) -> Run:
    """Compile a net for batches like ``x``, and explain what became of it."""
    report = sfx.explain(net, config=config)(x)
    compiled = torch.compile(net, backend="sparsefx", dynamic=False, options={"config": config})
    return Run(name, net, compiled, report)


def train(
    run: Run, recipe: Recipe, images: Images, batch: int, epochs: int, tick: Callable[[], None]
) -> None:
    """Train to the end and test exactly; a fresh net goes in."""
    run.net.train()
    optimizer = recipe.optimizer(run.net.parameters(), **recipe.settings)
    steps = epochs * (len(images.train_y) // batch)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [round(share * steps) for share in recipe.milestones], recipe.factor
    )
    for _ in range(epochs):
        for x, y in images.batches(batch):
            started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(run.compiled(x), y).backward()
            optimizer.step()
            run.seconds.append(time.perf_counter() - started)
            schedule.step()
        tick()
    run.uncalibrated.append(test(run.net, images))
    recalibrate(run.net, images, batch)
    run.accuracies.append(test(run.net, images))


def recalibrate(net: nn.Module, images: Images, batch: int, most: int = 20) -> None:
    """Average batch norm's statistics anew over exact activations, where there is batch norm.

    Training saw sampled activations, which are smaller under top-k; the net is tested exactly.
    """
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        some = itertools.islice(images.batches(batch), most)
        sfx.sparsifiers.recalibrate_batchnorm(net, (x for x, _ in some))


@torch.no_grad()
def test(net: nn.Module, images: Images) -> float:
    """Accuracy in percent. The net itself runs, so nothing is sampled."""
    net.eval()
    right = sum(
        int((net(images.prepared(x)).argmax(1) == y).sum())
        for x, y in zip(images.test_x.split(500), images.test_y.split(500), strict=True)
    )
    return 100 * right / len(images.test_y)
