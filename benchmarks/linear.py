"""Forward and backward of a linear layer: dense, column-row sampled by sparsefx, and by hand.

    python benchmarks/linear.py [--device cpu|cuda] [--sizes 1024 2048] [--ratios .3] [--json PATH]

Every layer is N x N, sees 1024 rows that require a gradient, and computes all three products. The
contestants of a size and ratio run in turns in one process; a speed-up is the median over rounds of
dense time / own time, so what disturbs a round disturbs both. Values are checked before timing.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx as sfx

BATCH = 1024
SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
RATIOS = [0.1, 0.3, 0.5]
WARM_UP = 3  # rounds: the first ones compile and fill the allocator


@dataclass(frozen=True)
class Row:
    """One contestant at one size and ratio; times in milliseconds."""

    size: int
    ratio: float | None
    method: str
    median: float
    p20: float
    p80: float
    speedup: float  # median over the rounds of dense / own
    ideal: float  # dense FLOPs / own FLOPs
    error: (
        float | None
    )  # |y - exact| / |exact| of what is sampled first: y, else the input's gradient
    kept: float | None  # share of the scores' sum that the kept pairs hold


# --- the peer: column-row sampling as one writes it by hand (Adelman et al., 2021)


def strongest(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, float]:
    """The k pairs of a[M, K] @ b[K, N] with the largest |a_i| |b_i|, and their share of the sum."""
    scores = a.norm(dim=0, dtype=torch.float32) * b.norm(dim=1, dtype=torch.float32)
    top = scores.topk(k)
    return top.indices, float(top.values.sum() / scores.sum())


def sampled_product(a: Tensor, b: Tensor, k: int) -> Tensor:
    picked, _ = strongest(a, b, k)
    return a.index_select(1, picked) @ b.index_select(0, picked)


class ColumnRowLinear(torch.autograd.Function):
    """x @ w.T + b over the k strongest pairs; gradients through these pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, k: int) -> Tensor:
        scores = x.norm(dim=0, dtype=torch.float32) * w.norm(dim=0, dtype=torch.float32)
        picked = scores.topk(k).indices
        xs, ws = x.index_select(1, picked), w.index_select(1, picked)
        ctx.save_for_backward(picked, xs, ws)
        ctx.depth = x.shape[1]
        return torch.addmm(b, xs, ws.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        picked, xs, ws = ctx.saved_tensors
        gx = grad.new_zeros(grad.shape[0], ctx.depth).index_copy_(1, picked, grad @ ws)
        gw = grad.new_zeros(grad.shape[1], ctx.depth).index_copy_(1, picked, grad.t() @ xs)
        return gx, gw, grad.sum(0), None


class ByHand(nn.Linear):
    k = 1

    def forward(self, x: Tensor) -> Tensor:
        return ColumnRowLinear.apply(x, self.weight, self.bias, self.k)


# --- contestants


def copy_of(layer: nn.Linear, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    other = kind(layer.in_features, layer.out_features, device=layer.weight.device)
    other.to(layer.weight.dtype).load_state_dict(layer.state_dict())
    return other


def compiled(layer: nn.Linear, codegen: str, rule: sfx.Rule | None = None) -> Callable[..., Tensor]:
    if rule is None:
        return torch.compile(copy_of(layer), backend=codegen, dynamic=False)
    config = sfx.SparseConfig(rules=[rule], keep_output_dense=False, strict=True, codegen=codegen)
    options = {"config": config}
    return torch.compile(copy_of(layer), backend="sparsefx", options=options, dynamic=False)


@dataclass
class Contestant:
    method: str
    layer: Callable[..., Tensor]
    ideal: float
    error: float | None = None
    kept: float | None = None


def contestants(layer: nn.Linear, ratio: float, codegen: str) -> list[Contestant]:
    k = max(1, int(ratio * layer.in_features))
    by_hand = copy_of(layer, ByHand)
    by_hand.k = k
    drawn = sfx.Sampled(ratio)
    forward = sfx.Rule("*", forward=drawn)
    backward = sfx.Rule("*", grad_input=drawn, grad_weight=drawn)
    return [
        Contestant("dense, torch.compile", compiled(layer, codegen), 1.0),
        Contestant("sparsefx, forward sampled", compiled(layer, codegen, forward), 1 / ratio),
        Contestant(
            "sparsefx, backward sampled", compiled(layer, codegen, backward), 3 / (1 + 2 * ratio)
        ),
        Contestant("by hand, eager, forward sampled", by_hand, 1 / ratio),
    ]


# --- values


def gradients(layer: Callable[..., Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
    """[y, the input's gradient, the weight's]."""
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())  # type: ignore[attr-defined]
    y = layer(x)
    gx, gw = torch.autograd.grad(y, (x, parameters[0]), grad)
    return [y.detach(), gx, gw]


def distance(found: Tensor, expected: Tensor) -> float:
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm())


def check(field: list[Contestant], x: Tensor, grad: Tensor, ratio: float) -> None:
    """Compare with the layer by hand; fill in errors and kept scores.

    Raises:
        SystemExit: a contestant computes something else; nothing is timed then.
    """
    dense, forward, backward, by_hand = field
    w = dense.layer.weight.detach()  # type: ignore[attr-defined]
    exact = gradients(dense.layer, x, grad)
    sampled = gradients(by_hand.layer, x, grad)
    k_out, k_rows = (max(1, int(ratio * depth)) for depth in (w.shape[0], x.shape[0]))
    alone = [exact[0], sampled_product(grad, w, k_out), sampled_product(grad.t(), x, k_rows)]
    # rounding of sums over `depth` terms in another order, with room for the sum's length
    bound = 4 * torch.finfo(x.dtype).eps * max(x.shape) ** 0.5
    for contestant, expected in ((forward, sampled), (backward, alone)):
        found = gradients(contestant.layer, x, grad)
        for name, a, b in zip(("y", "grad_input", "grad_weight"), found, expected, strict=True):
            if not (off := distance(a, b)) <= bound:
                raise SystemExit(
                    f"{contestant.method}, N={w.shape[0]}, ratio={ratio}: {name} is off by "
                    f"{off:.2e} (allowed: {bound:.2e}) from column-row sampling by hand"
                )
    k = max(1, int(ratio * w.shape[1]))
    forward.error = by_hand.error = distance(sampled[0], exact[0])
    forward.kept = by_hand.kept = strongest(x, w.t(), k)[1]
    backward.error = distance(alone[1], exact[1])
    backward.kept = strongest(grad, w, k_out)[1]


# --- time


def timed(layer: Callable[..., Tensor], x: Tensor, grad: Tensor) -> float:
    """Milliseconds of one forward and backward."""
    x.grad = None
    for parameter in layer.parameters():  # type: ignore[attr-defined]
        parameter.grad = None
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        layer(x).backward(grad)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    before = time.perf_counter()
    layer(x).backward(grad)
    return (time.perf_counter() - before) * 1e3


def race(field: list[Contestant], x: Tensor, grad: Tensor, rounds: int) -> list[list[float]]:
    """Times of each contestant, in turns; the first of a round changes with the round."""
    x = x.detach().requires_grad_()
    times: list[list[float]] = [[] for _ in field]
    for turn in range(WARM_UP + rounds):
        for i in range(len(field)):
            at = (turn + i) % len(field)
            spent = timed(field[at].layer, x, grad)
            if turn >= WARM_UP:
                times[at].append(spent)
    return times


Times = Sequence[float]


def summary(size: int, ratio: float | None, one: Contestant, own: Times, dense: Times) -> Row:
    cuts = statistics.quantiles(own, n=5, method="inclusive")
    return Row(
        size, ratio, one.method, statistics.median(own), cuts[0], cuts[-1],
        statistics.median(d / o for d, o in zip(dense, own, strict=True)),
        one.ideal, one.error, one.kept,
    )  # fmt: skip


def measure(size: int, ratios: Sequence[float], args: argparse.Namespace) -> list[Row]:
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(size)
    layer = nn.Linear(size, size).to(args.device, dtype)
    x = torch.randn(BATCH, size, device=args.device, dtype=dtype)
    grad = torch.randn(BATCH, size, device=args.device, dtype=dtype)
    rows = []
    for ratio in ratios:
        torch.compiler.reset()
        field = contestants(layer, ratio, args.codegen)
        check(field, x, grad, ratio)
        times = race(field, x, grad, args.rounds)
        rows += [summary(size, ratio, c, t, times[0]) for c, t in zip(field, times, strict=True)]
    if args.device == "cuda":
        rows += masked(size, layer, x, grad, args)
    return rows


def masked(
    size: int, layer: nn.Linear, x: Tensor, grad: Tensor, args: argparse.Namespace
) -> list[Row]:
    """The fused mask and product, nm_mm: as many FLOPs as dense, no masked weight in memory."""
    torch.compiler.reset()
    rule = sfx.Rule("*", forward=sfx.NM(2, 4))
    field = [
        Contestant("dense, torch.compile", compiled(layer, args.codegen), 1.0),
        Contestant("sparsefx, 2:4 mask in nm_mm", compiled(layer, args.codegen, rule), 1.0),
    ]
    weight = layer.weight.detach()
    kept = torch.where(sfx.masks.nm_mask(weight, 2, 4), weight, 0)
    expected = torch.nn.functional.linear(x, kept, layer.bias.detach())
    found = gradients(field[1].layer, x, grad)[0]
    bound = 4 * torch.finfo(x.dtype).eps * max(x.shape) ** 0.5
    if not (off := distance(found, expected)) <= bound:
        raise SystemExit(f"nm_mm, N={size}: y is off by {off:.2e} (allowed: {bound:.2e})")
    field[1].error = distance(found, gradients(field[0].layer, x, grad)[0])
    field[1].kept = float(kept.abs().sum() / weight.abs().sum())
    times = race(field, x, grad, args.rounds)
    return [summary(size, None, field[1], times[1], times[0])]


# --- what comes out


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),  # "passive" suits a busy machine
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "batch": BATCH,
        "dtype": args.dtype,
        "codegen": args.codegen,
        "rounds": args.rounds,
        "load": os.getloadavg()[0],
    }


def commit() -> str | None:
    """Return the checkout's commit, "-dirty" where measured files differ; None outside of git."""
    git = partial(
        subprocess.run, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        measured = ["sparsefx", "passes", "kernels", "benchmarks/linear.py"]
        changed = git(["git", "status", "--porcelain", "--", *measured]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else str(head)


HEADINGS = (
    "N",
    "ratio",
    "method",
    "ms",
    "p20-p80",
    "x dense",
    "ideal",
    "of ideal",
    "error",
    "kept",
)


def cells(row: Row) -> list[str]:
    return [
        str(row.size),
        "" if row.ratio is None else f"{row.ratio:g}",
        row.method,
        f"{row.median:.2f}",
        f"{row.p20:.2f}-{row.p80:.2f}",
        f"{row.speedup:.2f}" + (" <" if row.speedup < 0.995 else ""),
        f"{row.ideal:.2f}",
        f"{row.speedup / row.ideal:.0%}",
        "" if row.error is None else f"{row.error:.3f}",
        "" if row.kept is None else f"{row.kept:.0%}",
    ]


def show(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Print a table; plain lines on a machine without rich ("<": slower than dense)."""
    title = f"linear N x N, batch {facts['batch']}, {facts['dtype']}, forward + backward"
    where = f"{facts['device']}, {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    caption = f"{where}, median of {facts['rounds']}; <: slower than dense"
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, caption, "\t".join(HEADINGS), sep="\n")
        print(*("\t".join(cells(row)) for row in rows), sep="\n")
        return
    made = Table(title=title, caption=caption)
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "method" else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = after is None or (after.size, after.ratio) != (row.size, row.ratio)
        made.add_row(*cells(row), end_section=ends)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(made)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time linear layers, dense and sampled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sizes", type=int, nargs="+", help=f"default: {SIZES}")
    parser.add_argument("--ratios", type=float, nargs="+", help=f"default: {RATIOS}")
    parser.add_argument("--rounds", type=int, help="timed repetitions, at least 2; default: 20")
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--quick", action="store_true", help="other defaults: 1024, 0.3, 5 rounds")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or ([1024] if args.quick else SIZES)
    args.ratios = args.ratios or ([0.3] if args.quick else RATIOS)
    args.rounds = args.rounds or (5 if args.quick else 20)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed for quantiles")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    facts = machine(args)
    rows: list[Row] = []
    for size in args.sizes:
        print(f"N={size} ...", file=sys.stderr)
        rows += measure(size, args.ratios, args)
    show(rows, facts)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {**facts, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
