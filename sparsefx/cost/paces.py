"""Microseconds of work, by kind of product, device and dtype: one table, which files correct."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sparsefx.cost.algebra import Amount
from sparsefx.cost.work import Work


@dataclass(frozen=True)
class Pace:
    """Microseconds: of 1e6 operations in float32, of 1e6 bytes, of a score that is sorted, a call.

    What decides is how they relate, which differs less between machines than they do.
    """

    flops: float
    moved: float
    ranked: float
    calls: float

    def time(self, work: Work) -> Amount:
        """Microseconds of some work: a number, or an expression where the work is one."""
        bulk = (self.flops * work.flops + self.moved * work.moved) / 1e6
        return bulk + self.ranked * work.ranked + self.calls * work.calls

    def to_dict(self) -> dict[str, float]:
        """Return plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# On "cpu" fitted to benchmarks/results/profit-cpu.json (2 threads of an AMD EPYC with AVX-512,
# torch 2.13, Inductor) by `python benchmarks/profit.py --fit benchmarks/results/profit-cpu.json`.
# Its 168 cases are 24 layers, 7 ways to sample each. With the margin below none is kept that was
# slower than 0.98x of dense, and 106 of the 115 are that were faster than 1.02x. The ranking, which
# that sweep can't tell from nothing, is set. On "cuda" reasoned from an H200's peaks, not measured.
PACES = {
    ("mm", "cpu"): Pace(5.31, 43.7, 0.01, 10.1),
    ("conv", "cpu"): Pace(5.23, 71.0, 0.01, 9.60),
    ("mm", "cuda"): Pace(0.00127, 0.23, 0.0001, 5.0),
    ("conv", "cuda"): Pace(0.00127, 0.23, 0.0001, 5.0),
}
MARGIN = 0.95  # of the dense time: what a fit is off by
