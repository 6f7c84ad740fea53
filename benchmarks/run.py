"""Rows of the benchmarks by name, after the tests of what they time.

    python benchmarks/run.py                            list the rows, and what each needs
    python benchmarks/run.py cpu_crs [-- arguments of the row's script]
    python benchmarks/run.py tmask_nm --device cuda     a row that is there for both
    python benchmarks/run.py all [--device cuda] [--seconds 500] [--quick]

A row whose tests fail is not timed. Numbers go to benchmarks/results/. With ``--seconds`` the rows
for CUDA share that time: each stops at its share and says what it left out. ``--dry-run`` takes the
CUDA rows through every step on the CPU, with tiny sizes, and writes nothing.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent
SECONDS = 540.0  # for all rows of a CUDA device
START = 8.0  # seconds of a row before its first case: Python, torch, the device


@dataclass(frozen=True)
class Row:
    """A script with arguments, what it times, and the tests that come first."""

    script: str
    arguments: tuple[str, ...]
    tests: tuple[str, ...]
    result: str  # file under results/
    device: str = "cpu"
    about: str = ""
    share: float = 0.0  # of the time for all rows of a CUDA device; 0: only by its name


def on_device(name: str, script: str, tests: Sequence[str], share: float, about: str) -> Row:
    result = f"{name.replace('_', '-')}-cuda.json"
    return Row(script, (name,), tuple(tests), result, "cuda", about, share)


SAMPLED = ("tests/ops/test_pairs.py", "tests/kernels/test_moves.py")
MASKED, GATHERED = ("tests/kernels/test_nm_mm.py",), ("tests/kernels/test_sampled_mm.py",)
PACKED = ("tests/ops/test_packed.py", "tests/kernels/test_nm_packed.py")
DECODE = ("tests/kernels/test_nm_packed_triton.py",)
MASKS = ("tests/kernels/test_transposable_mask.py",)
VENDOR = ("tests/kernels/test_vendor_24.py", *MASKS)
ROWS: dict[str, tuple[Row, ...]] = {
    "cpu_crs": (Row(
        "linear.py", ("--roofline",), SAMPLED, "linear-cpu.json",
        about="linear layers, sampled, forward + backward, with the limit",
    ),),
    "cpu_crs_conv": (Row(
        "conv.py", (), ("tests/ops/test_sampled.py",), "conv-cpu.json",
        about="convolutions, sampled, forward + backward",
    ),),
    "cpu_nm_gemv": (Row(
        "packed.py", (), PACKED, "packed-cpu.json",
        about="packed N:M weights, one row and batches of 512",
    ),),
    "cpu_steps": (Row(
        "models.py", (), ("tests/backend/test_modes.py",), "models-cpu.json",
        about="whole training steps, GPT-ish and ResNet-ish",
    ),),
    "memory": (Row(
        "memory.py", (), ("tests/models/test_estimators.py",), "memory-cpu.json",
        about="saved bytes, peak, largest batch",
    ),),
    "profit": (Row(
        "profit.py", (), ("tests/test_cost.py",), "profit-cpu.json",
        about='what select="profitable" keeps and declines, timed',
    ),),
    "compile_cost": (Row(
        "overhead.py", (), (), "overhead-cpu.json",
        about="compile time, passes, host time, recompiles",
    ),),
    "tmask_nm": (
        Row(
            "masks.py", (), ("tests/masks/test_transposable.py",), "masks-cpu.json",
            about="solvers of transposable masks",
        ),
        on_device("tmask_nm", "device_masks.py", MASKS, 0.08, "solvers of transposable masks"),
    ),
    "lin24_fwd": (on_device(
        "lin24_fwd", "lin24.py", VENDOR, 0.16, "2:4 linear layers beside cuSPARSELt alone",
    ),),
    "lin24_train": (on_device(
        "lin24_train", "lin24.py", VENDOR, 0.12, "2:4, forward + backward, a mask at each step",
    ),),
    "vit_block24": (on_device(
        "vit_block24", "block24.py", VENDOR, 0.10, "a transformer's block whose MLP is 2:4",
    ),),
    "mask_compress": (on_device(
        "mask_compress", "device_masks.py", MASKS, 0.05, "2:4 masks and packing beside clone",
    ),),
    "tmask_2_4_exact": (on_device(
        "tmask_2_4_exact", "device_masks.py", MASKS, 0.05, "exact transposable 2:4 masks",
    ),),
    "crs_fwd": (on_device(
        "crs_fwd", "device_sampled.py", GATHERED, 0.13, "a sampled forward beside by hand",
    ),),
    "crs_wgrad_train": (on_device(
        "crs_wgrad_train", "device_sampled.py", GATHERED, 0.10, "tokens of grad_weight sampled",
    ),),
    "gather_gemm": (on_device(
        "gather_gemm", "device_sampled.py", GATHERED, 0.06, "gathers inside or before a product",
    ),),
    "nm_decode": (on_device(
        "nm_decode", "device_nm.py", DECODE, 0.11, "packed N:M weights, 1 to 64 rows",
    ),),
    "masked_gemm": (on_device(
        "masked_gemm", "device_nm.py", MASKED, 0.07, "the N:M mask made inside the product",
    ),),
    "crs_layers": (Row(
        "linear.py", ("--device", "cuda"), GATHERED, "linear-cuda.json", "cuda",
        "what cpu_crs times, all sizes: 10 minutes and more",
    ),),
}  # fmt: skip
LATER = {"compact_conv": "pruned convolutions made compact: not there yet"}


def runnable(row: Row) -> bool:
    return row.device == "cpu" or torch.cuda.is_available()


def chosen(name: str, device: str | None) -> Row | None:
    """The row for a device, or the first one that this machine can run; None: there is none."""
    rows = [row for row in ROWS[name] if device in (None, row.device)]
    return next((row for row in rows if runnable(row)), rows[0] if rows else None)


@dataclass(frozen=True)
class Asked:
    """How rows are run."""

    extra: tuple[str, ...] = ()
    seconds: float = SECONDS
    quick: bool = False
    dry: bool = False
    tested: bool = False


def tests_pass(name: str, row: Row) -> bool:
    tests = [sys.executable, "-P", "-m", "pytest", "-q", *row.tests]
    if not row.tests or subprocess.run(tests, cwd=ROOT).returncode == 0:
        return True
    print(f"{name}: tests of what it times fail, so nothing is timed", file=sys.stderr)
    return False


def command(row: Row, asked: Asked) -> list[str]:
    """The script, with its share of the time where it keeps to one."""
    found = [sys.executable, "-P", str(HERE / row.script), *row.arguments]
    if "--json" not in asked.extra and not asked.dry:
        found += ["--json", str(HERE / "results" / row.result)]
    if row.share:
        found += ["--seconds", f"{seconds_of(row, asked):.0f}"]
        found += ["--dry-run"] if asked.dry else []
    found += ["--quick"] if asked.quick and row.share else []
    return [*found, *asked.extra]


def seconds_of(row: Row, asked: Asked) -> float:
    whole = sum(row.share for rows in ROWS.values() for row in rows)
    return max(5.0, asked.seconds * row.share / whole - START)


def run(name: str, row: Row, asked: Asked, end: float | None = None) -> int:
    """Test, then time one row; the exit code. A row that outstays ``end`` is stopped."""
    if not (asked.tested or asked.dry or tests_pass(name, row)):
        return 1
    limit = None if end is None else end - time.monotonic()
    if limit is not None and limit < START:
        print(f"{name}: left out, the time is spent", file=sys.stderr)
        return 1
    try:
        return subprocess.run(command(row, asked), cwd=ROOT, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        print(f"{name}: stopped, the time of all rows is spent", file=sys.stderr)
        return 1


def run_all(device: str | None, asked: Asked) -> int:
    """Every row that this machine can run; those of a CUDA device within their time."""
    end = time.monotonic() + asked.seconds
    codes = {}
    for name, row in ((name, row) for name, rows in ROWS.items() for row in rows):
        on_cuda = row.device == "cuda"
        if device not in (None, row.device) or (on_cuda and not row.share):
            continue
        if runnable(row) or (asked.dry and on_cuda):
            codes[name] = run(name, row, asked, end if on_cuda and device == "cuda" else None)
    if failed := [name for name, code in codes.items() if code]:
        print(f"rows that failed or were left out: {', '.join(failed)}", file=sys.stderr)
    return max(codes.values(), default=0)


def listed() -> None:
    for name, row in ((name, row) for name, rows in ROWS.items() for row in rows):
        note = "" if runnable(row) else "  (needs a CUDA device)"
        print(f"{name:16} {row.device:5} {row.about}{note}")
    for name, why in LATER.items():
        print(f"{name:16} left out: {why}")


def main(argv: Sequence[str] | None = None) -> int:
    """List rows, or run what was named."""
    parser = argparse.ArgumentParser(description="run a row of the benchmarks")
    parser.add_argument("row", nargs="?", choices=[*ROWS, "all"])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: what is there")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all CUDA rows together")
    parser.add_argument("--quick", action="store_true", help="half the cases of the CUDA rows")
    parser.add_argument("--dry-run", action="store_true", help="CUDA rows, tiny, on the CPU")
    parser.add_argument("--tested", action="store_true", help="the rows' tests have passed already")
    parser.add_argument("extra", nargs="*", help="after --: arguments of the row's script")
    args = parser.parse_args(argv)
    asked = Asked(tuple(args.extra), args.seconds, args.quick, args.dry_run, args.tested)
    if args.row is None:
        listed()
        return 0
    if args.row == "all":
        return run_all(args.device, asked)
    row = chosen(args.row, args.device)
    if row is None:
        print(f"{args.row} isn't there for {args.device}", file=sys.stderr)
        return 2
    if not runnable(row) and not asked.dry:
        print(f"{args.row} needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    return run(args.row, row, asked)


if __name__ == "__main__":
    raise SystemExit(main())
