"""What is done to compute products, beside arithmetic: reads, writes, rankings, calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sparsefx.config import NM, Sampled
from sparsefx.cost.algebra import Amount, Terms, least, most, number, terms
from sparsefx.cost.products import (
    BYTES,
    dense_flops,
    executes_dense,
    packed_weight_bytes,
    sparse_flops,
)
from sparsefx.plan import Site
from sparsefx.policy import sampled_depth

# A product over fewer pairs than its kernel takes in one go takes what those would.
_FEWEST_PAIRS = 32


class Work(NamedTuple):
    """What is done to compute products; adds up. Numbers, or sympy expressions."""

    flops: Amount = 0.0
    moved: Amount = 0.0  # bytes that are read or written, by products and around them
    ranked: Amount = 0.0  # scores that are sorted
    calls: Amount = 0.0

    def plus(self, other: Work) -> Work:
        """Return the sum."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def total(works: Iterable[Work]) -> Work:
    """Return the sum of several."""
    found = Work()
    for work in works:
        found = found.plus(work)
    return found


def dense_work(site: Site) -> Work:
    """What the full product takes."""
    return _product(site, dense_flops(site), *elements(site))


def masked_work(site: Site) -> Work:
    """What the full product takes whose weight is masked first: read, and written masked."""
    _, right, _ = elements(site)
    return dense_work(site).plus(Work(moved=2 * _bytes(site) * right, calls=1))


def packed_work(site: Site, pattern: NM) -> Work:
    """What a product takes that reads kept weights and their indices alone."""
    left, _, out = elements(site)
    expanded = executes_dense("nm_packed_mm", site.device)
    flops = dense_flops(site) if expanded else sparse_flops(site, pattern)
    flops *= _SLOWER.get(site.dtype, 1.0)
    weight = packed_weight_bytes(site, pattern)
    return Work(flops=flops, moved=_bytes(site) * (left + out) + weight, calls=1)


def sampled_work(sites: Sequence[Site], pattern: Sampled) -> Work:
    """What sampled products take that share their pairs: the first one's, which chooses them."""
    return total(sampled_works(sites, pattern))


def sampled_works(sites: Sequence[Site], pattern: Sampled, of: Terms | None = None) -> list[Work]:
    """What each of several sampled products takes that share the first one's pairs.

    The first one reads its operands for the scores and again to gather; gradients derived from it
    write what they are the gradient of. ``of`` holds symbols in place of the pattern's numbers.
    """
    lead, *derived = sites
    depth = number(sampled_depth(lead))
    size = (of or terms(pattern, lead)).pairs(depth)
    share = size / depth if depth != 0 else 1.0
    timed = share if lead.kind == "conv" or depth == 0 else _pairs_timed(size, depth) / depth
    left, right, out = elements(lead)
    gathered = (1 + share + int(pattern.estimator == "topk_mean")) * (left + right)
    work = _choice(lead, pattern, depth).plus(Work(moved=_bytes(lead) * gathered, calls=2))
    product = _product(lead, timed * dense_flops(lead), share * left, share * right, out)
    found = [work.plus(product)]
    for site in derived:
        left, right, out = elements(site)
        picked = (left, share * right) if site.role == "grad_input" else (share * left, right)
        work = _product(site, timed * dense_flops(site), *picked, share * out)
        found.append(work.plus(Work(moved=_bytes(site) * (1 + share) * out, calls=1)))
    return found


def _pairs_timed(size: Amount, depth: Amount) -> Amount:
    return most(size, least(depth, _FEWEST_PAIRS))


_SLOWER = {"float64": 2.0}  # than float32, each operation; 16-bit types are taken to be as fast


def _product(site: Site, flops: Amount, *sizes: Amount) -> Work:
    return Work(flops * _SLOWER.get(site.dtype, 1.0), _bytes(site) * sum(sizes), calls=1)


_RANKED = {"topk": 1.0, "topk_mean": 1.0, "systematic": 1.5, "bernoulli": 3.0}


def _choice(site: Site, pattern: Sampled, depth: Amount) -> Work:
    """What scores and the choice of pairs take."""
    left, right, _ = elements(site)
    read = {"input": left, "weight": right, "product": left + right}.get(pattern.scores, 0.0)
    if pattern.estimator == "topk_mean":
        read *= 2  # means first
    each = number(site.batch) if not pattern.shared else 1
    if site.channels is not None and site.role != "grad_weight":
        each = number(site.channels[2])
    ranked = _RANKED.get(pattern.estimator, 2.0) * each * depth
    return Work(moved=_bytes(site) * read, ranked=ranked, calls=3)


def _bytes(site: Site) -> int:
    return BYTES.get(site.dtype, 4)


def elements(site: Site) -> tuple[Amount, Amount, Amount]:
    """Elements of a product's operands and of its result; a convolution's at stride 1."""
    m, n, k = map(number, site.shape)
    if site.channels is None:
        batch = number(site.batch)
        return batch * m * k, batch * k * n, batch * m * n
    inner, outer, groups, _ = map(number, site.channels)
    if site.role == "forward":
        return m * inner * groups, n * k, m * n
    if site.role == "grad_input":
        return m * k, n * k, m * inner * groups
    return k * inner * groups, k * outer * groups, m * n
