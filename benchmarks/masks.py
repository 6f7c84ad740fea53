"""Transposable masks: how good and how fast every solver is, beside other ways to the same.

    python benchmarks/masks.py [--sizes 1024] [--patterns 4:8 16:32] [--rounds 5] [--json PATH]

The weight is |N(0, 1)|, N x N, float32. Solvers see all of it; the linear program (HiGHS) and the
published min-cost flow (networkx), which go tile by tile, see a sample, and their time is scaled
up. Row-wise N:M, which drops the columns' limits, shows what these cost. Every mask is checked
before anything is timed, and the exact ones are proved to be best by their certificate.
"""

import argparse
import contextlib
import importlib.util
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
from torch import Tensor

from sparsefx import masks
from sparsefx.masks import flow
from sparsefx.masks.tiles import map_tiles

SIZES = [1024, 4096]
PATTERNS = ["2:4", "4:8", "8:16", "8:32", "16:32"]
SAMPLE = 16  # tiles for what goes tile by tile
TORCH_ONLY_UP_TO = 1024  # beyond, the solvers without a kernel take long

Solve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One way to masks of one pattern and size; times in milliseconds."""

    size: int
    pattern: str
    method: str
    median: float
    p20: float
    p80: float
    retained: float  # share of the total |w|
    of_best: float | None  # share of what the best transposable mask retains
    sampled: int | None  # tiles that were timed, when these weren't all


# --- other ways, tile by tile


def by_linear_program(tile: Tensor, n: int) -> Tensor:
    """Its corners are the masks: HiGHS finds one."""
    import numpy as np
    from scipy.optimize import linprog

    m = len(tile)
    limits = np.concatenate([np.kron(np.eye(m), np.ones(m)), np.kron(np.ones(m), np.eye(m))])
    cost = -tile.abs().double().numpy().ravel()
    found = linprog(cost, A_eq=limits, b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs")
    return torch.from_numpy(found.x > 0.5).view(m, m)


def by_min_cost_flow(tile: Tensor, n: int) -> Tensor:
    """Hubara et al. (2021), with Python integers: on floats networkx may never end."""
    import networkx as nx

    m = len(tile)
    scaled = (tile.abs().double() * 2**24).round().long().tolist()
    graph = nx.DiGraph()
    graph.add_node("s", demand=-n * m)
    graph.add_node("t", demand=n * m)
    for i in range(m):
        graph.add_edge("s", ("row", i), capacity=n, weight=0)
        graph.add_edge(("col", i), "t", capacity=n, weight=0)
        for j in range(m):
            graph.add_edge(("row", i), ("col", j), capacity=1, weight=-scaled[i][j])
    flows = nx.min_cost_flow(graph)
    kept = [[flows[("row", i)][("col", j)] for j in range(m)] for i in range(m)]
    return torch.tensor(kept, dtype=torch.bool)


# --- contestants


def whole(n: int, m: int, size: int) -> dict[str, Solve]:
    """Those that see all of the weight, the exact ones first."""
    solve = masks.transposable_mask
    found: dict[str, Solve] = {
        "exact": partial(solve, n=n, m=m, solver="exact"),
        "greedy": partial(solve, n=n, m=m, solver="greedy"),
        "entropic": partial(solve, n=n, m=m, solver="entropic"),
        "row-wise N:M": partial(masks.nm_mask, n=n, m=m),
    }
    if size <= TORCH_ONLY_UP_TO:
        found["exact, torch alone"] = lambda w: map_tiles(w, m, partial(flow.solve, n=n))
        found["exact with certificate"] = lambda w: solve(w, n, m, return_certificate=True)[0]
    else:
        del found["entropic"]
        if m > 8:
            del found["greedy"]
    return found


def tile_by_tile(n: int) -> dict[str, Solve]:
    found: dict[str, Solve] = {"linear program, HiGHS": partial(by_linear_program, n=n)}
    if importlib.util.find_spec("networkx"):
        found["min-cost flow, networkx"] = partial(by_min_cost_flow, n=n)
    return found


def sample_of(w: Tensor, m: int) -> list[Tensor]:
    """As many tiles as are there, SAMPLE at most, spread over the weight."""
    cut = w.unfold(0, m, m).unfold(1, m, m).reshape(-1, m, m)
    return [cut[i] for i in range(0, len(cut), max(1, len(cut) // SAMPLE))][:SAMPLE]


# --- values, then time


def check(name: str, mask: Tensor, w: Tensor, n: int, m: int) -> None:
    """Leave when a mask breaks the pattern, or one that is called exact isn't the best."""
    transposable = name != "row-wise N:M"
    verdict = masks.is_valid(mask, n, m, transposable=transposable, exact=True)
    if verdict and not name.startswith(("row-wise", "greedy", "entropic")):
        verdict = masks.certify(w, mask, n, m).holds(w, mask)
    if not verdict:
        raise SystemExit(f"{name} at {n}:{m}, N={len(w)}: {verdict.reason}")


def seconds(call: Callable[[], object]) -> float:
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def summary(place: tuple[int, str], method: str, times: Sequence[float], **values: Any) -> Row:
    cuts = statistics.quantiles(times, n=5, method="inclusive")
    spent = (1e3 * t for t in (statistics.median(times), cuts[0], cuts[-1]))
    return Row(*place, method, *spent, **values)


def measure(size: int, pattern: str, rounds: int) -> list[Row]:
    n, m = (int(part) for part in pattern.split(":"))
    torch.manual_seed(size)
    w = torch.randn(size, size)
    rows, place = [], (size, f"{n}:{m}")
    contestants = whole(n, m, size)
    made = {name: solve(w) for name, solve in contestants.items()}  # this also builds the kernel
    for name, mask in made.items():
        check(name, mask, w, n, m)
    best = masks.retained(w, made["exact"])
    for name, solve in contestants.items():
        times = [seconds(partial(solve, w)) for _ in range(rounds)]
        kept = masks.retained(w, made[name])
        share = None if name == "row-wise N:M" else kept / best
        rows.append(summary(place, name, times, retained=kept, of_best=share, sampled=None))
    tiles = sample_of(w, m)
    best_of_sample = sum(float(t.abs()[masks.transposable_mask(t, n, m)].sum()) for t in tiles)
    all_of_sample = sum(float(t.abs().sum()) for t in tiles)
    for name, solve in tile_by_tile(n).items():
        kept = 0.0
        for tile in tiles:
            check(name, mask := solve(tile), tile, n, m)
            kept += float(tile.abs()[mask].sum())
        scale = (size // m) ** 2
        times = [scale * seconds(partial(solve, tile)) for tile in tiles]
        values = {"retained": kept / all_of_sample, "of_best": kept / best_of_sample}
        rows.append(summary(place, name, times, **values, sampled=len(tiles)))
    return rows


# --- what comes out


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "device": "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "dtype": "float32",
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
        measured = ["sparsefx/masks", "benchmarks/masks.py"]
        changed = git(["git", "status", "--porcelain", "--", *measured]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else str(head)


HEADINGS = ("N", "pattern", "method", "ms", "p20-p80", "retained", "of best", "of tiles")


def cells(row: Row) -> list[str]:
    digits = 2 if row.median < 100 else 0
    return [
        str(row.size),
        row.pattern,
        row.method,
        f"{row.median:.{digits}f}",
        f"{row.p20:.{digits}f}-{row.p80:.{digits}f}",
        f"{row.retained:.4f}",
        "" if row.of_best is None else f"{row.of_best:.5f}",
        "all" if row.sampled is None else f"{row.sampled}, scaled",
    ]


def show(rows: Sequence[Row], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    where = f"{facts['device']}, {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"
    title = "transposable masks of an N x N weight, |N(0, 1)|, float32"
    made = Table(title=title, caption=f"{where}, median of {facts['rounds']}")
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading == "method" else "right")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = after is None or (after.size, after.pattern) != (row.size, row.pattern)
        made.add_row(*cells(row), end_section=ends)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(made)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="quality and time of transposable mask solvers")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help="such as 2:4 (kept:of)")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions, at least 2")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed for quantiles")
    for pattern in args.patterns:
        n, colon, m = pattern.partition(":")
        if not (colon and n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
            parser.error(f"--patterns {pattern}: write N:M, N kept of every M, as 2:4")
        for size in args.sizes:
            if size % int(m):
                parser.error(f"--sizes {size}: {pattern} needs a multiple of {m}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    facts = machine(args)
    rows: list[Row] = []
    for size in args.sizes:
        for pattern in args.patterns:
            print(f"N={size}, {pattern} ...", file=sys.stderr)
            rows += measure(size, pattern, args.rounds)
    show(rows, facts)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        content = {**facts, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
