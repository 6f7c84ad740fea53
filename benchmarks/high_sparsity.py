"""Training steps at 90 % sparsity and more on CPU: Static masks beside the dense network.

    python benchmarks/high_sparsity.py [--batches 128 512] [--densities 0.1 0.05 0.02] [--json PATH]

An MLP 1024-4096-1024 with a uniform density, forward and backward, no optimizer. sparsefx takes
what the mask keeps in the forward and in grad_input, compressing the weight within the time that
is told; grad_weight is a dense product with a mask behind it, so of five products two keep all
their MACs. The same masked model under torch.compile multiplies zeros. Values are checked first;
the contestants of a case run in turns in one process. What a sparsifier's step takes, without and
with a round of SET or RigL, is told apart: it comes on top, a round once in many steps.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx as sfx
from sparsefx.sparsifiers import SET, RigL, Static

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from timing import factor, machine, race, show, spread_of, timed, where, write


@dataclass(frozen=True)
class Row:
    """One contestant of one case; times in milliseconds."""

    batch: int
    density: float
    method: str
    median: float
    p20: float
    p80: float
    speedup: float  # median over the rounds of compiled dense time / own
    macs: float  # share of the dense step's that is multiplied


def mlp(width: int, hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def work(forward: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """One forward and backward; the gradient of x is not asked for."""
    model.zero_grad(set_to_none=True)
    loss = forward(x).square().mean()
    loss.backward()
    return loss


def contestants(
    dense: nn.Module, density: float, codegen: str, x: Tensor
) -> dict[str, tuple[Callable[[], Tensor], nn.Module, float]]:
    """Method -> one step, its model, and the share of dense MACs."""
    masked = copy.deepcopy(dense)
    Static(masked, density=density, init="uniform")
    ours = copy.deepcopy(masked)
    config = sfx.SparseConfig(rules=[sfx.Rule("*", forward=sfx.Masked())], codegen=codegen)
    options: dict[str, Any] = {"options": {"config": config}}
    told = {
        "dense, torch.compile": (dense, codegen, {}, 1.0),
        "masked, torch.compile": (masked, codegen, {}, 1.0),
        "masked, sparsefx": (ours, "sparsefx", options, (2 + 3 * density) / 5),
    }
    found = {}
    for name, (model, backend, more, macs) in told.items():
        forward = torch.compile(model, backend=backend, dynamic=False, **more)
        found[name] = (partial(work, forward, model, x), model, macs)
    check(found)
    report = sfx.explain(forward)
    if [row.lowering for row in report.sites].count("C++ masked_mm") < 3:
        found["masked, sparsefx"] = (*found["masked, sparsefx"][:2], 1.0)
        print(f"density {density}: not all products read what is kept\n{report}", file=sys.stderr)
    return found


def check(found: dict[str, tuple[Callable[[], Tensor], nn.Module, float]]) -> None:
    """Compare loss and gradients of both masked models.

    Raises:
        SystemExit: they differ; nothing is timed then.
    """
    results = []
    for name in ("masked, torch.compile", "masked, sparsefx"):
        step, model, _ = found[name]
        results.append([step().detach(), *(p.grad.double() for p in model.parameters())])
    for expected, got in zip(*results, strict=True):
        off = float((got - expected).norm() / expected.norm())
        if not off <= 1e-4:
            raise SystemExit(f"masked, sparsefx: off by {off:.2e} (allowed: 1e-4)")


def measure(batch: int, density: float, args: argparse.Namespace) -> list[Row]:
    torch.compiler.reset()
    dense = mlp(*args.sizes)
    x = torch.randn(batch, args.sizes[0])
    field = contestants(dense, density, args.codegen, x)
    times = race([step for step, *_ in field.values()], args.rounds)
    return [
        Row(batch, density, name, **spread_of(own, times[0]), macs=macs)
        for (name, (*_, macs)), own in zip(field.items(), times, strict=True)
    ]


# --- what a sparsifier's step takes


def upkeep(density: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds of Adam's step, and of a sparsifier's without and with a round, for two."""
    found = []
    for name, cls, more in (("SET", SET, {}), ("RigL", RigL, {"steps": 4 * args.rounds})):
        model = mlp(*args.sizes)
        optimizer = torch.optim.Adam(model.parameters())
        options = {"optimizer": optimizer, "density": density, "init": "uniform", **more}
        sparsifier = cls(model, every=2, **options)
        spent: dict[str, list[float]] = {"optimizer": [], "step": [], "round": []}
        x = torch.randn(8, args.sizes[0])
        for turn in range(2 * args.rounds):
            work(model, model, x)
            spent["optimizer"].append(timed(optimizer.step))
            spent["round" if turn % 2 else "step"].append(timed(sparsifier.step))
        medians = {key: statistics.median(value) for key, value in spent.items()}
        found.append({"method": name, "density": density, **medians})
    return found


# --- what comes out

HEADINGS = ["batch", "density", "method", "ms", "p20-p80", "x dense", "MACs"]


def cells(row: Row) -> list[str]:
    times = f"{row.median:.2f}", f"{row.p20:.2f}-{row.p80:.2f}"
    return [
        str(row.batch),
        f"{row.density:g}",
        row.method,
        *times,
        factor(row.speedup),
        f"{row.macs:.0%}",
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.05, 0.02])
    parser.add_argument("--sizes", type=int, nargs=2, default=[1024, 4096], help="width, hidden")
    parser.add_argument("--rounds", type=int, default=20, help="timed repetitions, at least 2")
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed for quantiles")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    facts = {**machine("cpu"), "rounds": args.rounds, "codegen": args.codegen, "sizes": args.sizes}
    blocks = []
    for batch in args.batches:
        for density in args.densities:
            print(f"batch {batch}, density {density} ...", file=sys.stderr)
            blocks.append(measure(batch, density, args))
    caption = f"{where(facts)}, median of {args.rounds}; <: slower than dense"
    title = f"MLP {args.sizes[0]}-{args.sizes[1]}-{args.sizes[0]}, forward and backward"
    show(title, caption, HEADINGS, [[cells(row) for row in block] for block in blocks])
    steps = upkeep(args.densities[0], args)
    keys = ("optimizer", "step", "round")
    lines = [[row["method"], *(f"{row[key]:.2f}" for key in keys)] for row in steps]
    headings = ["method", "Adam's step, ms", "sparsifier's step", "with a round"]
    show("What comes on top", f"density {args.densities[0]:g}", headings, [lines])
    rows = [row for block in blocks for row in block]
    write(args.json, {**facts, "rows": [asdict(row) for row in rows], "upkeep": steps})
    return rows


if __name__ == "__main__":
    main()
