"""What the rows for a CUDA device share: cases in a time budget, clocks, errors, goals, peers.

A row is a list of cases, its most telling one first. A case has contestants that run in turns, the
device's L2 cache flushed before each; those that compute something other than their own float64
twin are not timed (one of ours ends the row). A row stops at its share of the time and says which
cases it left out. ``--dry-run`` takes every step with tiny sizes on the CPU: references instead of
kernels, torch operators instead of vendor libraries, a clock instead of CUDA events.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from cases import Case, Cases, Contestant, Field, Goal, Setting
from timing import Work, factor, machine, race, show, spread_of, write

FLUSHED = 256 << 20  # bytes written between two calls: five times the L2 cache of an H200
FEW_ROWS = (
    64  # up to here a product is bound by its weight: host time and a warm cache are told too
)
SEEN = 128  # rows of a result that are compared with float64
BACK_TO_BACK = 20


# --- time


def _flush(s: Setting) -> Work | None:
    if s.device == "cpu":
        return None
    buffer = torch.empty(FLUSHED // 4, dtype=torch.int32, device=s.device)
    return buffer.zero_


def back_to_back(work: Work, s: Setting) -> float:
    """Milliseconds a call when many follow each other: a warm cache, and the host's own pace."""
    calls = 2 if s.dry else BACK_TO_BACK
    whole = race([lambda: [work() for _ in range(calls)]], 3, s.device == "cuda")[0]
    return statistics.median(whole) / calls


def replayed(work: Work, s: Setting) -> Work:
    """The same work as a CUDA graph, without the host's time."""
    if s.device == "cpu":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def graphs(made: Field, s: Setting) -> list[Contestant]:
    """Those that can be captured, once more as a CUDA graph; a note where that fails."""
    found = []
    for one in (one for one in made.contestants if one.graph):
        try:
            work = replayed(one.work, s)
        except RuntimeError as error:
            made.notes.append(f"{one.method}: no CUDA graph: {str(error).splitlines()[0]}")
        else:
            found.append(replace(one, method=f"{one.method}, CUDA graph", work=work))
    return found


def rounds_within(works: Sequence[Work], s: Setting) -> int:
    """Fewer rounds, five at least, where one takes long: a case has a third of the row's time."""
    if s.dry:
        return s.rounds
    before = time.perf_counter()
    for work in works:
        work()
    if s.device == "cuda":
        torch.cuda.synchronize()
    spent = time.perf_counter() - before
    return max(5, min(s.rounds, int(s.seconds / 3 / spent)))


def timed_field(made: Field, s: Setting) -> list[dict[str, Any]]:
    """All contestants in turns; with few rows also their graphs, and warm."""
    ways = made.contestants + (graphs(made, s) if made.few_rows else [])
    works = [one.work for one in ways]
    times = race(works, rounds_within(works, s), s.device == "cuda", _flush(s))
    medians = [statistics.median(own) for own in times]
    dense = min((i for i, one in enumerate(ways) if one.dense), key=medians.__getitem__)
    rows = []
    for one, own in zip(ways, times, strict=True):
        facts = {k: v for k, v in asdict(replace(one, work=_nothing)).items() if k in REPORTED}
        warm = back_to_back(one.work, s) if made.few_rows else None
        rows.append({**facts, **spread_of(own, times[dense]), "warm": warm})
    return rows


def _nothing() -> None:
    """Stand in for work that is not reported: tensors would be copied with it."""


REPORTED = (
    "method", "error", "rounding", "kept", "bytes", "saved", "limit", "note", "dense", "ours",
)  # fmt: skip


def reached(goal: Goal, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The goal beside what was measured; None where its method didn't run."""
    by_name = {row["method"]: row for row in rows}
    own, other = by_name.get(goal.method), by_name.get(goal.against)
    if goal.against == "dense":
        other = min((r for r in rows if r["dense"]), key=lambda r: r["median"])
    if own is None or other is None:
        return None
    if goal.at_most is not None:
        found, met = own["median"], own["median"] <= goal.at_most
    else:
        found = other["median"] / own["median"]
        met = found >= goal.least
    return {**asdict(goal), "found": found, "met": met}


def told(goal: dict[str, Any]) -> str:
    verdict = "met" if goal["met"] else "MISSED"
    if goal["at_most"] is not None:
        return f"{goal['method']}: {goal['found']:.3f} ms, goal {goal['at_most']:g} ms: {verdict}"
    times = f"{goal['found']:.2f} x {goal['against']}"
    return f"{goal['method']}: {times}, goal {goal['least']:g}: {verdict}"


def clocks(s: Setting) -> str | None:
    """SM clock, memory clock, power, its limit and temperature; None without nvidia-smi."""
    if s.device == "cpu":
        return None
    asked = "clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.splitlines()[0].strip()


# --- one row


def run_row(name: str, cases: Sequence[Case], s: Setting) -> dict[str, Any]:
    """Cases in order until the time is spent; a case starts if the last one's time is left."""
    end, last = time.perf_counter() + s.seconds, 0.0
    blocks: list[dict[str, Any]] = []
    left_out: list[str] = []
    for case in cases:
        before = time.perf_counter()
        if blocks and before + last > end:
            left_out.append(case.name)
            continue
        print(f"{name}: {case.name} ...", file=sys.stderr)
        blocks.append(_tried(case, s))
        last = time.perf_counter() - before
    return {"row": name, "cases": blocks, "left_out": left_out, "replaced": replaced(s)}


def _tried(case: Case, s: Setting) -> dict[str, Any]:
    """What torch, a library or the device refuses ends a case, not the row, which then fails."""
    try:
        return _measured(case, s)
    except RuntimeError as error:
        reason = f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return {"case": case.name, "rows": [], "goals": [], "notes": [reason], "clocks": None}


def _measured(case: Case, s: Setting) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.compiler.reset()
    made = case.build(s)
    rows = timed_field(made, s)
    after = clocks(s)  # right after the work, while the clock still shows its load
    goals = [one for goal in made.goals if (one := reached(goal, rows)) is not None]
    return {"case": case.name, "rows": rows, "goals": goals, "notes": made.notes, "clocks": after}


def replaced(s: Setting) -> list[str]:
    """What a dry run has something else for."""
    if not s.dry:
        return []
    return [
        "sizes are tiny, and times say nothing",
        "kernels: the references of their ops, on the CPU",
        "cuSPARSELt and torch's tile: torch operators",
        "Inductor: aot_eager; CUDA graphs, L2 flush, clocks: left out",
    ]


# --- what comes out

HEADINGS = [
    "method", "ms", "p20-p80", "x dense", "limit", "error", "rounding", "kept", "GB/s", "saved MB",
    "warm ms",
]  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    def text(key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    rate = "" if row["bytes"] is None else f"{row['bytes'] / row['median'] / 1e6:.0f}"
    saved = "" if row["saved"] is None else f"{row['saved'] / 1e6:.0f}"
    name = row["method"] + (f" ({row['note']})" if row["note"] else "")
    spread = f"{row['p20']:.3f}-{row['p80']:.3f}"
    kept = "" if row["kept"] is None else f"{row['kept']:.1%}"
    return [
        name, f"{row['median']:.3f}", spread, factor(row["speedup"]), text("limit", ".2f"),
        text("error", ".2e"), text("rounding", ".1e"), kept, rate, saved, text("warm", ".3f"),
    ]  # fmt: skip


def tell(found: dict[str, Any], facts: dict[str, Any]) -> None:
    for block in found["cases"]:
        title = f"{found['row']}: {block['case']}"
        caption = f"{facts['device']}, torch {facts['torch']}; <: slower than dense"
        show(title, caption, HEADINGS, [[cells(row) for row in block["rows"]]])
        for line in [told(goal) for goal in block["goals"]] + block["notes"]:
            print(f"  {line}")
        if block["clocks"]:
            print(f"  SM clock, memory clock, power, limit, temperature: {block['clocks']}")
    if found["left_out"]:
        print(f"left out, the time was spent: {', '.join(found['left_out'])}")
    for line in found["replaced"]:
        print(f"dry run: {line}")


def arguments(argv: Sequence[str] | None, rows: Sequence[str], about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("row", choices=rows)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=60, help="cases start until then")
    parser.add_argument("--quick", action="store_true", help="half the cases, half the rounds")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU, two rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(argv)


def main(rows: dict[str, Cases], about: str, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure one row, print it, and write it where a path was given.

    Raises:
        SystemExit: no CUDA device, a contestant of ours computes something else, or a case failed;
            what was measured until then is printed and written in the last case.
    """
    args = arguments(argv, list(rows), about)
    if args.device == "cpu" and not args.dry_run:
        raise SystemExit(f"{args.row} is for a CUDA device; on a CPU only --dry-run makes sense")
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit(f"{args.row} needs a CUDA device, and torch sees none")
    s = Setting(
        "cpu" if args.dry_run else args.device, args.dry_run, args.quick, args.seconds,
        2 if args.dry_run else 10 if args.quick else 20,
    )  # fmt: skip
    cases = rows[args.row](s)
    kept = cases[: (len(cases) + 1) // 2] if s.quick else cases
    facts = {**machine(s.device), "rounds": s.rounds, **versions(s)}
    found = run_row(args.row, kept, s)
    found["left_out"] += [f"{case.name} (--quick)" for case in cases[len(kept) :]]
    tell(found, facts)
    write(args.json, {**facts, **found})
    if failed := [block["case"] for block in found["cases"] if not block["rows"]]:
        raise SystemExit(f"{args.row}: failed: {'; '.join(failed)}")
    return found


def versions(s: Setting) -> dict[str, Any]:
    """Of what a device's numbers depend on."""
    if s.device == "cpu":
        return {"dry_run": s.dry}
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "dry_run": s.dry,
        "cuda": torch.version.cuda,
        "triton": triton,
        "cusparselt": torch.backends.cusparselt.version(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
    }
