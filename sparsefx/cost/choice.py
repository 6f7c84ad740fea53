"""Whether sparse is worth it: predicted times of what a pattern becomes, beside full products."""

from __future__ import annotations

from collections.abc import Sequence

from sparsefx import compat
from sparsefx.config import NM, Masked, Pattern, Sampled
from sparsefx.cost.algebra import number
from sparsefx.cost.breakeven import break_even
from sparsefx.cost.calibrated import pace_of
from sparsefx.cost.expressions import sizes_of
from sparsefx.cost.kept import FEWEST_ROWS, kept_work, reads_kept
from sparsefx.cost.paces import MARGIN
from sparsefx.cost.products import executes_dense
from sparsefx.cost.vendor import vendor_serves
from sparsefx.cost.work import (
    Work,
    dense_work,
    masked_work,
    packed_work,
    sampled_works,
    total,
)
from sparsefx.plan import Site


def known(*sites: Site) -> bool:
    """Whether every size has a number, its own or the example's."""
    return all(compat.has_size(size) for site in sites for size in sizes_of(site))


def predicted_dense(*sites: Site) -> float | None:
    """Microseconds that full products are expected to take; None where a size is not known."""
    return _time(sites[0], total(map(dense_work, sites))) if known(*sites) else None


def predicted(site: Site, pattern: Pattern, op: str, sampled: Site | None = None) -> float | None:
    """Microseconds that a sparse product is expected to take.

    Args:
        site: the product.
        pattern: what it becomes.
        op: the op that serves it, which says how: packed, with a masked weight, or sampled; the
            kernel's name where it reads what is kept.
        sampled: the layer's forward, where the product is derived from it and uses its sample.

    Returns:
        None where a size is not known.
    """
    if not known(site, *([] if sampled is None else [sampled])):
        return None
    if isinstance(pattern, Sampled):
        chain = [site] if sampled is None else [sampled, site]
        return _time(site, sampled_works(chain, pattern)[-1])
    if op == "C++ masked_mm":
        return _time(site, kept_work(site, pattern))
    if isinstance(pattern, NM) and "packed" in op:
        return _time(site, packed_work(site, pattern))
    return _time(site, masked_work(site) if executes_dense(op) else dense_work(site))


def _time(site: Site, work: Work) -> float:
    return float(pace_of(site.kind, site.device, site.dtype).time(work))


def unprofitable(sites: Sequence[Site], pattern: Pattern, packed: bool = False) -> str:
    """Reason to leave products dense on this machine, or "".

    N:M and stored masks run as a masked dense product, so they gain nothing; but for weights that
    are packed once, times few rows, and for transposable 2:4 times many rows on a GPU for
    which there is a vendor's library. Sampled products have to take less time than the full ones,
    scores, choice, gathers and zeros included.

    Args:
        sites: a product and those derived from it, which are worth what their sum is worth.
        pattern: what they become.
        packed: whether weights of graphs without a backward are packed when they are compiled.
    """
    device = sites[0].device
    if isinstance(pattern, NM) and packed and _streams(sites[0], pattern):
        return _slower(sites, _time(sites[0], packed_work(sites[0], pattern)), "packed")
    if isinstance(pattern, NM) and known(*sites) and vendor_serves(sites[0], pattern):
        return ""  # others measured it, see cost/vendor.py
    if isinstance(pattern, NM | Masked) and all(_compresses(site, pattern) for site in sites):
        return _compressed(sites, pattern)
    if isinstance(pattern, NM | Masked):
        name = "N:M" if isinstance(pattern, NM) else "a stored mask"
        return f"not profitable: {name} runs as a masked dense product on {device}"
    if not isinstance(pattern, Sampled):
        return ""
    if not known(*sites):
        return "not profitable: its sizes depend on data"
    times = _slower(sites, _time(sites[0], total(sampled_works(sites, pattern))), "sampled")
    found = break_even(sites, pattern) if times else None
    if not times or found is None:
        return times
    return times.replace("not profitable: ", f"not profitable at {found.at}: {found} (") + ")"


def _compresses(site: Site, pattern: Pattern) -> bool:
    measured = site.device == "cpu"
    return measured and reads_kept(site, pattern) and number(site.shape[0]) >= FEWEST_ROWS


def _compressed(sites: Sequence[Site], pattern: NM | Masked) -> str:
    if isinstance(pattern, NM) and pattern.transposable:
        return "not profitable: its transposable mask is searched for at every step"
    return _slower(sites, _time(sites[0], total(kept_work(s, pattern) for s in sites)), "masked")


_FEW_ROWS = {  # beyond them a packed weight is no longer read at memory speed, or is unpacked
    ("cpu", "float32"): 8,
    ("cpu", "bfloat16"): 8,
    ("cuda", "float16"): 64,
    ("cuda", "bfloat16"): 64,
}
_LARGE = 2**20  # weights; smaller ones are in caches, where reading less gains nothing


def _streams(site: Site, pattern: NM) -> bool:
    """Whether a packed weight is read once, from memory: all that its kernel is counted on for."""
    if site.kind != "mm" or site.has_backward or not known(site):
        return False
    rows, outputs, inputs = map(number, site.shape)
    if site.device == "cuda" and (pattern.m > 4 or 2 * pattern.n > pattern.m):
        return False  # by their instructions: not measured
    most = _FEW_ROWS.get((site.device, site.dtype), 0)
    return bool(rows <= most and outputs * inputs >= _LARGE)


def _slower(sites: Sequence[Site], sparse: float, how: str) -> str:
    """Both times, where the sparse one is not the lower one."""
    dense = _time(sites[0], total(map(dense_work, sites)))
    if sparse <= MARGIN * dense:
        return ""
    times = f"{told(sparse)} {how}, {told(dense)} dense on {sites[0].device}"
    return f"not profitable: {_products(sites)}: {times}"


def _products(sites: Sequence[Site]) -> str:
    return "all three" if len(sites) == 3 else " + ".join(site.role for site in sites)


def told(microseconds: float) -> str:
    """Write a time in three digits and its unit."""
    if microseconds < 1000:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1000:.3g} ms"
