"""What a product costs: floating-point operations and bytes, and whether sparse is worth it.

Where a size is symbolic, the figure is that of the example that was compiled.
"""

from __future__ import annotations

import math

from sparsefx import compat
from sparsefx.config import NM, Masked, Pattern, Sampled
from sparsefx.plan import Decision, Site
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


def unprofitable(site: Site, decision: Decision) -> str:
    """Reason to leave a site dense on this machine, or "".

    N:M and stored masks run as a masked dense product on every device so far (packed and vendor
    kernels are not here yet), so they gain nothing. Sampling gains (1 - ratio) of the product and
    pays for reading both operands three more times (norms, gather, scatter).
    """
    if isinstance(decision.pattern, NM | Masked):
        name = "N:M" if isinstance(decision.pattern, NM) else "a stored mask"
        return f"not profitable: {name} runs as a masked dense product on {site.device}"
    if not isinstance(decision.pattern, Sampled):
        return ""
    if not all(map(compat.has_size, (site.batch, *site.shape))):
        return "not profitable: its sizes depend on data"
    m, n, k = map(compat.size_hint, site.shape)
    saved = dense_flops(site) - sparse_flops(site, decision.pattern)
    elements = compat.size_hint(site.batch) * (m * k + k * n)
    moved = 3 * _BYTES.get(site.dtype, 4) * elements
    flops_per_byte = {"cpu": 8.0, "cuda": 180.0}.get(site.device, 8.0)
    if saved < moved * flops_per_byte:
        return (
            f"not profitable: saves {saved:.3g} operations, moves {moved:.3g} more bytes, "
            f"worth {flops_per_byte:g} operations each on {site.device}"
        )
    return ""
