"""Floating-point operations and bytes of one product, full and as a pattern leaves it.

A size is an integer, a SymInt (the figure is that of the example that was compiled) or a sympy
expression (so is the figure).
"""

from __future__ import annotations

import math

from sparsefx.config import NM, Masked, Pattern, Sampled
from sparsefx.cost.algebra import Amount, Terms, index_bits, number, scaled, share_near, terms
from sparsefx.plan import Site
from sparsefx.policy import sampled_depth

BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def dense_flops(site: Site) -> Amount:
    """2 * M * N * K, for each product of a batch."""
    return 2 * math.prod(map(number, (site.batch, *site.shape)))


def sparse_flops(site: Site, pattern: Pattern, sampled: Site | None = None) -> Amount:
    """Operations that the pattern leaves: what arithmetic on kept values alone would cost.

    Args:
        site: the product.
        pattern: what it becomes.
        sampled: the layer's forward, where the product is derived from it and uses its sample.
    """
    return flops_left(site, terms(pattern, site), sampled)


def flops_left(site: Site, of: Terms, sampled: Site | None = None) -> Amount:
    """What :func:`sparse_flops` returns, of a pattern's numbers or symbols."""
    full = dense_flops(site)
    if isinstance(of.pattern, NM):
        return full * of.n // of.m
    if isinstance(of.pattern, Sampled):
        depth = number(sampled_depth(sampled or site))
        return full * of.pairs(depth) // depth if depth != 0 else full
    if isinstance(of.pattern, Masked) and of.ratio is not None:
        return scaled(of.ratio, full, share_near)
    return full


def packed_weight_bytes(site: Site, pattern: Pattern) -> Amount:
    """Bytes of the weight if only kept values and their indices were stored.

    A stored mask counts one bit a weight.
    """
    return packed_bytes(site, terms(pattern, site))


def packed_bytes(site: Site, of: Terms) -> Amount:
    """What :func:`packed_weight_bytes` returns, of a pattern's numbers or symbols."""
    batch, _, width, depth = map(number, (site.batch, *site.shape))
    count, each = batch * width * depth, BYTES.get(site.dtype, 4)
    if isinstance(of.pattern, Masked) and of.ratio is not None:
        return scaled(of.ratio, count * each) + count // 8
    if not isinstance(of.pattern, NM):
        return count * each
    kept = count * of.n // of.m
    bits = index_bits(of.m)
    return kept * each + kept * (int(bits) if bits.is_number else bits) // 8


def executes_dense(op: str, device: str = "cpu") -> bool:
    """Whether an op multiplies all pairs, those with a masked operand's zeros too.

    On CUDA a packed weight is expanded on its way to the tensor cores: fewer bytes, no fewer FLOPs.
    """
    if op.startswith("nm_packed"):
        return device == "cuda"
    return op.startswith(("masked_", "nm_"))
