"""What a product costs: floating-point operations and bytes, and whether sparse is worth it.

Where a size is symbolic, the figure is that of the example that was compiled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sparsefx import compat
from sparsefx.config import NM, Masked, Pattern, Sampled
from sparsefx.plan import Site
from sparsefx.policy import sampled_depth

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dense_flops(site: Site) -> int:
    """2 * M * N * K, for each product of a batch."""
    return 2 * math.prod(map(compat.size_hint, (site.batch, *site.shape)))


def sparse_flops(site: Site, pattern: Pattern, sampled: Site | None = None) -> int:
    """Operations that the pattern leaves: what arithmetic on kept values alone would cost.

    Args:
        site: the product.
        pattern: what it becomes.
        sampled: the layer's forward, where the product is derived from it and uses its sample.
    """
    full = dense_flops(site)
    if isinstance(pattern, NM):
        return full * pattern.n // pattern.m
    if isinstance(pattern, Sampled):
        depth = compat.size_hint(sampled_depth(sampled or site))
        return full * pattern.size(depth) // depth if depth else full
    if isinstance(pattern, Masked) and site.mask_density is not None:
        return round(full * site.mask_density)
    return full


def packed_weight_bytes(site: Site, pattern: Pattern) -> int:
    """Bytes of the weight if only kept values and their indices were stored.

    A stored mask counts one bit a weight.
    """
    values = site.shape[1] * site.shape[2] * _BYTES.get(site.dtype, 4)
    if isinstance(pattern, Masked) and site.mask_density is not None:
        return int(values * site.mask_density) + int(site.shape[1] * site.shape[2]) // 8
    if not isinstance(pattern, NM):
        return int(values)
    count = site.shape[1] * site.shape[2] * pattern.n // pattern.m
    index_bits = math.ceil(math.log2(pattern.m))
    return int(count * _BYTES.get(site.dtype, 4) + count * index_bits // 8)


def executes_dense(op: str) -> bool:
    """Whether an op runs the full product with a masked operand: right, but no faster."""
    return op.startswith(("masked_", "nm_"))


# --- what products take, in time


class Work(NamedTuple):
    """What is done to compute products; adds up."""

    flops: float = 0.0  # of products of matrices
    conv_flops: float = 0.0
    moved: float = 0.0  # bytes that are read or written, by products and around them
    ranked: float = 0.0  # scores that are sorted
    calls: float = 0.0

    def plus(self, other: Work) -> Work:
        """Return the sum."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Pace:
    """Microseconds: of 1e6 operations in float32, of 1e6 bytes, of a score that is sorted, a call.

    On "cpu" estimated for 2 cores with AVX-512 (``benchmarks/profit.py --fit`` fits them); what
    decides is how they relate, which differs less between machines. On "cuda" reasoned from an
    H200's peaks.
    """

    flops: float
    conv_flops: float
    moved: float
    ranked: float
    calls: float

    def time(self, work: Work) -> float:
        """Microseconds of some work."""
        each = (self.flops, self.conv_flops, self.moved)
        parts = (work.flops, work.conv_flops, work.moved)
        bulk = sum(pace * amount for pace, amount in zip(each, parts, strict=True)) / 1e6
        return bulk + self.ranked * work.ranked + self.calls * work.calls


PACES = {
    "cpu": Pace(5.6, 7.0, 60.0, 0.05, 10.0),
    "cuda": Pace(0.00127, 0.00127, 0.23, 0.0001, 5.0),
}
_SLOWER = {"float64": 2.0}  # than float32, each operation; 16-bit types are taken to be as fast
_MARGIN = 0.95  # of the dense time: what a fit is off by


def dense_work(site: Site) -> Work:
    """What the full product takes."""
    return _product(site, dense_flops(site), *_elements(site))


def sampled_work(sites: Sequence[Site], pattern: Sampled) -> Work:
    """What sampled products take that share their pairs: the first one's, which chooses them.

    The first one reads its operands for the scores and again to gather; gradients derived from it
    write what they are the gradient of.
    """
    lead, *derived = sites
    depth = compat.size_hint(sampled_depth(lead))
    share = pattern.size(depth) / depth if depth else 1.0
    left, right, out = _elements(lead)
    work = _choice(lead, pattern, depth)
    gathered = (1 + share + (pattern.estimator == "topk_mean")) * (left + right)
    work = work.plus(Work(moved=_bytes(lead) * gathered, calls=2))
    flops = sparse_flops(lead, pattern)
    work = work.plus(_product(lead, flops, share * left, share * right, out))
    for site in derived:
        left, right, out = _elements(site)
        flops = sparse_flops(site, pattern, lead)
        picked = (left, share * right) if site.role == "grad_input" else (share * left, right)
        work = work.plus(_product(site, flops, *picked, share * out))
        work = work.plus(Work(moved=_bytes(site) * (1 + share) * out, calls=1))
    return work


def _product(site: Site, flops: float, *elements: float) -> Work:
    flops *= _SLOWER.get(site.dtype, 1.0)
    moved = _bytes(site) * sum(elements)
    if site.kind == "conv":
        return Work(conv_flops=flops, moved=moved, calls=1)
    return Work(flops=flops, moved=moved, calls=1)


_RANKED = {"topk": 1.0, "topk_mean": 1.0, "systematic": 1.5, "bernoulli": 3.0}


def _choice(site: Site, pattern: Sampled, depth: int) -> Work:
    """What scores and the choice of pairs take."""
    left, right, _ = _elements(site)
    read = {"input": left, "weight": right, "product": left + right}.get(pattern.scores, 0.0)
    if pattern.estimator == "topk_mean":
        read *= 2  # means first
    each = compat.size_hint(site.batch) if not pattern.shared else 1
    if site.channels is not None and site.role != "grad_weight":
        each = compat.size_hint(site.channels[2])
    ranked = _RANKED.get(pattern.estimator, 2.0) * each * depth
    return Work(moved=_bytes(site) * read, ranked=ranked, calls=3)


def _bytes(site: Site) -> int:
    return _BYTES.get(site.dtype, 4)


def _elements(site: Site) -> tuple[float, float, float]:
    """Elements of a product's operands and of its result; a convolution's at stride 1."""
    m, n, k = map(compat.size_hint, site.shape)
    if site.channels is None:
        batch = compat.size_hint(site.batch)
        return batch * m * k, batch * k * n, batch * m * n
    inner, outer, groups, _ = map(compat.size_hint, site.channels)
    if site.role == "forward":
        return m * inner * groups, n * k, m * n
    if site.role == "grad_input":
        return m * k, n * k, m * inner * groups
    return k * inner * groups, k * outer * groups, m * n


def unprofitable(sites: Sequence[Site], pattern: Pattern) -> str:
    """Reason to leave products dense on this machine, or "".

    N:M and stored masks run as a masked dense product on every device so far (packed and vendor
    kernels are not here yet), so they gain nothing. Sampled products have to take less time than
    the full ones, scores, choice, gathers and zeros included.

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
    if not all(compat.has_size(size) for site in sites for size in (site.batch, *site.shape)):
        return "not profitable: its sizes depend on data"
    pace = PACES.get(device, PACES["cpu"])
    dense = pace.time(Work(*map(sum, zip(*map(dense_work, sites), strict=True))))
    sampled = pace.time(sampled_work(sites, pattern))
    if sampled <= _MARGIN * dense:
        return ""
    which = " + ".join(site.role for site in sites)
    return (
        f"not profitable: {which} expected to take {_told(sampled)} sampled, "
        f"{_told(dense)} dense on {device}"
    )


def _told(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} us"
    return f"{microseconds / 1000:.3g} ms"
