"""Row-wise N:M: of every m consecutive |w| along an axis, keep the n largest.

Magnitudes are ranked by integers (magnitudes.py). One of them, above infinity's, stands for every
NaN, so a NaN is the largest magnitude there is: it is kept and shows itself.
"""

import torch
from torch import Tensor

from sparsefx.compat import get_proxy_mode
from sparsefx.errors import MaskError
from sparsefx.masks.checks import check_dim, check_pattern, check_weight
from sparsefx.masks.magnitudes import rank_keys

_MOST_PAIRED = 8  # 28 pairs; at 16 the 120 pairs take Inductor 5 to 9 s to compile


def nm_mask(w: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """Mark the n largest |w| of every m consecutive ones along dim; of equals, the earlier.

    NaN counts as the largest magnitude, above infinity. The mask carries no gradient. Traceable
    (torch.compile, make_fx, fake tensors, symbolic sizes): no value of w decides what is run.

    Args:
        w: of any rank above 0 and any strides; any floating dtype, float8 included, any integer,
            bool or complex one (by modulus). Packed and quantised dtypes have no magnitudes here.
        n: how many to keep of each group, 1 <= n < m. (Some papers count the zeros instead.)
        m: the size of a group, at most 64; it has to divide the size of w along dim.
        dim: the dimension along which groups run.

    Returns:
        bool, the shape of w, with the strides of w where w is dense in memory. Every group of m
        along dim holds exactly n True.

    Raises:
        MaskError: n, m, dim or the dtype is none of the above, or m doesn't divide the size.
    """
    check_pattern(n, m)
    check_weight(w)
    dim = check_dim(w, dim)
    if w.shape[dim] % m:
        raise MaskError(
            f"size {w.shape[dim]} along dim={dim} of shape {tuple(w.shape)} is not a multiple of "
            f"m={m}; pad it, or choose an m that divides it"
        )
    place = _memory_order(w)
    order = sorted(range(w.dim()), key=place.__getitem__)
    axis = place[dim]
    groups = torch.unflatten(rank_keys(w.permute(order)), axis, (-1, m))  # [..., K/m, m, ...]
    return _keep_largest(groups, n, axis + 1).flatten(axis, axis + 1).permute(place)


def _memory_order(w: Tensor) -> list[int]:
    """Return the place of each dimension of w in memory, outermost first; of equals, the earlier.

    Counted, because Dynamo can compare symbolic strides but not sort by them.
    """
    place = [0] * w.dim()
    for i in range(w.dim()):
        for j in range(i + 1, w.dim()):
            place[j if w.stride(i) >= w.stride(j) else i] += 1
    return place


def _keep_largest(bits: Tensor, n: int, axis: int) -> Tensor:
    """Mark the n largest along axis; three ways to the same mask, each the fastest somewhere."""
    if bits.shape[axis] <= _MOST_PAIRED:
        return _by_pairs(bits, n, axis)
    if torch.compiler.is_compiling() or get_proxy_mode() is not None:
        return _by_table(bits, n, axis)
    return _by_sorting(bits, n, axis)


def _by_pairs(bits: Tensor, n: int, axis: int) -> Tensor:
    """Compare every pair of columns once: all elementwise, on tensors of 1/m of the size."""
    columns = bits.unbind(axis)
    m = len(columns)
    beaten = [torch.full_like(column, 0, dtype=torch.int8) for column in columns]
    for i in range(m):
        for j in range(i + 1, m):
            earlier_wins = (columns[i] >= columns[j]).to(torch.int8)
            beaten[j] = beaten[j] + earlier_wins
            beaten[i] = beaten[i] - earlier_wins  # was 1 for each later column, settled below
    return torch.stack([b < n - (m - 1 - i) for i, b in enumerate(beaten)], axis)


def _by_table(bits: Tensor, n: int, axis: int) -> Tensor:
    """Compare all with all, [..., m, m, ...]: one reduction, so the graph is small at any m."""
    m = bits.shape[axis]
    place = torch.arange(m, device=bits.device)
    earlier = place[None, :] < place[:, None]  # [mine, other]
    earlier = earlier.view(m, m, *[1] * (bits.dim() - 1 - axis))
    mine, other = bits.unsqueeze(axis + 1), bits.unsqueeze(axis)
    return ((other > mine) | ((other == mine) & earlier)).sum(axis + 1) < n


def _by_sorting(bits: Tensor, n: int, axis: int) -> Tensor:
    """Sort each group: the least work at large m, but a call that no compiler fuses."""
    first = bits.sort(dim=axis, descending=True, stable=True).indices.narrow(axis, 0, n)
    return torch.zeros_like(bits, dtype=torch.bool).scatter_(axis, first, True)
