"""When 2:4 products of the vendor's library are expected to pay: others' measurements, a prior.

Nothing here was measured by this project but the two ceilings of an H200. ``benchmarks/`` and the
GPU page say how to measure; until then a product below the crossing stays a masked dense one.
"""

from __future__ import annotations

from itertools import pairwise
from math import log2

from sparsefx import compat
from sparsefx.config import NM
from sparsefx.plan import Site

# Dense time / 2:4 time by rows, bfloat16 on an H100 PCIe: geometric means over 16 layers of Llama
# and Qwen models, cuSPARSELt and cuBLASLt both with algorithm search; bcacdwk/vllmbench@92a8ca495,
# slidesparse/benchmark_kernel. An A100's are 1.30 to 1.54 over the same rows. H100 SXM at 8192^3:
# 1.20 to 1.22 (NVIDIA/CUDALibrarySamples#203), which is what a higher power budget leaves.
PUBLISHED = {
    64: 0.85, 128: 0.90, 256: 1.03, 512: 1.19, 1024: 1.39, 2048: 1.46, 4096: 1.54, 8192: 1.57,
    16384: 1.57,
}  # fmt: skip
# Bytes moved for a 16-bit weight beside what a masked copy for a dense product moves (5.0): that
# copy is read again and 9/16 of it written.
EXTRA_BYTES = 2 + 2 * 9 / 16
DENSE_FLOPS, BANDWIDTH = 790e12, 4.3e12  # a second, H200: bfloat16 8192^3, copy


def published_speedup(rows: float) -> float:
    """Return the published ratio at some rows, linear in their logarithm between the table's."""
    known = sorted(PUBLISHED)
    if rows <= known[0]:
        return PUBLISHED[known[0]]
    for low, high in pairwise(known):
        if rows <= high:
            share = log2(rows / low) / log2(high / low)
            return PUBLISHED[low] + share * (PUBLISHED[high] - PUBLISHED[low])
    return PUBLISHED[known[-1]]


def vendor_pays(rows: float) -> bool:
    """Whether the prior says that a 2:4 product saves more than compressing its weight takes.

    For each weight a dense product takes 2 * rows operations, so its size cancels. The crossing
    lies between 512 and 1024 rows.
    """
    saved = 2 * rows / DENSE_FLOPS * (1 - 1 / published_speedup(max(rows, 1)))
    return saved > EXTRA_BYTES / BANDWIDTH


def vendor_serves(site: Site, pattern: NM) -> bool:
    """Whether a product is one that the pass for the vendor's libraries takes, and should."""
    fits = (pattern.n, pattern.m, pattern.transposable) == (2, 4, True) and site.kind == "mm"
    if not fits or site.device != "cuda" or site.dtype not in ("float16", "bfloat16"):
        return False
    _, *sides = map(compat.settled, site.shape)
    step = compat.semi_structured_step()
    if not step or not all(isinstance(side, int) and side and side % step == 0 for side in sides):
        return False
    return vendor_pays(compat.size_hint(site.shape[0]))
