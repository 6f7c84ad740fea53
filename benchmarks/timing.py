"""What the benchmarks share: contestants that run in turns, facts about the machine, tables, JSON.

Contestants of one race run in turns in one process, and a speed-up is the median over the rounds
of the first one's time / own time, so what disturbs a round disturbs both.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3  # rounds: the first ones compile and fill the allocator
Work = Callable[[], object]


def timed(work: Work, cuda: bool = False, before_each: Work | None = None) -> float:
    """Milliseconds of one call; ``before_each``, say a flush of the cache, is not counted."""
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if before_each is not None:
            before_each()  # while the device does this, the host runs ahead with the work
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))
    if before_each is not None:
        before_each()
    before = time.perf_counter()
    work()
    return (time.perf_counter() - before) * 1e3


def race(
    field: Sequence[Work], rounds: int, cuda: bool = False, before_each: Work | None = None
) -> list[list[float]]:
    """Times of each contestant, in turns; the first of a round changes with the round."""
    times: list[list[float]] = [[] for _ in field]
    for turn in range(WARM_UP + rounds):
        for i in range(len(field)):
            at = (turn + i) % len(field)
            spent = timed(field[at], cuda, before_each)
            if turn >= WARM_UP:
                times[at].append(spent)
    return times


def spread_of(own: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile, and the median over the rounds of dense / own."""
    cuts = statistics.quantiles(own, n=5, method="inclusive")
    speedup = statistics.median(d / o for d, o in zip(dense, own, strict=True))
    return {"median": statistics.median(own), "p20": cuts[0], "p80": cuts[-1], "speedup": speedup}


# --- where it ran


def machine(device: str) -> dict[str, Any]:
    """Facts that a reader of the numbers needs."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), cpu)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),  # "passive" suits a busy machine
        "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "load": os.getloadavg()[0],
    }


def commit() -> str | None:
    """Return the checkout's commit, "-dirty" where measured files differ; None outside of git."""
    git = partial(
        subprocess.run, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    try:
        head = git(["git", "rev-parse", "--short=12", "HEAD"]).stdout.strip()
        measured = ["sparsefx", "passes", "kernels", "benchmarks/*.py"]
        changed = git(["git", "status", "--porcelain", "--", *measured]).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else str(head)


# --- what comes out


def show(
    title: str, caption: str, headings: Sequence[str], blocks: Sequence[Sequence[Sequence[str]]]
) -> None:
    """Print a table, a line between blocks; plain lines on a machine without rich."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title, caption, "\t".join(headings), sep="\n")
        print(*("\t".join(line) for block in blocks for line in block), sep="\n")
        return
    made = Table(title=title, caption=caption)
    for heading in headings:
        words = heading in ("method", "layer", "model", "why")
        made.add_column(heading, justify="left" if words else "right")
    for block in blocks:
        for line in block:
            made.add_row(*line, end_section=line is block[-1])
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(made)


def write(path: Path | None, content: dict[str, Any]) -> None:
    """Write what was printed, where a path was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def where(facts: dict[str, Any]) -> str:
    """One line about the machine."""
    return f"{facts['device']}, {facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}"


def factor(speedup: float) -> str:
    """Mark what is slower than dense with "<"."""
    return f"{speedup:.2f}" + (" <" if speedup < 0.995 else "")
