"""Train a convolutional net and an MLP on handwritten digits, dense and sparse side by side.

    python examples/quickstart.py [--epochs N] [--seeds N] [--quick] [--codegen aot_eager]

The data is scikit-learn's load_digits (1797 images of 8 x 8 pixels), which comes with the package.
Every model is written as if sparsefx didn't exist; only the config given to torch.compile differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import sparsefx as sfx

WIDTH = 120
BATCH = 64
RATE, MOMENTUM = 0.05, 0.9
MARGIN = 1.5  # points of accuracy that a sparse run may lose to the dense one
ROLES = ("forward", "grad_input", "grad_weight")


class MLP(nn.Module):
    """64 pixels, two hidden layers, 10 digits."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(64, 304)
        self.fc2 = nn.Linear(304, 104)
        self.out = nn.Linear(104, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.fc2(F.relu(self.fc1(x)))))


class CNN(nn.Module):
    """Three convolutions, a hidden layer, 10 digits."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1)
        self.fc = nn.Linear(256, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 8, 8)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(F.relu(self.conv2(x)))), 2)
        return self.out(F.relu(self.fc(x.flatten(1))))


TRANSPOSABLE = sfx.NM(2, 4, transposable=True)

# Top-k sampling of a forward costs accuracy in narrow layers; as its paper does, leave them exact:
# an MLP's first 64 features, a convolution's 16 channels.
SAMPLED_MLP = sfx.Rule("fc*", forward=sfx.Sampled(0.3, min_k=64))
SAMPLED_CONV = sfx.Rule("conv*", forward=sfx.Sampled(0.3, min_k=16))

CONFIGS: dict[str, sfx.SparseConfig | None] = {
    "dense": None,  # torch.compile with plain Inductor
    "2:4 transposable": sfx.SparseConfig(),  # what you get when you ask for nothing
    "sampled 0.3": sfx.SparseConfig(rules=[SAMPLED_MLP, SAMPLED_CONV]),
    "all three": sfx.SparseConfig(
        rules=[sfx.Rule("*", forward=TRANSPOSABLE, grad_weight=sfx.Sampled(0.3))]
    ),
}


@dataclass(frozen=True)
class Digits:
    """Images as [count, 64] float32 in 0..1, labels as [count] int64."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass
class Run:
    """One model under one config."""

    model: nn.Module
    config: sfx.SparseConfig | None
    compiled: Callable[[Tensor], Tensor]
    tested: Callable[[Tensor], Tensor]
    compile_seconds: float = 0.0
    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return statistics.mean(self.accuracies)


def digits() -> Digits:
    x, y = load_digits(return_X_y=True)
    split = train_test_split(x / 16, y, test_size=500, stratify=y, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return Digits(train_x.float(), train_y.long(), test_x.float(), test_y.long())


def prepare(model: nn.Module, config: sfx.SparseConfig | None, codegen: str) -> Run:
    if config is None:
        return Run(model, None, torch.compile(model, backend=codegen, dynamic=False), model)
    config = dataclasses.replace(config, codegen=codegen)
    # Accuracy is measured once a run: the same rewriting, without waiting for Inductor.
    quickly = dataclasses.replace(config, codegen="aot_eager")
    trained, tested = (
        # static sizes: else the 500 test images would have the training graphs made for any batch
        torch.compile(model, backend="sparsefx", dynamic=False, options={"config": each})
        for each in (config, quickly)
    )
    return Run(model, config, trained, tested)


def reset(model: nn.Module) -> None:
    """Draw all parameters anew, in place: what was compiled for them stays."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()


def step(run: Run, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(run.compiled(x), y).backward()
    optimizer.step()


def warm_up(run: Run, data: Digits) -> None:
    """Compile: the first step of a model pays for it once, whatever the seeds."""
    started = time.perf_counter()
    F.cross_entropy(run.compiled(data.train_x[:BATCH]), data.train_y[:BATCH]).backward()
    run.compile_seconds = time.perf_counter() - started


def train(run: Run, data: Digits, epochs: int, seed: int, tick: Callable[[], None]) -> None:
    torch.manual_seed(seed)
    reset(run.model)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=RATE, momentum=MOMENTUM)
    batches = len(data.train_y) // BATCH  # the last, short batch is dropped
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_y))
        for batch in order[: batches * BATCH].split(BATCH):
            step(run, optimizer, data.train_x[batch], data.train_y[batch])
            schedule.step()
        tick()
    with torch.no_grad():
        right = run.tested(data.test_x).argmax(1) == data.test_y
    run.accuracies.append(100 * right.float().mean().item())


def time_steps(runs: list[Run], data: Digits, rounds: int) -> None:
    """Time whole training steps, the configs in turn, so that a busy machine is unfair to none."""
    optimizers = [
        torch.optim.SGD(run.model.parameters(), lr=0.0, momentum=MOMENTUM) for run in runs
    ]
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    for round_ in range(rounds + 3):
        for run, optimizer in zip(runs, optimizers, strict=True):
            started = time.perf_counter()
            step(run, optimizer, x, y)
            if round_ >= 3:
                run.seconds.append(time.perf_counter() - started)


def flops(run: Run, data: Digits) -> sfx.report.Totals:
    """Sum up a training step, from the report; that of a dense model has no sparse product."""
    if run.config is not None:
        return sfx.explain(run.compiled).totals
    return sfx.explain(run.model, config=sfx.SparseConfig(rules=[]))(data.train_x[:BATCH]).totals


def sparse_products(run: Run) -> str:
    """Which products of which layers are sparse, from the report."""
    if run.config is None:
        return "none"
    layers: dict[str, list[str]] = {}
    for row in sfx.explain(run.compiled).sites:
        if row.decision is not None:
            layers.setdefault(row.layer, []).append(row.role)
    return "; ".join(
        f"{layer} ({'all three' if len(roles) == 3 else ', '.join(roles)})"
        for layer, roles in layers.items()
    )


def count(dense: int, sparse: int) -> str:
    share = "" if sparse == dense else f" ({100 * sparse / dense:.0f}%)"
    return f"{sparse / 1e6:.2f}M{share}"


def table(results: dict[str, dict[str, Run]], data: Digits) -> Table:
    first = next(iter(next(iter(results.values())).values()))
    out = Table(
        title=f"digits: mean of {len(first.accuracies)} seeds; FLOPs, time of one step of {BATCH}"
    )
    for name in ("", "products", "accuracy", "vs dense", *ROLES, "executed", "step"):
        out.add_column(name, justify="left" if name in ("", "products") else "right", no_wrap=True)
    for model, runs in results.items():
        dense = runs["dense"]
        for name, run in runs.items():
            sums = flops(run, data).flops
            lost = "" if run is dense else f"{run.accuracy - dense.accuracy:+.1f}"
            out.add_row(
                model if run is dense else "",
                name,
                f"{run.accuracy:.1f}%",
                lost,
                *(count(sums[role].dense, sums[role].sparse) for role in ROLES),
                f"{100 * sums['all'].executed / sums['all'].dense:.0f}%",
                f"{1e3 * statistics.median(run.seconds):.2f} ms",
            )
        out.add_section()
    return out


def losses(results: dict[str, dict[str, Run]]) -> list[str]:
    """What lost more accuracy to dense than it may."""
    return [
        f"{model}, {name}: {run.accuracy:.1f}% against {runs['dense'].accuracy:.1f}% dense"
        for model, runs in results.items()
        for name, run in runs.items()
        if run.accuracy < runs["dense"].accuracy - MARGIN
    ]


def learn(options: argparse.Namespace, data: Digits, console: Console) -> dict[str, Any]:
    """Compile, train and time every model under every config."""
    results: dict[str, dict[str, Run]] = {}
    bars = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs, {task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
    )
    with bars:
        for name, make in (("MLP", MLP), ("CNN", CNN)):
            runs = results[name] = {}
            for label, config in CONFIGS.items():
                run = runs[label] = prepare(make(), config, options.codegen)
                bar = bars.add_task(
                    f"{name}, {label}", total=options.epochs * options.seeds, note="compiling"
                )
                warm_up(run, data)
                bars.update(bar, note=f"compiled in {run.compile_seconds:.0f} s")
                for seed in range(options.seeds):
                    train(run, data, options.epochs, seed, lambda bar=bar: bars.advance(bar))
            time_steps(list(runs.values()), data, rounds=10 if options.quick else 100)
    return results


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train on digits, dense and sparse side by side.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="1 seed, 2 epochs: shows that it runs, not how well"
    )
    parser.add_argument(
        "--codegen", default="inductor", choices=("inductor", "aot_eager"), help="as in the config"
    )
    options = parser.parse_args()
    if options.quick:
        options.epochs, options.seeds = 2, 1
    return options


def main() -> int:
    options = arguments()
    # Inductor's own import of torch.utils.mkldnn declares ScriptModules.
    warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
    torch.set_num_threads(1)  # nets this small gain nothing from a second, and others may need it
    console = Console(width=WIDTH)
    started = time.perf_counter()
    data = digits()
    results = learn(options, data, console)

    console.print("\nWhat the report of the CNN says, compiled with 'all three':\n")
    report = sfx.explain(results["CNN"]["all three"].compiled)
    console.print(str(report), highlight=False, markup=False)
    console.print("\nWhich products became sparse (layers too narrow for a pattern stay exact):")
    for model, runs in results.items():
        for name, run in runs.items():
            if run.config is not None:
                console.print(f"  {model}, {name}: {sparse_products(run)}", highlight=False)
    console.print()
    console.print(table(results, data))
    console.print(
        "FLOPs: what the pattern leaves. executed: what ran here, of all three products; an N:M "
        "product runs as a\nmasked dense one on this machine, so its saving is not time. step: "
        "median of whole training steps, configs in turn.",
        highlight=False,
    )
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    if options.quick:
        console.print("A quick run: accuracy is not judged.")
        return 0
    if lost := losses(results):
        console.print(f"FAILED: lost more than {MARGIN} points to dense: " + "; ".join(lost))
        return 1
    console.print(f"Every sparse run is within {MARGIN} points of dense.", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
