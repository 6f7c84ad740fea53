"""What a batch of N:M products means: matrix by matrix, of every m weights the n largest |w| act.

    nm_bmm(x, w, n, m, dim, transposable)    x @ where(mask, w, 0)

Shapes: x [B, M, K], w [B, K, N], as stacked experts have them. ``dim`` is the axis of w along which
the groups run: 1 in a forward, 2 in the grad_input that shares its masks (there x is the gradient
[B, M, N] and w is [B, N, K]). The derivative is the exact one, zero outside the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx import masks
from sparsefx.ops._define import define, differentiate
from sparsefx.ops.nm import keep

Ints = Sequence[int]


def _mask(w: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    if transposable:  # of the two axes in front, for each position along the others
        return masks.transposable_mask(w.movedim(0, -1), n, m).movedim(-1, 0)
    return masks.nm_mask(w, n, m, dim)


def _nm_bmm(x: Tensor, w: Tensor, n: int, m: int, dim: int, transposable: bool) -> Tensor:
    return torch.bmm(x, keep(w, _mask(w, n, m, dim, transposable)))


def _fake(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], w.shape[2]))


def _flops(x: Ints, w: Ints, n: int, m: int, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * w[2] * n // m


nm_bmm = define(
    "nm_bmm(Tensor x, Tensor w, int n, int m, int dim, bool transposable) -> Tensor",
    _nm_bmm,
    _fake,
    _flops,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, *ctx.pattern = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w = ctx.saved_tensors
    need_x, need_w, *_ = ctx.needs_input_grad
    mask = _mask(w, *ctx.pattern)  # of w, never of its transpose: ties may fall otherwise there
    return (
        torch.bmm(grad, keep(w, mask).mT) if need_x else None,
        keep(torch.bmm(x.mT, grad), mask) if need_w else None,
        *[None] * 4,
    )


differentiate(nm_bmm, _setup, _backward)
