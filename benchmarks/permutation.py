"""How much |w| channel permutation lets N:M keep, and how long the search takes.

    python benchmarks/permutation.py [--sizes 1024] [--patterns 2:4 4:8 16:32] [--json FILE]

Weights are drawn from a normal distribution; in "scaled" every column is multiplied by a log-normal
factor, as channels of trained nets differ in size. The order that is found is checked to be a
permutation that keeps at least as much as none does, before anything is printed.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefx.masks import nm_mask, retained
from sparsefx.permutation import search

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from timing import machine, write


@dataclass(frozen=True)
class Row:
    """One matrix [rows, columns], one pattern: seconds, and the share of |w| kept."""

    size: int
    weights: str
    pattern: str
    seconds: float
    before: float
    after: float


def weights(kind: str, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(size, size, generator=generator)
    return w if kind == "normal" else w * torch.randn(size, generator=generator).exp()


def measure(kind: str, size: int, n: int, m: int, options: argparse.Namespace) -> Row:
    w = weights(kind, size, options.seed)
    started = time.perf_counter()
    order = search([w], n, m, budget=options.budget, seed=options.seed)
    seconds = time.perf_counter() - started
    if not torch.equal(order.sort().values, torch.arange(size)):
        raise SystemExit(f"{kind}, size={size}, {n}:{m}: the order is no permutation")
    before, after = (retained(v, nm_mask(v, n, m)) for v in (w, w[:, order]))
    if after < before:
        raise SystemExit(f"{kind}, size={size}, {n}:{m}: keeps {after}, less than {before}")
    return Row(size, kind, f"{n}:{m}", seconds, before, after)


def pattern(text: str) -> tuple[int, int]:
    n, _, m = text.partition(":")
    return int(n), int(m)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Channel permutation: what it keeps, and time.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024])
    parser.add_argument(
        "--patterns", type=pattern, nargs="+", default=[(2, 4), (4, 8), (16, 32), (1, 16)]
    )
    parser.add_argument("--budget", type=int, default=100, help="rounds of the search")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    rows = []
    print(f"{'size':>5}  {'weights':8} {'N:M':6} {'seconds':>8} {'before':>8} {'after':>8}")
    for size in options.sizes:
        for n, m in options.patterns:
            for kind in ("normal", "scaled"):
                row = measure(kind, size, n, m, options)
                rows.append(row)
                print(
                    f"{row.size:5}  {row.weights:8} {row.pattern:6} {row.seconds:8.2f} "
                    f"{100 * row.before:7.2f}% {100 * row.after:7.2f}%",
                    flush=True,
                )
    if options.json is not None:
        written = {"budget": options.budget, "rows": [asdict(row) for row in rows]}
        write(options.json, {**machine("cpu"), **written})


if __name__ == "__main__":
    main()
