"""From a layer's sparsity to the N:M pattern that holds most of it.

Hubara et al. (arXiv 2102.08124, section 5): when each weight of a group of m is zero with
probability p, the group fits n:m with probability P[Binomial(m, p) >= m - n].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsefx.errors import SparsifierError
from sparsefx.masks import nm_mask, transposable_mask
from sparsefx.patterns import MAX_M
from sparsefx.sparsifiers.targets import Target


def nm_for_sparsity(sparsity: float, m: int, conf: float = 0.1) -> int:
    """Return the smallest n >= 1 such that a group has at most n nonzeros with P > conf.

    Args:
        sparsity: the share of zeros, 0 to 1, taken as independent of one another.
        m: the size of a group, 2 to 32.
        conf: how probable it must be that a group fits, 0 <= conf < 1. The larger, the more is
            kept: at sparsity 0.5 and m = 8, n is 2, 4 and 6 for 0.1, 0.5 and 0.95.

    Returns:
        n, the number KEPT of every m; m itself where no smaller n is probable enough.

    Raises:
        SparsifierError: an argument is out of its range.
    """
    for name, value in (("sparsity", sparsity), ("conf", conf)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SparsifierError(
                f"{name}={value!r} is of type {type(value).__name__}; pass 0 to 1"
            )
    if not 0 <= sparsity <= 1:
        raise SparsifierError(f"sparsity={sparsity!r} must be between 0 and 1: the share of ZEROS")
    if not 0 <= conf < 1:
        raise SparsifierError(f"conf={conf!r} must be at least 0 and below 1")
    if isinstance(m, bool) or not isinstance(m, int) or not 2 <= m <= MAX_M:
        raise SparsifierError(f"m={m!r} must be an int between 2 and {MAX_M}")
    for n in range(1, m):
        if _at_least(m - n, m, sparsity) > conf:
            return n
    return m


def _at_least(zeros: int, m: int, p: float) -> float:
    """P[Binomial(m, p) >= zeros]."""
    return math.fsum(math.comb(m, z) * p**z * (1 - p) ** (m - z) for z in range(zeros, m + 1))


def unstructured_masks(
    targets: Sequence[Target], sparsity: float | None, masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return layer name -> which weights an unstructured pruning keeps, bool, as stored.

    Args:
        targets: the layers.
        sparsity: prune this share of all their weights together, the smallest |w| first; None:
            see masks.
        masks: layer name -> bool mask of the stored weight's shape; None with sparsity None takes
            the zeros that the weights hold.

    Raises:
        SparsifierError: both are given, a layer is missing, a mask of another shape or dtype.
    """
    if sparsity is not None and masks is not None:
        raise SparsifierError("give sparsity or masks, not both")
    if sparsity is not None:
        limit = _quantile([target.weight for target in targets], sparsity)
        return {t.name: t.weight.detach().abs().to(limit) > limit for t in targets}
    if masks is None:
        return {target.name: target.weight.detach() != 0 for target in targets}
    for target in targets:
        mask = masks.get(target.name)
        if mask is None:
            raise SparsifierError(
                f"masks has none for layer {target.name!r}; give one, or leave it out by rules"
            )
        if mask.dtype != torch.bool or mask.shape != target.weight.shape:
            raise SparsifierError(
                f"the mask for layer {target.name!r} is {mask.dtype} {tuple(mask.shape)}; pass "
                f"torch.bool {tuple(target.weight.shape)}"
            )
    return {target.name: masks[target.name] for target in targets}


def _quantile(weights: Sequence[Tensor], sparsity: float) -> Tensor:
    """The |w| that this share of all weights doesn't exceed; -1 where none is to go."""
    levels = torch.cat([w.detach().abs().flatten().to("cpu", torch.float64) for w in weights])
    count = int(sparsity * len(levels))
    return levels.kthvalue(count).values if count else levels.new_tensor(-1.0)


def mask_within(target: Target, kept: Tensor, n: int, m: int, transposable: bool) -> Tensor:
    """Return an N:M mask of the largest weights that an unstructured mask keeps, as stored.

    Others come behind them by their own magnitude: a group where fewer than n are kept is filled.
    """
    level = target.weight.detach().abs().to(torch.float64)
    score = target.matrix(torch.where(kept, level, level * 1e-6))
    made = transposable_mask(score, n, m) if transposable else nm_mask(score, n, m, dim=1)
    return target.unmatrix(made)
