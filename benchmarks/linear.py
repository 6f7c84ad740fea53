"""Forward and backward of a linear layer: dense, column-row sampled by sparsefx, and by hand.

    python benchmarks/linear.py [--device cpu|cuda] [--sizes 1024 2048] [--ratios .3] [--json PATH]
    python benchmarks/linear.py --sizes 2048 4096 --batch 2048 --roofline

Every layer is N x N, sees ``--batch`` rows that require a gradient, and computes all three
products. The contestants of a size and ratio run in turns in one process; values are checked before
timing. ``--roofline`` adds the limit that this machine sets, see roofline.py.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparsefx as sfx

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

import roofline
from timing import factor, machine, race, show, spread_of, where, write

BATCH = 1024
SIZES = [64, 128, 256, 512, 1024, 2048, 4096]
RATIOS = [0.1, 0.3, 0.5]


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
    limit: float | None = None  # the speed-up that the machine allows, under --roofline


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


def step(layer: Callable[..., Tensor], x: Tensor, grad: Tensor) -> None:
    """One forward and backward."""
    x.grad = None
    for parameter in layer.parameters():  # type: ignore[attr-defined]
        parameter.grad = None
    layer(x).backward(grad)


def run(field: list[Contestant], x: Tensor, grad: Tensor, rounds: int) -> list[list[float]]:
    x = x.detach().requires_grad_()
    return race([partial(step, one.layer, x, grad) for one in field], rounds, x.is_cuda)


Times = Sequence[float]


def summary(size: int, ratio: float | None, one: Contestant, own: Times, dense: Times) -> Row:
    found = spread_of(own, dense)
    return Row(size, ratio, one.method, **found, ideal=one.ideal, error=one.error, kept=one.kept)


def measure(size: int, ratios: Sequence[float], args: argparse.Namespace) -> list[Row]:
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(size)
    layer = nn.Linear(size, size).to(args.device, dtype)
    x = torch.randn(args.batch, size, device=args.device, dtype=dtype)
    grad = torch.randn(args.batch, size, device=args.device, dtype=dtype)
    rows = []
    for ratio in ratios:
        torch.compiler.reset()
        field = contestants(layer, ratio, args.codegen)
        check(field, x, grad, ratio)
        times = run(field, x, grad, args.rounds)
        new = [summary(size, ratio, c, t, times[0]) for c, t in zip(field, times, strict=True)]
        if args.roofline:
            new[1] = with_limit(new[1], new[0].median, x, grad, layer, args.rounds)
        rows += new
    if args.device == "cuda":
        rows += masked(size, layer, x, grad, args)
    return rows


def with_limit(
    row: Row, dense: float, x: Tensor, grad: Tensor, layer: nn.Linear, rounds: int
) -> Row:
    """Say what the limit of a row is made of, and put it in."""
    w, bias = layer.weight.detach(), layer.bias.detach()
    found = roofline.steps(x, w, grad, bias, max(1, int((row.ratio or 1) * row.size)), rounds)
    limit = dense / roofline.total(found)
    print(f"roofline, N={row.size}, ratio={row.ratio:g}: dense {dense:.2f} ms, limit {limit:.2f}x")
    for part in found:
        moved = f"{(part.read + part.written) / 1e6:.1f} MB" if part.read + part.written else ""
        print(f"  {part.name:22}{part.time:8.2f} ms  {moved:>10}")
    return replace(row, limit=limit)


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
    times = run(field, x, grad, args.rounds)
    return [summary(size, None, field[1], times[1], times[0])]


# --- what comes out

HEADINGS = [
    "N", "ratio", "method", "ms", "p20-p80", "x dense", "ideal", "of ideal", "error", "kept",
]  # fmt: skip


def cells(row: Row) -> list[str]:
    found = [
        str(row.size),
        "" if row.ratio is None else f"{row.ratio:g}",
        row.method,
        f"{row.median:.2f}",
        f"{row.p20:.2f}-{row.p80:.2f}",
        factor(row.speedup),
        f"{row.ideal:.2f}",
        f"{row.speedup / row.ideal:.0%}",
        "" if row.error is None else f"{row.error:.3f}",
        "" if row.kept is None else f"{row.kept:.0%}",
    ]
    if row.limit is not None:
        found += [f"{row.limit:.2f}", f"{row.speedup / row.limit:.0%}"]
    return found


def table(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Print all rows, a line between sizes and ratios."""
    title = f"linear N x N, batch {facts['batch']}, {facts['dtype']}, forward + backward"
    caption = f"{where(facts)}, median of {facts['rounds']}; <: slower than dense"
    limited = any(row.limit is not None for row in rows)
    lines = [cells(row) + [""] * (2 * (limited and row.limit is None)) for row in rows]
    places = dict.fromkeys((row.size, row.ratio) for row in rows)
    blocks = [
        [line for line, row in zip(lines, rows, strict=True) if (row.size, row.ratio) == place]
        for place in places
    ]
    show(title, caption, [*HEADINGS, *(["limit", "of limit"] if limited else [])], blocks)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time linear layers, dense and sampled")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--sizes", type=int, nargs="+", help=f"default: {SIZES}")
    parser.add_argument("--ratios", type=float, nargs="+", help=f"default: {RATIOS}")
    parser.add_argument("--rounds", type=int, help="timed repetitions, at least 2; default: 20")
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"rows; default: {BATCH}")
    parser.add_argument("--roofline", action="store_true", help="add what the machine allows")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--quick", action="store_true", help="other defaults: 1024, 0.3, 5 rounds")
    args = parser.parse_args(argv)
    args.sizes = args.sizes or ([1024] if args.quick else SIZES)
    args.ratios = args.ratios or ([0.3] if args.quick else RATIOS)
    args.rounds = args.rounds or (5 if args.quick else 20)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.roofline and (args.device, args.dtype) != ("cpu", "float32"):
        parser.error("--roofline knows the bytes of float32 on a CPU alone")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed for quantiles")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    chosen = {key: getattr(args, key) for key in ("batch", "dtype", "codegen", "rounds")}
    facts = {**machine(args.device), **chosen}
    rows: list[Row] = []
    for size in args.sizes:
        print(f"N={size} ...", file=sys.stderr)
        rows += measure(size, args.ratios, args)
    table(rows, facts)
    write(args.json, {**facts, "rows": [asdict(row) for row in rows]})
    return rows


if __name__ == "__main__":
    main()
