"""Products that read what a mask keeps and nothing else: where one runs, and what it takes.

A CPU compresses the weight at every call, so this pays where little is kept: measured with
benchmarks/packed.py, see kernels/masked_mm/README.md. On CUDA the kernel leaves out empty tiles,
which there are hardly any of where much is kept; the same share is taken there, unmeasured.
"""

from __future__ import annotations

from sparsefx import compat
from sparsefx.config import NM, Masked, Pattern
from sparsefx.cost.algebra import number
from sparsefx.cost.expressions import sizes_of
from sparsefx.cost.products import dense_flops
from sparsefx.cost.work import Work, elements
from sparsefx.plan import Site

MOST_KEPT = 0.25  # share of the weights
FEWEST_WEIGHTS = 2**16  # below them a masked dense product takes as long
MOST_FUSED = 8  # m of a mask that Inductor ranks by pairs, which it fuses; beyond, by a table
FEWEST_ROWS = 64  # below them it is compressing that takes the time
_SLOWER = 2.0  # an operation on a kept weight than one of a dense product
# bytes that take as long as a weight that is looked at, by where it lies; one whose mask is made
_ALONG, _ACROSS, _MADE = 5, 17, 20
_LAID = 8  # an element of x that is laid out, of the result that is laid back: read and written


def kept_share(site: Site, pattern: Pattern) -> float | None:
    """Share of the weights that act; None where that is not known."""
    if isinstance(pattern, NM):
        return pattern.n / pattern.m
    return site.mask_density if isinstance(pattern, Masked) else None


def reads_kept(site: Site, pattern: Pattern, forced: str | None = None) -> bool:
    """Whether a masked product of this site runs as one that reads what is kept.

    Args:
        site: the product.
        pattern: what it becomes.
        forced: what the rule forces; "cpp" on a cpu and "triton" on CUDA ask neither for density
            nor for size.
    """
    here = site.kind == "mm" and (site.device == "cuda" or site.dtype == "float32")
    share = kept_share(site, pattern)
    if not here or forced == "reference" or not isinstance(pattern, NM | Masked):
        return False
    if (site.device, forced) in (("cpu", "cpp"), ("cuda", "triton")):
        return True
    if share is None or share > MOST_KEPT or not all(map(compat.has_size, sizes_of(site))):
        return False
    return bool(number(site.shape[1]) * number(site.shape[2]) >= FEWEST_WEIGHTS)


def kept_work(site: Site, pattern: Pattern) -> Work:
    """What such a product takes, its weight's mask and compression included."""
    share = kept_share(site, pattern)
    left, right, out = elements(site)
    looked = _ALONG if site.role == "forward" else _ACROSS
    made = _MADE if isinstance(pattern, NM) and site.role == "forward" else 0
    flops = _SLOWER * dense_flops(site) * (1.0 if share is None else share)
    return Work(flops, moved=(looked + made) * right + _LAID * (left + out), calls=1)
