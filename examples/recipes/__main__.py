"""Train the nets of Adelman et al. (NeurIPS 2021), dense and sampled, with the paper's settings.

    python examples/recipes --recipe mlp                          # on scikit-learn's digits
    python examples/recipes --recipe cnn --data ~/mnist           # on MNIST files
    python examples/recipes --recipe wideresnet --depth 16 --width 4 --data ~/cifar
    python examples/recipes --recipe mlp --sampling backward      # unbiased, in the gradients only
    python examples/recipes --digits-table                        # every estimator: 145 trainings

With digits, 1297 images, the recipes that use SGD take few steps: give them more --epochs.
Sampling is a config: the nets (networks.py) know nothing of it. The first layer is exempt by a
rule, the last by keep_output_dense, and whatever is narrower than --min-k by the pattern.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings

import digits
import images
import networks
import torch
from formats import DataError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from training import RECIPES, SAMPLING, Run, config_of, prepare, train

import sparsefx as sfx
from sparsefx.patterns import ESTIMATORS, SCORES

WIDTH = 130
ROLES = ("forward", "grad_input", "grad_weight")


def pattern(options: argparse.Namespace) -> sfx.Sampled:
    """Build what was asked for; in a gradient, unbiased is better, in a forward the largest."""
    usual = "systematic" if options.sampling == "backward" else "topk"
    return sfx.Sampled(
        options.ratio,
        min_k=options.min_k,
        estimator=options.estimator or usual,
        scores=options.scores,
    )


def prepare_runs(options: argparse.Namespace, data: images.Images) -> list[Run]:
    """Compile the net densely and, unless nothing is to be sampled, sampled."""
    sampled = pattern(options)
    x = data.prepared(data.train_x[: options.batch])
    runs = []
    for sampling in dict.fromkeys(("none", options.sampling)):
        config = config_of(sampling, sampled, options.codegen)
        name = "dense" if sampling == "none" else f"{sampling}, {sampled}"
        runs.append(prepare(name, new_net(options, data), config, x))
    return runs


def new_net(options: argparse.Namespace, data: images.Images) -> torch.nn.Module:
    sizes = {k: v for k in ("depth", "width") if (v := getattr(options, k)) is not None}
    return RECIPES[options.recipe].make(data.shape, data.classes, **sizes)


def learn(
    options: argparse.Namespace, data: images.Images, runs: list[Run], bars: Progress
) -> None:
    for run in runs:
        bar = bars.add_task(run.name, total=options.epochs * options.seeds)
        for seed in range(options.seeds):
            torch.manual_seed(seed)  # every run starts from the same weights
            run.net.load_state_dict(new_net(options, data).state_dict())
            train(
                run,
                RECIPES[options.recipe],
                data,
                options.batch,
                options.epochs,
                lambda bar=bar: bars.advance(bar),
            )


def count(flops: sfx.report.totals.Flops) -> str:
    share = "" if flops.sparse == flops.dense else f" ({100 * flops.sparse / flops.dense:.0f}%)"
    return f"{flops.sparse / 1e6:.1f}M{share}"


def table(runs: list[Run], title: str) -> Table:
    out = Table(title=title)
    for name in ("run", "accuracy", "vs dense", *ROLES, "saved", "step", "in all"):
        out.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
    for run in runs:
        totals = run.report.totals
        empty = sfx.report.totals.Flops()
        out.add_row(
            run.name,
            f"{run.accuracy:.2f}%",
            "" if run is runs[0] else f"{run.accuracy - runs[0].accuracy:+.2f}",
            *(count(totals.flops.get(role, empty)) for role in ROLES),
            f"{totals.saved_bytes_sparse / 1e6:.2f} MB",
            f"{1e3 * statistics.median(run.seconds):.2f} ms",
            f"{sum(run.seconds):.1f} s",
        )
    return out


def exact_layers(run: Run) -> list[str]:
    """Which layers' forward stays exact, and why, from the report."""
    return [
        f"  {row.layer}: {row.reason}"
        for row in run.report.sites
        if row.role == "forward" and row.decision is None
    ]


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def digits_table(options: argparse.Namespace, console: Console) -> None:
    """Print what every estimator costs in accuracy, forward and backward-only."""
    data, epochs = images.digits(), options.epochs or digits.EPOCHS
    with progress(console) as bars:
        bar = bars.add_task("trainings of 3 seeds", total=digits.trainings() + 1)
        dense = digits.train(data, None, epochs=epochs)
        bars.advance(bar)
        found = digits.cells(data, lambda: bars.advance(bar), epochs=epochs)
    console.print(digits.table(dense, found))
    if epochs != digits.EPOCHS:
        console.print(f"{epochs} epochs show that it runs, not how well.", highlight=False)


def recipe_table(options: argparse.Namespace, console: Console) -> None:
    """Train by a recipe and print what came of it."""
    data = images.load(options.data)
    if options.batch > len(data.train_y):
        raise DataError(
            f"--batch {options.batch}: there are {len(data.train_y)} training images; give less"
        )
    runs = prepare_runs(options, data)
    size = sum(p.numel() for p in runs[0].net.parameters())
    console.print(
        f"{options.recipe}: {size / 1e6:.2f} M parameters; {data.name}: {len(data.train_y)} images "
        f"of {list(data.shape)} to train on, {len(data.test_y)} to test on; {options.epochs} "
        f"epochs, batches of {options.batch}",
        highlight=False,
        markup=False,
    )
    for run in runs[1:]:
        console.print(f"\nWith {run.name}, these layers' forward stays exact:", highlight=False)
        console.print("\n".join(exact_layers(run)), highlight=False, markup=False)
    with progress(console) as bars:
        learn(options, data, runs, bars)
    console.print(table(runs, f"{options.recipe} on {data.name}, mean of {options.seeds} seed(s)"))
    console.print(
        "FLOPs and bytes saved for the backward: of one step. step: the median. Accuracy is that "
        "of the exact net.",
        highlight=False,
    )
    if runs[-1].uncalibrated != runs[-1].accuracies:
        said = ", ".join(f"{run.name} {statistics.mean(run.uncalibrated):.2f}%" for run in runs)
        console.print(f"Without recalibrating batch norm: {said}", highlight=False)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="recipes", description="Train the paper's nets, dense and sampled."
    )
    add = parser.add_argument
    add("--recipe", choices=tuple(RECIPES), default="mlp")
    add("--sampling", choices=SAMPLING, default="forward")
    add("--ratio", type=float, default=0.5, help="share of the pairs that is used")
    add("--min-k", type=int, default=10, help="fewest pairs, so that a stem stays exact")
    add("--estimator", choices=ESTIMATORS, help="topk; for --sampling backward systematic")
    add("--scores", choices=SCORES, default="product")
    add("--data", help="a folder with MNIST or CIFAR files; without it, scikit-learn's digits")
    add("--epochs", type=int, help="the recipe's, or 40 for --digits-table")
    add("--batch", type=int, help="the recipe's")
    add("--seeds", type=int, default=1)
    add("--depth", type=int, help="of resnet (10, 18, 34) and wideresnet (6 n + 4)")
    add("--width", type=int, help="of resnet (channels of the stem, 64) and wideresnet (10)")
    add("--codegen", default="inductor", choices=("inductor", "aot_eager"))
    add("--digits-table", action="store_true", help="every estimator on digits, no recipe")
    options = parser.parse_args(given)
    for key in ("epochs", "batch", "seeds", "width"):
        if (value := getattr(options, key)) is not None and value < 1:
            parser.error(f"--{key} {value}: must be at least 1")
    recipe = RECIPES[options.recipe]
    if not recipe.resizable and (options.depth or options.width):
        parser.error(f"--depth and --width belong to resnet and wideresnet, not {options.recipe}")
    if not options.digits_table:
        options.epochs, options.batch = (
            options.epochs or recipe.epochs,
            options.batch or recipe.batch,
        )
    return options


def main() -> int:
    options = arguments()
    # Inductor's own import of torch.utils.mkldnn declares ScriptModules.
    warnings.filterwarnings("ignore", ".torch.jit.script_method. is deprecated", DeprecationWarning)
    console = Console(width=WIDTH)
    started = time.perf_counter()
    try:
        (digits_table if options.digits_table else recipe_table)(options, console)
    except (sfx.SparsefxError, networks.SizeError) as error:
        print(f"recipes: {error}", file=sys.stderr)
        return 2
    console.print(f"{time.perf_counter() - started:.0f} s in all", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
