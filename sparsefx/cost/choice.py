"""Whether sparse is worth it: predicted times of what a pattern becomes, beside full products."""

from __future__ import annotations

from collections.abc import Sequence

from sparsefx import compat
from sparsefx.config import NM, Masked, Pattern, Sampled
from sparsefx.cost.breakeven import break_even
from sparsefx.cost.calibrated import pace_of
from sparsefx.cost.expressions import sizes_of
from sparsefx.cost.paces import MARGIN
from sparsefx.cost.products import executes_dense
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
        op: the op that serves it, which says how: packed, with a masked weight, or sampled.
        sampled: the layer's forward, where the product is derived from it and uses its sample.

    Returns:
        None where a size is not known.
    """
    if not known(site, *([] if sampled is None else [sampled])):
        return None
    if isinstance(pattern, Sampled):
        chain = [site] if sampled is None else [sampled, site]
        return _time(site, sampled_works(chain, pattern)[-1])
    if isinstance(pattern, NM) and "packed" in op:
        return _time(site, packed_work(site, pattern))
    return _time(site, masked_work(site) if executes_dense(op) else dense_work(site))


def _time(site: Site, work: Work) -> float:
    return float(pace_of(site.kind, site.device, site.dtype).time(work))


def unprofitable(sites: Sequence[Site], pattern: Pattern) -> str:
    """Reason to leave products dense on this machine, or "".

    N:M and stored masks run as a masked dense product on every device so far, so they gain nothing.
    Sampled products have to take less time than the full ones, scores, choice, gathers and zeros
    included.

    Args:
        sites: a product and those derived from it, which are worth what their sum is worth.
        pattern: what they become.
    """
    device = sites[0].device
    if isinstance(pattern, NM | Masked):
        name = "N:M" if isinstance(pattern, NM) else "a stored mask"
        return f"not profitable: {name} runs as a masked dense product on {device}"
    if not isinstance(pattern, Sampled):
        return ""
    if not known(*sites):
        return "not profitable: its sizes depend on data"
    dense = _time(sites[0], total(map(dense_work, sites)))
    sparse = _time(sites[0], total(sampled_works(sites, pattern)))
    if sparse <= MARGIN * dense:
        return ""
    times = f"{_products(sites)}: {told(sparse)} sampled, {told(dense)} dense on {device}"
    found = break_even(sites, pattern)
    if found is None:
        return f"not profitable: expected {times}"
    return f"not profitable at {found.at}: {found} ({times})"


def _products(sites: Sequence[Site]) -> str:
    return "all three products" if len(sites) == 3 else " + ".join(site.role for site in sites)


def told(microseconds: float) -> str:
    """Write a time in three digits and its unit."""
    if microseconds < 1000:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1000:.3g} ms"
