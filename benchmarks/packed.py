"""Products with packed N:M weights on CPU: nm_packed_mm beside dense torch and torch's CSR.

    python benchmarks/packed.py [--cases N ...] [--rounds 30] [--json PATH]

A single row of x is bound by the bytes of the weight, a batch of 512 by multiplications. Weights
are packed, compiled and turned into CSR before the clock starts. The contestants of a case run in
turns in one process; values are checked before timing. "x best" is against the fastest dense one.
A batch whose mask keeps a quarter or less is also multiplied by masked_mm, forward and grad_input,
which compresses the weight within the time that is told, as a training step has to.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import sparsefx as sfx
from sparsefx import kernels, ops

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from timing import factor, machine, race, show, spread_of, where, write


@dataclass(frozen=True)
class Case:
    """x[batch, depth] times a weight [rows, depth] of which n of every m are kept."""

    batch: int
    rows: int
    depth: int
    n: int
    m: int
    dtype: str = "float32"
    role: str = "forward"  # or grad_input: x[batch, rows] times the weight as it is

    def __str__(self) -> str:
        role = "" if self.role == "forward" else f" {self.role}"
        return f"{self.batch}x{self.rows}x{self.depth} {self.dtype} {self.n}:{self.m}{role}"


SINGLE = [
    Case(1, rows, depth, n, 4, dtype)
    for rows, depth in ((4096, 4096), (28672, 8192))
    for dtype in ("float32", "bfloat16")
    for n in (2, 1)
]
BATCHES = [
    Case(512, size, size, n, m)
    for size in (2048, 4096)
    for n, m in ((2, 4), (1, 4), (1, 8), (1, 16))
]
GRADIENTS = [replace(case, role="grad_input") for case in BATCHES if case.n / case.m <= 0.25]
CASES = [*SINGLE, *BATCHES, *GRADIENTS]
DENSE = ("dense, eager", "dense, torch.compile")
PACKED = "nm_packed_mm"


@dataclass(frozen=True)
class Row:
    """One contestant of one case; times in milliseconds."""

    case: str
    method: str
    median: float
    p20: float
    p80: float
    speedup: float  # median over the rounds of the best dense contestant's time / own
    bytes: int  # of the weight as it is stored


Product = Callable[[], Tensor]


@dataclass
class Contestant:
    method: str
    product: Product
    bytes: int


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def in_rows(w: Tensor) -> Tensor:
    """CSR with the indices that the library takes, without the warnings of a beta."""
    with warnings.catch_warnings(), torch.sparse.check_sparse_tensor_invariants(enable=False):
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        found = w.to_sparse_csr()
        starts, columns = found.crow_indices().int(), found.col_indices().int()
        return torch.sparse_csr_tensor(starts, columns, found.values(), found.shape)


def contestants(case: Case, x: Tensor, w: Tensor, codegen: str) -> list[Contestant]:
    """Dense twice, packed, CSR where torch multiplies its type, masked where little is kept."""
    mask = sfx.masks.nm_mask(w, case.n, case.m)
    kept = torch.where(mask, w, 0)
    compiled = torch.compile(linear, backend=codegen, dynamic=False)
    if case.role == "grad_input":
        dense = [partial(product, x, kept.t()) for product in (linear, compiled)]
        found = [Contestant(*pair, size_of(kept)) for pair in zip(DENSE, dense, strict=True)]
        return [*found, *masked(x, w.t(), mask.t())]
    values, codes = ops.nm_pack(w, case.n, case.m)
    arguments = (x, values, codes, None, case.n, case.m)
    found = [
        Contestant(DENSE[0], partial(linear, x, kept), size_of(kept)),
        Contestant(DENSE[1], partial(compiled, x, kept), size_of(kept)),
        Contestant(PACKED, partial(ops.nm_packed_mm, *arguments), size_of(values, codes)),
    ]
    if w.dtype is torch.float32:  # others are multiplied without the library, many times slower
        csr = in_rows(kept)
        parts = size_of(csr.crow_indices(), csr.col_indices(), csr.values())
        found.append(Contestant("torch CSR", lambda: (csr @ x.t()).t(), parts))
        if case.batch > 1 and case.n / case.m <= 0.25:
            found += masked(x, w, mask)
    return found


def masked(x: Tensor, w: Tensor, mask: Tensor) -> list[Contestant]:
    """Products with a weight [rows, depth] that is masked or turned into CSR at every call."""
    ours = partial(ops.masked_mm, x, w.t(), mask.t(), None)
    return [
        Contestant("masked_mm, compressing", ours, size_of(w, mask)),
        Contestant(
            "torch CSR, made anew",
            lambda: (in_rows(torch.where(mask, w, 0)) @ x.t()).t(),
            size_of(w, mask),
        ),
    ]


def check(case: Case, field: Sequence[Contestant], x: Tensor) -> None:
    """Compare all with eager dense.

    Raises:
        SystemExit: a contestant computes something else; nothing is timed then.
    """
    expected = field[0].product().double()
    bound = 4 * torch.finfo(x.dtype).eps * case.depth**0.5
    for contestant in field[1:]:
        off = float((contestant.product().double() - expected).norm() / expected.norm())
        if not off <= bound:
            raise SystemExit(
                f"{contestant.method}, {case}: off by {off:.2e} (allowed: {bound:.2e}) from dense"
            )


def measure(case: Case, rounds: int, codegen: str) -> list[Row]:
    torch.manual_seed(case.depth)
    torch.compiler.reset()
    dtype = getattr(torch, case.dtype)
    w = torch.randn(case.rows, case.depth, dtype=dtype)
    x = torch.randn(case.batch, case.depth if case.role == "forward" else case.rows, dtype=dtype)
    with torch.inference_mode():
        field = contestants(case, x, w, codegen)
        check(case, field, x)
        times = race([one.product for one in field], rounds)
    dense = range(len(DENSE))
    best = min(dense, key=lambda i: statistics.median(times[i]))
    return [
        Row(str(case), one.method, **spread_of(own, times[best]), bytes=one.bytes)
        for one, own in zip(field, times, strict=True)
    ]


# --- what comes out

HEADINGS = ["case", "method", "ms", "p20-p80", "x best dense", "weight MB", "GB/s"]


def cells(row: Row) -> list[str]:
    return [
        row.case,
        row.method,
        f"{row.median:.3f}",
        f"{row.p20:.3f}-{row.p80:.3f}",
        factor(row.speedup),
        f"{row.bytes / 1e6:.1f}",
        f"{row.bytes / row.median / 1e6:.1f}",
    ]


def table(blocks: Sequence[Sequence[Row]], facts: dict[str, Any]) -> None:
    """Print all rows, a line between cases."""
    caption = f"{where(facts)}, median of {facts['rounds']}; <: slower than the best dense"
    lines = [[cells(row) for row in block] for block in blocks]
    show("packed N:M products, batch x rows x depth", caption, HEADINGS, lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, nargs="+", help="places in CASES; default: all")
    parser.add_argument("--rounds", type=int, default=30, help="timed repetitions, at least 2")
    parser.add_argument("--codegen", choices=("inductor", "aot_eager"), default="inductor")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: at least 2 are needed for quantiles")
    if args.cases and not all(0 <= case < len(CASES) for case in args.cases):
        parser.error(f"--cases {args.cases}: there are cases 0 .. {len(CASES) - 1}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Measure, print, and write what was asked for."""
    args = arguments(argv)
    kernels.register()
    facts = {**machine("cpu"), "rounds": args.rounds, "codegen": args.codegen}
    blocks = []
    for index in args.cases or range(len(CASES)):
        print(f"{CASES[index]} ...", file=sys.stderr)
        blocks.append(measure(CASES[index], args.rounds, args.codegen))
    table(blocks, facts)
    rows = [row for block in blocks for row in block]
    write(args.json, {**facts, "rows": [asdict(row) for row in rows]})
    return rows


if __name__ == "__main__":
    main()
