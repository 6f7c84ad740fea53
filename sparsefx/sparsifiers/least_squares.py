"""Weights on a fixed mask that come closest to the dense layer's outputs, from Gram matrices.

For a row w of the layer, dense inputs X_d and inputs X of the pruned net, minimise over w' that are
zero off the mask S

    |w' X - w X_d|^2 + lambda |w' - w_S|^2

which is solved by (H_SS + lambda) w'_S = (w C)_S + lambda w_S, with H = X X^T and C = X_d X^T
(C = H when X_d = X). The second term, lambda being ``damping`` times the mean of H's diagonal,
draws toward the weights that are there: w'= w_S has the value |w_S X - w X_d|^2, so the minimum
can't be worse than plain masking, and inputs that never act leave their weights as they are.

Hubara et al. (arXiv 2102.08124, section 5, "AdaPrune") minimise the same error, by Adam.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefx.errors import SparsifierError

CHUNK = 1 << 24  # elements of the systems solved at once: 128 MiB of float64


def least_squares(
    w: Tensor, gram: Tensor, mask: Tensor, cross: Tensor | None = None, damping: float = 1e-3
) -> Tensor:
    """Solve each row on its own mask, in closed form and float64, all rows of a chunk at once.

    Rows whose system is singular (no Cholesky factor, a pivot that is rounding noise, or a solution
    that doesn't lower the error) are solved by the pseudo-inverse, which changes the weights least;
    a row that this doesn't improve either keeps its masked weights. So no row's error exceeds that
    of plain masking.

    Args:
        w: [out, K], the dense weights.
        gram: X X^T, [K, K], of the inputs that the layer will see.
        mask: bool [out, K].
        cross: X_dense X^T, [K, K], when the targets are w X_dense; None for w X.
        damping: lambda over the mean of gram's diagonal, >= 0.

    Returns:
        [out, K], dtype and device of w, zero off the mask.

    Raises:
        SparsifierError: shapes differ, mask isn't bool, damping is negative, or a value isn't
            finite.
    """
    check_problem(w, gram, mask, cross, damping)
    dense, hessian = w.to(torch.float64), gram.to(torch.float64)
    wanted = dense @ (hessian if cross is None else cross.to(torch.float64))
    shift = damping * float(hessian.diagonal().mean()) if len(hessian) else 0.0
    masked = torch.where(mask, dense, 0.0)
    rest = wanted - masked @ hessian  # what is left to explain: solve for the change of w_S
    change = torch.zeros_like(masked)
    width = max(1, int(mask.sum(1).max())) if mask.numel() else 1
    for rows in torch.split(torch.arange(len(w), device=w.device), max(1, CHUNK // width**2)):
        change[rows] = _solve(hessian, rest[rows], mask[rows], shift)
    return (masked + change).to(w.dtype)


def _solve(hessian: Tensor, rest: Tensor, mask: Tensor, shift: float) -> Tensor:
    """Changes [rows, K] on the mask, each lowering its row's error or zero."""
    width = int(mask.sum(1).max()) if mask.numel() else 0
    if width == 0:
        return torch.zeros_like(rest)
    place = mask.sort(dim=1, descending=True, stable=True).indices[:, :width]  # [rows, width]
    inside = mask.gather(1, place)
    system = hessian[place[:, :, None], place[:, None, :]]  # [rows, width, width]
    if not bool(inside.all()):  # shorter rows: their places outside get the equation 1 x = 0
        system = torch.where(inside[:, :, None] & inside[:, None, :], system, 0.0)
    system.diagonal(dim1=1, dim2=2).add_(torch.where(inside, shift, 1.0))
    right = torch.where(inside, rest.gather(1, place), 0.0)
    factor, failed = torch.linalg.cholesky_ex(system)
    found = torch.cholesky_solve(right[:, :, None], factor).squeeze(2)
    bad = (failed != 0) | _near_singular(factor) | ~_lowers(system, right, found)
    if bool(bad.any()):
        inverse = torch.linalg.pinv(system[bad], hermitian=True)
        found[bad] = (inverse @ right[bad][:, :, None]).squeeze(2)
        found = torch.where(_lowers(system, right, found)[:, None], found, 0.0)
    return torch.zeros_like(rest).scatter_(1, place, torch.where(inside, found, 0.0))


def _near_singular(factor: Tensor) -> Tensor:
    """Whether a pivot is rounding noise beside the largest: its solution would be noise as well."""
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    noise = pivots.shape[1] * torch.finfo(pivots.dtype).eps
    return pivots.amin(1) <= noise * pivots.amax(1)


def _lowers(system: Tensor, right: Tensor, found: Tensor) -> Tensor:
    """Whether the change of the damped error, d^T A d - 2 b^T d, is at most 0; NaN isn't."""
    product = (system @ found[:, :, None]).squeeze(2)
    return ((product - 2 * right) * found).sum(1) <= 0


def layer_error(
    w: Tensor,
    dense: Tensor,
    gram: Tensor,
    cross: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Return |w X - dense X_d|^2 for each row, from Gram matrices, float64 [out].

    Args:
        w: [out, K].
        dense: [out, K].
        gram: X X^T, [K, K].
        cross: X_d X^T, with target; None when X_d is X.
        target: X_d X_d^T, [K, K].
    """
    w, dense, gram = w.to(torch.float64), dense.to(torch.float64), gram.to(torch.float64)
    if cross is None or target is None:
        delta = w - dense
        return ((delta @ gram) * delta).sum(1).clamp(min=0)
    mixed = dense @ cross.to(torch.float64)
    energy = ((dense @ target.to(torch.float64)) * dense).sum(1)
    return (((w @ gram) - 2 * mixed) * w).sum(1).add(energy).clamp(min=0)


def check_problem(
    w: Tensor, gram: Tensor, mask: Tensor, cross: Tensor | None, damping: float
) -> None:
    """Raise SparsifierError unless these are a layer's reconstruction problem."""
    if w.dim() != 2 or mask.shape != w.shape or mask.dtype != torch.bool:
        raise SparsifierError(
            f"w is {list(w.shape)} and the mask {mask.dtype} {list(mask.shape)}; pass [out, K] and "
            "torch.bool of the same shape"
        )
    for name, matrix in (("gram", gram), ("cross", cross)):
        if matrix is not None and matrix.shape != (w.shape[1], w.shape[1]):
            size = w.shape[1]
            raise SparsifierError(
                f"{name} is {list(matrix.shape)}; pass [{size}, {size}] for w {list(w.shape)}"
            )
    check_damping(damping)
    for name, values in (("w", w), ("gram", gram), ("cross", cross)):
        if values is not None and not bool(values.isfinite().all()):
            raise SparsifierError(f"{name} holds NaN or infinity")


def check_damping(damping: float) -> None:
    """Raise SparsifierError unless damping is a finite number >= 0."""
    if isinstance(damping, bool) or not isinstance(damping, int | float):
        raise SparsifierError(f"damping={damping!r} is of type {type(damping).__name__}; pass >= 0")
    if not 0 <= damping < float("inf"):
        raise SparsifierError(f"damping={damping!r} must be finite and >= 0")
