"""What a case on a CUDA device is made of: a setting, contestants, goals, values, peers.

gpu.py runs cases. Peers that this machine lacks are named, those that refuse a shape too, and a
dry run has torch operators in the place of vendor libraries.
"""

import importlib.util
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves it out

from timing import Work, race

FEW_ROWS = (
    64  # up to here a product is bound by its weight: host time and a warm cache are told too
)
SEEN = 128  # rows of a result that are compared with float64


@dataclass(frozen=True)
class Setting:
    """What a row was asked for."""

    device: str
    dry: bool = False
    quick: bool = False
    seconds: float = 60.0
    rounds: int = 20

    @property
    def codegen(self) -> str:
        return "aot_eager" if self.dry else "inductor"

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def compile(self, call: Any, tune: bool = False) -> Any:
        """Dense torch.compile; ``tune`` lets it search among kernels."""
        mode = "max-autotune-no-cudagraphs" if tune and not self.dry else None
        return torch.compile(call, backend=self.codegen, dynamic=False, mode=mode)


@dataclass
class Contestant:
    """One way to the result; ``error`` is against float64 of the dense meaning."""

    method: str
    work: Work
    error: float | None = None  # what the sparsity costs: |y - dense in float64| / |dense|
    rounding: float | None = None  # what the kernel costs: against its own float64 twin
    kept: float | None = None  # share of |w|, or of the scores, that takes part
    bytes: int | None = None  # read and written at least
    saved: int | None = None  # bytes that a forward keeps for the backward, weights apart
    limit: float | None = None  # x dense that nothing on this path can pass
    ours: bool = False
    dense: bool = False  # the fastest of these is what "x dense" is against
    graph: bool = False  # may be captured in a CUDA graph
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """``method`` is at least ``least`` times as fast as ``against``, or takes ``at_most`` ms."""

    method: str
    least: float = 0.0
    against: str = "dense"  # a method's name, or the fastest dense one
    at_most: float | None = None


@dataclass
class Field:
    """The contestants of one case, and what is wanted of them."""

    contestants: list[Contestant]
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # peers that aren't there, and why
    few_rows: bool = False


@dataclass(frozen=True)
class Case:
    """A shape by name, and what builds its contestants."""

    name: str
    build: Callable[[Setting], Field]


Cases = Callable[[Setting], list[Case]]


# --- values


def off(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64."""
    wide = expected.double()
    return float((found.detach().double() - wide).norm() / wide.norm())


def product64(x: Tensor, w: Tensor) -> Tensor:
    """The first rows of x @ w.T in float64."""
    return x[:SEEN].detach().double() @ w.detach().double().t()


def judged(
    one: Contestant, found: Tensor, twin: Tensor, dense: Tensor, terms: int, notes: list[str]
) -> bool:
    """Fill in both errors; False, with a note, for a peer that is wrong.

    Raises:
        SystemExit: one of ours is wrong; nothing is timed then.
    """
    one.error, one.rounding = off(found[:SEEN], dense), off(found[:SEEN], twin)
    # a few roundings of the result's type; sums of ``terms`` in another order come on top
    bound = 2 * torch.finfo(found.dtype).eps + 4 * torch.finfo(torch.float32).eps * terms**0.5
    if one.rounding <= bound:
        return True
    said = f"{one.method}: off by {one.rounding:.2e} (allowed: {bound:.2e}) from float64"
    if one.ours:
        raise SystemExit(f"{said}; nothing is timed")
    notes.append(f"{said}, so it is not timed")
    return False


def tried(one: Contestant, call: Callable[[], Any], notes: list[str]) -> Any:
    """What a call returns; None, with a note, where a library refuses. Ours may raise."""
    try:
        return call()
    except RuntimeError as error:
        if one.ours or one.dense:
            raise
        notes.append(f"{one.method}: refused: {str(error).strip().splitlines()[0]}")
        return None


# --- peers that may be missing


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing(*packages: str) -> list[str]:
    return [f"{name}: not installed" for name in packages if not installed(name)]


@dataclass(frozen=True)
class Vendor:
    """cuSPARSELt through torch's private operators, or plain torch in their place."""

    compress: Callable[[Tensor], Tensor]
    mm: Callable[[Tensor, Tensor, int], Tensor]  # packed w [N, K], x [M, K], algorithm -> [M, N]
    algorithms: int


def vendor(s: Setting) -> Vendor | None:
    """None, where this torch comes without cuSPARSELt."""
    if s.dry:
        return Vendor(Tensor.clone, lambda packed, x, _: x @ packed.t(), 2)
    if not torch.backends.cusparselt.is_available():
        return None

    def mm(packed: Tensor, x: Tensor, algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(packed, x.t(), transpose_result=True, alg_id=algorithm)

    return Vendor(torch._cslt_compress, mm, (torch.backends.cusparselt.get_max_alg_id() or 39) + 1)


def best_algorithm(lib: Vendor, packed: Tensor, x: Tensor, twin: Tensor) -> tuple[int, int]:
    """The fastest algorithm whose values are right, and how many were wrong or refused."""
    bound = 8 * torch.finfo(x.dtype).eps
    found, refused = [], 0
    for algorithm in range(lib.algorithms):
        try:
            right = off(lib.mm(packed, x, algorithm)[:SEEN], twin) <= bound
        except RuntimeError:  # not every algorithm takes every shape
            right = False
        if right:
            spent = race([lambda a=algorithm: lib.mm(packed, x, a)], 5, x.is_cuda)[0]
            found.append((statistics.median(spent), algorithm))
        refused += not right
    return min(found, default=(0.0, 0))[1], refused
