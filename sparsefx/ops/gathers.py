"""Picking pairs out of operands, and putting what belongs to them back: plain functions.

A pair of x[M, K] @ w[K, N] is a column of x and a row of w. ``left_pairs`` and ``right_pairs`` pick
those in S, so that left @ right is the sampled product:

    scale   [k]: multiplies the left side, in the scale's precision, rounded once
    rest    one pair more stands for the others: the sum of their columns, the mean of their rows

Matrices may be batched: S is [k], [B, k], or [1, k] where all batches share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsefx.ops.moves import background, columns_of, spread

# --- matrices


def rows(w: Tensor, indices: Tensor) -> Tensor:
    """w[S, :] of [K, N], read along memory: a transposed view is gathered by its columns."""
    if w.stride(0) < w.stride(1):
        return columns_of(w.t(), indices).t()
    return w.index_select(0, indices)


def columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[:, S] of [M, K], read along memory."""
    return rows(x.t(), indices).t()


def batch_rows(w: Tensor, indices: Tensor) -> Tensor:
    """w[b, S[b], :]: [B, K, N], [B, k] -> [B, k, N], read along memory."""
    if w.stride(1) < w.stride(2):
        return batch_columns(w.transpose(1, 2), indices).transpose(1, 2)
    if _shared(w, indices):
        return w.index_select(1, indices[0])
    return w.gather(1, indices.unsqueeze(2).expand(-1, -1, w.shape[2]))


def batch_columns(x: Tensor, indices: Tensor) -> Tensor:
    """x[b, :, S[b]]: [B, M, K], [B, k] -> [B, M, k], read along memory."""
    if x.stride(2) > x.stride(1):
        return batch_rows(x.transpose(1, 2), indices).transpose(1, 2)
    if _shared(x, indices):
        return x.index_select(2, indices[0])
    return x.gather(2, indices.unsqueeze(1).expand(-1, x.shape[1], -1))


def _shared(x: Tensor, indices: Tensor) -> bool:
    """Whether all batches have one index set: its leading size is 1, and theirs is not."""
    return isinstance(indices.shape[0], int) and indices.shape[0] == 1


def left_pairs(
    x: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    """Columns S of x [*, M, K], scaled; with ``rest`` the sum of the others is the last column."""
    xs = columns(x, indices) if x.dim() == 2 else batch_columns(x, indices)
    if scale is not None:
        xs = scaled(xs, scale.unsqueeze(-2))
    if rest:
        others = outside(indices, x.shape[-1], x).unsqueeze(-2)  # [*, 1, K]
        xs = torch.cat([xs, (x * others).sum(-1, keepdim=True).to(x.dtype)], -1)
    return xs


def right_pairs(w: Tensor, indices: Tensor, rest: bool = False) -> Tensor:
    """Rows S of w [*, K, N]; with ``rest`` the mean of the others is the last row."""
    ws = rows(w, indices) if w.dim() == 2 else batch_rows(w, indices)
    if rest:
        others = outside(indices, w.shape[-2], w).unsqueeze(-1)  # [*, K, 1]
        ws = torch.cat([ws, mean_of_others((w * others).sum(-2, keepdim=True), w, ws, -2)], -2)
    return ws


# --- what gathers of every rank share


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """X * scale, computed in the wider of their dtypes and rounded to x's."""
    return (x * scale).to(x.dtype)


def outside(indices: Tensor, size: Any, like: Tensor) -> Tensor:
    """1 outside the indices, 0 at them, along a new last axis; at least float32."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    ones = torch.ones([*indices.shape[:-1], size], dtype=wide, device=like.device)
    return ones.scatter(-1, indices, 0.0)


def mean_of_others(total: Tensor, whole: Tensor, picked: Tensor, dim: int) -> Tensor:
    """Total / how many of ``whole`` along ``dim`` were not picked; 0 where none were left out."""
    mean: Tensor = total / count_of_others(whole.shape[dim], picked.shape[dim])
    return mean.to(whole.dtype)


def count_of_others(size: Any, k: Any) -> Any:
    """How many pairs ``rest`` stands for, at least 1."""
    return torch.sym_max(size - k, 1)  # type: ignore[no-untyped-call]


# --- putting back


def batch_spread(
    values: Tensor, indices: Tensor, size: Any, dim: int, rest: Tensor | None = None
) -> Tensor:
    """``moves.spread`` for each of a batch: values [B, ...], S [B, k] or [1, k]; dim is 1 or 2."""
    if _shared(values, indices):
        return spread(values, indices[0], size, dim, rest)
    out = background(values, size, dim, rest)
    return out.scatter(dim, indices.unsqueeze(3 - dim).expand(values.shape), values)
