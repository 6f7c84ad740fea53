"""Every estimator on scikit-learn's digits: what sampling costs in accuracy, and where.

An MLP 64-304-104-10 on 1297 images, tested on 500; SGD, rate 0.05, momentum 0.9, batches of 64, 40
epochs. All layers are sampled, the last one too: harder than the recipes, which exempt it.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from images import Images
from rich.table import Table
from torch import nn

import sparsefx as sfx

RATIOS = (0.5, 0.25, 0.1)
SEEDS = (0, 1, 2)
BATCH, EPOCHS = 64, 40
ESTIMATORS = {
    "topk": {},
    "topk, mass": {},
    "topk_mean": {"estimator": "topk_mean"},
    "systematic": {"estimator": "systematic"},
    "systematic, input": {"estimator": "systematic", "scores": "input"},
    "systematic, uniform": {"estimator": "systematic", "scores": "uniform"},
    "bernoulli": {"estimator": "bernoulli"},
    "with_replacement": {"estimator": "with_replacement"},
}
SAMPLING = ("forward", "backward")


def pattern_of(name: str, ratio: float) -> sfx.Sampled:
    if name == "topk, mass":
        return sfx.Sampled(mass=ratio)
    return sfx.Sampled(ratio, **ESTIMATORS[name])


def config_of(sampling: str, pattern: sfx.Sampled) -> sfx.SparseConfig:
    """Sample every layer: no rule and no option exempts one."""
    rule = {
        "forward": sfx.Rule("*", forward=pattern),
        "backward": sfx.Rule("*", grad_input=pattern, grad_weight=pattern),
    }[sampling]
    return sfx.SparseConfig(rules=[rule], keep_output_dense=False, strict=True, codegen="aot_eager")


def new_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 304), nn.ReLU(), nn.Linear(304, 104), nn.ReLU(), nn.Linear(104, 10)
    )


def train(
    images: Images,
    config: sfx.SparseConfig | None,
    seeds: Iterable[int] = SEEDS,
    epochs: int = EPOCHS,
) -> list[float]:
    """Train one net for each seed, compiled once; return accuracies in percent.

    A run whose parameters turn NaN counts with what it then gets right.
    """
    net = new_net()
    compiled: Callable[[torch.Tensor], torch.Tensor] = net
    if config is not None:
        options = {"config": config}
        compiled = torch.compile(net, backend="sparsefx", dynamic=False, options=options)
    accuracies = []
    for seed in seeds:
        torch.manual_seed(seed)
        net.load_state_dict(new_net().state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for x, y in images.batches(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(compiled(x.flatten(1)), y).backward()
                optimizer.step()
        with torch.no_grad():  # the net itself: exact
            right = net(images.prepared(images.test_x).flatten(1)).argmax(1) == images.test_y
        accuracies.append(100 * right.double().mean().item())
    return accuracies


def trainings() -> int:
    """How many cells the whole table has."""
    return len(ESTIMATORS) * len(SAMPLING) * len(RATIOS)


@dataclass(frozen=True)
class Cell:
    """One estimator at one ratio in one place."""

    estimator: str
    sampling: str
    ratio: float
    accuracies: list[float]

    def __str__(self) -> str:
        mean = statistics.mean(self.accuracies)
        return f"{mean:.2f} ± {statistics.pstdev(self.accuracies):.2f}"


def cells(
    images: Images,
    tick: Callable[[], None],
    estimators: Iterable[str] = tuple(ESTIMATORS),
    ratios: Iterable[float] = RATIOS,
    epochs: int = EPOCHS,
) -> list[Cell]:
    out = []
    for name, sampling, ratio in itertools.product(estimators, SAMPLING, ratios):
        config = config_of(sampling, pattern_of(name, ratio))
        out.append(Cell(name, sampling, ratio, train(images, config, epochs=epochs)))
        tick()
        torch.compiler.reset()  # else Dynamo gives up after a handful of compilations of one code
    return out


def table(dense: list[float], found: list[Cell]) -> Table:
    by_place = {(c.estimator, c.sampling, c.ratio): c for c in found}
    ratios = list(dict.fromkeys(cell.ratio for cell in found))
    out = Table(title=f"digits, dense {Cell('', '', 1, dense)}: accuracy, mean ± sd of the seeds")
    out.add_column("estimator")
    for sampling, ratio in itertools.product(SAMPLING, ratios):
        out.add_column(f"{sampling} {ratio:g}", justify="right", no_wrap=True)
    for name in dict.fromkeys(cell.estimator for cell in found):
        places = itertools.product(SAMPLING, ratios)
        out.add_row(name, *(str(by_place[name, *place]) for place in places))
    return out
