"""One row of the benchmarks by name, after the tests of what it times.

    python benchmarks/run.py                        list the rows, and what each needs
    python benchmarks/run.py cpu_crs [--device cpu] [-- arguments of the row's script]
    python benchmarks/run.py all                    every row that this machine can run

A row whose tests fail is not timed. Numbers go to benchmarks/results/.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent


@dataclass(frozen=True)
class Row:
    """A script with arguments, what it times, and the tests that come first."""

    script: str
    arguments: tuple[str, ...]
    tests: tuple[str, ...]
    result: str  # file under results/
    device: str = "cpu"
    about: str = ""


SAMPLED = ("tests/ops/test_pairs.py", "tests/kernels/test_moves.py")
ROWS = {
    "cpu_crs": Row(
        "linear.py", ("--roofline",), SAMPLED, "linear-cpu.json",
        about="linear layers, sampled, forward + backward, with the limit",
    ),
    "cpu_crs_conv": Row(
        "conv.py", (), ("tests/ops/test_sampled.py",), "conv-cpu.json",
        about="convolutions, sampled, forward + backward",
    ),
    "cpu_nm_gemv": Row(
        "packed.py", (), ("tests/ops/test_packed.py", "tests/kernels/test_nm_packed.py"),
        "packed-cpu.json", about="packed N:M weights, one row and batches of 512",
    ),
    "cpu_steps": Row(
        "models.py", (), ("tests/backend/test_modes.py",), "models-cpu.json",
        about="whole training steps, GPT-ish and ResNet-ish",
    ),
    "tmask_nm": Row(
        "masks.py", (), ("tests/masks/test_transposable.py",), "masks-cpu.json",
        about="solvers of transposable masks, quality and time",
    ),
    "memory": Row(
        "memory.py", (), ("tests/models/test_estimators.py",), "memory-cpu.json",
        about="saved bytes, peak, largest batch",
    ),
    "profit": Row(
        "profit.py", (), ("tests/test_cost.py",), "profit-cpu.json",
        about='what select="profitable" keeps and declines, timed',
    ),
    "compile_cost": Row(
        "overhead.py", (), (), "overhead-cpu.json",
        about="compile time, passes, host time, recompiles",
    ),
    "crs_fwd": Row(
        "linear.py", ("--device", "cuda"), ("tests/kernels/test_sampled_mm.py",),
        "linear-cuda.json", "cuda", "linear layers, sampled; masked_gemm in the same run",
    ),
}  # fmt: skip


def runnable(row: Row) -> bool:
    return row.device == "cpu" or torch.cuda.is_available()


def run(name: str, extra: Sequence[str]) -> int:
    """Test, then time one row; the exit code."""
    row = ROWS[name]
    if row.tests:
        tests = [sys.executable, "-P", "-m", "pytest", "-q", *row.tests]
        if subprocess.run(tests, cwd=ROOT).returncode:
            print(f"{name}: tests of what it times fail, so nothing is timed", file=sys.stderr)
            return 1
    result = [] if "--json" in extra else ["--json", str(HERE / "results" / row.result)]
    command = [sys.executable, "-P", str(HERE / row.script), *row.arguments, *result, *extra]
    return subprocess.run(command, cwd=ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    """List rows, or run what was named."""
    parser = argparse.ArgumentParser(description="run a row of the benchmarks")
    parser.add_argument("row", nargs="?", choices=[*ROWS, "all"])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="of the rows that `all` takes")
    parser.add_argument("extra", nargs="*", help="after --: arguments of the row's script")
    args = parser.parse_args(argv)
    if args.row is None:
        for name, row in ROWS.items():
            note = "" if runnable(row) else "  (needs a CUDA device)"
            print(f"{name:14} {row.about}{note}")
        return 0
    if args.row != "all":
        if not runnable(ROWS[args.row]):
            print(f"{args.row} needs a CUDA device, and torch sees none", file=sys.stderr)
            return 2
        return run(args.row, args.extra)
    names = [n for n, r in ROWS.items() if runnable(r) and args.device in (None, r.device)]
    return max([run(name, []) for name in names], default=0)


if __name__ == "__main__":
    raise SystemExit(main())
