"""What the sampled ops mean: x[M, K] @ w[K, N] ~= x[:, S] @ w[S, :] (Adelman et al., 2021).

    sampled_mm(x, w, S, bias)                   x[:, S] @ w[S, :] + bias
    sampled_mm_grad_input(grad, w, S)           its dL/dx: zero outside the columns S
    sampled_mm_grad_weight(xs, grad, S, K, t)   its dL/dw from xs = x[:, S]: zero outside the rows S
    sampled_mm_weight(xs, grad, S, t)           x.T @ grad over rows S alone, from xs = x[S, :]
    gather_columns(x, S), gather_rows(x, S)     xs, all that a backward needs of x
    after(x, others)                            x, once the others exist: makes them the forward's
    sampled_bmm, ...                            the same for [B, M, K] @ [B, K, N], S is [B, k]

S comes from draws.py; ``scale`` and ``rest``, which most of these take, are told in gathers.py, and
are part of what ``gather_*`` returns: a gradient from xs needs no scale. ``t`` (transposed) asks
for the transpose of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefx.ops._define import define, differentiate
from sparsefx.ops.gathers import (
    batch_spread,
    count_of_others,
    left_pairs,
    right_pairs,
    scaled,
)
from sparsefx.ops.moves import product_at, spread

Ints = Sequence[int]
PAIRS = "Tensor? scale=None, bool rest=False"


# --- matrix products; x @ w, grad @ w.T and x.T @ grad over the pairs in S


def _sampled_mm(
    x: Tensor, w: Tensor, indices: Tensor, bias: Tensor | None,
    scale: Tensor | None = None, rest: bool = False,
) -> Tensor:  # fmt: skip
    xs, ws = left_pairs(x, indices, scale, rest), right_pairs(w, indices, rest)
    return xs @ ws if bias is None else torch.addmm(bias, xs, ws)


def _fake_sampled_mm(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[1]))


def _sampled_mm_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    ws = right_pairs(w, indices, rest)  # as in the forward, so that it may be shared
    others = grad @ ws[-1:].t() if rest else None  # [M, 1]
    ws = ws[:-1] if rest else ws
    ws = ws if scale is None else scaled(ws, scale.unsqueeze(-1))
    return product_at(grad, ws.t(), indices, w.shape[0], others)


def _fake_sampled_mm_grad_input(grad: Tensor, w: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], w.shape[0]))


def _sampled_mm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, transposed: bool, rest: bool = False
) -> Tensor:
    if rest:  # the last pair's gradient belongs to all others alike
        k = xs.shape[1] - 1
        others = xs[:, k:].t() @ grad / count_of_others(depth, k)  # [1, N]
        xs = xs[:, :k]
    if transposed:
        return product_at(grad.t(), xs, indices, depth, others.t() if rest else None)
    return spread(xs.t() @ grad, indices, depth, 0, others if rest else None)


def _fake_sampled_mm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, transposed: bool, rest: bool = False
) -> Tensor:
    width = grad.shape[1]
    return xs.new_empty((width, depth) if transposed else (depth, width))


def _sampled_mm_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, transposed: bool, rest: bool = False
) -> Tensor:
    gs = right_pairs(grad, indices, rest)  # [k, N]
    return gs.t() @ xs if transposed else xs.t() @ gs


def _fake_sampled_mm_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, transposed: bool, rest: bool = False
) -> Tensor:
    shape = (grad.shape[1], xs.shape[1]) if transposed else (xs.shape[1], grad.shape[1])
    return xs.new_empty(shape)


def _pairs(indices: Ints, rest: bool) -> int:
    return indices[-1] + rest


def _sampled_mm_flops(
    x: Ints, w: Ints, indices: Ints, bias: Any = None, scale: Any = None, rest: bool = False,
    **_: Any,
) -> int:  # fmt: skip
    return 2 * x[0] * _pairs(indices, rest) * w[1]


def _grad_input_flops(
    grad: Ints, w: Ints, indices: Ints, scale: Any = None, rest: bool = False, **_: Any
) -> int:
    return 2 * grad[0] * grad[1] * _pairs(indices, rest)


def _grad_weight_flops(xs: Ints, grad: Ints, *_: Any, **__: Any) -> int:
    return 2 * xs[0] * xs[1] * grad[1]


sampled_mm = define(
    f"sampled_mm(Tensor x, Tensor w, Tensor indices, Tensor? bias, {PAIRS}) -> Tensor",
    _sampled_mm,
    _fake_sampled_mm,
    _sampled_mm_flops,
)
sampled_mm_grad_input = define(
    f"sampled_mm_grad_input(Tensor grad, Tensor w, Tensor indices, {PAIRS}) -> Tensor",
    _sampled_mm_grad_input,
    _fake_sampled_mm_grad_input,
    _grad_input_flops,
)
sampled_mm_grad_weight = define(
    "sampled_mm_grad_weight(Tensor xs, Tensor grad, Tensor indices, SymInt depth, "
    "bool transposed, bool rest=False) -> Tensor",
    _sampled_mm_grad_weight,
    _fake_sampled_mm_grad_weight,
    _grad_weight_flops,
)
sampled_mm_weight = define(
    "sampled_mm_weight(Tensor xs, Tensor grad, Tensor indices, bool transposed, "
    "bool rest=False) -> Tensor",
    _sampled_mm_weight,
    _fake_sampled_mm_weight,
    _grad_weight_flops,
)

# --- what the forward saves


def _gather_columns(
    x: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    xs = left_pairs(x, indices, scale, rest)
    return xs.contiguous() if x.dim() == 2 else xs


def _gather_rows(
    x: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    return left_pairs(x.mT, indices, scale, rest).mT.contiguous()


gather_columns = define(
    f"gather_columns(Tensor x, Tensor indices, {PAIRS}) -> Tensor", _gather_columns, _gather_columns
)
gather_rows = define(
    f"gather_rows(Tensor x, Tensor indices, {PAIRS}) -> Tensor", _gather_rows, _gather_rows
)

# --- what a backward needs of a forward that does not use it


def _after(x: Tensor, others: list[Tensor]) -> Tensor:
    return x.clone()  # an op may not return what it was given


after = define("after(Tensor x, Tensor[] others) -> Tensor", _after, _after)

# --- batched products: each batch its own indices, or [1, k] for all


def _sampled_bmm(
    x: Tensor, w: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    return torch.bmm(left_pairs(x, indices, scale, rest), right_pairs(w, indices, rest))


def _fake_sampled_bmm(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], w.shape[2]))


def _sampled_bmm_grad_input(
    grad: Tensor, w: Tensor, indices: Tensor, scale: Tensor | None = None, rest: bool = False
) -> Tensor:
    ws = right_pairs(w, indices, rest)
    others = torch.bmm(grad, ws[:, -1:].mT) if rest else None
    ws = ws[:, :-1] if rest else ws
    ws = ws if scale is None else scaled(ws, scale.unsqueeze(-1))
    return batch_spread(torch.bmm(grad, ws.mT), indices, w.shape[1], 2, others)


def _fake_sampled_bmm_grad_input(grad: Tensor, w: Tensor, *_: Any) -> Tensor:
    return grad.new_empty((grad.shape[0], grad.shape[1], w.shape[1]))


def _sampled_bmm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, rest: bool = False
) -> Tensor:
    values = torch.bmm(xs.mT, grad)  # [B, k, N]
    if not rest:
        return batch_spread(values, indices, depth, 1)
    k = values.shape[1] - 1
    others = values.narrow(1, k, 1) / count_of_others(depth, k)
    return batch_spread(values.narrow(1, 0, k), indices, depth, 1, others)


def _fake_sampled_bmm_grad_weight(
    xs: Tensor, grad: Tensor, indices: Tensor, depth: int, rest: bool = False
) -> Tensor:
    return grad.new_empty((grad.shape[0], depth, grad.shape[2]))


def _sampled_bmm_weight(xs: Tensor, grad: Tensor, indices: Tensor, rest: bool = False) -> Tensor:
    return torch.bmm(xs.mT, right_pairs(grad, indices, rest))


def _fake_sampled_bmm_weight(xs: Tensor, grad: Tensor, *_: Any) -> Tensor:
    return xs.new_empty((xs.shape[0], xs.shape[2], grad.shape[2]))


def _bmm_flops(
    x: Ints, w: Ints, indices: Ints, scale: Any = None, rest: bool = False, **_: Any
) -> int:
    return 2 * x[0] * x[1] * _pairs(indices, rest) * w[2]


def _bmm_grad_input_flops(
    grad: Ints, w: Ints, indices: Ints, scale: Any = None, rest: bool = False, **_: Any
) -> int:
    return 2 * grad[0] * grad[1] * grad[2] * _pairs(indices, rest)


def _bmm_grad_weight_flops(xs: Ints, grad: Ints, *_: Any, **__: Any) -> int:
    return 2 * xs[0] * xs[1] * xs[2] * grad[2]


sampled_bmm = define(
    f"sampled_bmm(Tensor x, Tensor w, Tensor indices, {PAIRS}) -> Tensor",
    _sampled_bmm,
    _fake_sampled_bmm,
    _bmm_flops,
)
sampled_bmm_grad_input = define(
    f"sampled_bmm_grad_input(Tensor grad, Tensor w, Tensor indices, {PAIRS}) -> Tensor",
    _sampled_bmm_grad_input,
    _fake_sampled_bmm_grad_input,
    _bmm_grad_input_flops,
)
sampled_bmm_grad_weight = define(
    "sampled_bmm_grad_weight(Tensor xs, Tensor grad, Tensor indices, SymInt depth, "
    "bool rest=False) -> Tensor",
    _sampled_bmm_grad_weight,
    _fake_sampled_bmm_grad_weight,
    _bmm_grad_weight_flops,
)
sampled_bmm_weight = define(
    "sampled_bmm_weight(Tensor xs, Tensor grad, Tensor indices, bool rest=False) -> Tensor",
    _sampled_bmm_weight,
    _fake_sampled_bmm_weight,
    _bmm_grad_weight_flops,
)

# --- exact derivatives given indices and scale, for those who call the ops eagerly


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, indices, *_, scale, rest = inputs
    ctx.rest = rest
    ctx.save_for_backward(x, w, indices, scale)


def _backward_mm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, indices, scale = ctx.saved_tensors
    need_x, need_w, _, need_bias, *_ = ctx.needs_input_grad
    gx = gw = None
    if need_x:
        gx = sampled_mm_grad_input(grad, w, indices, scale, ctx.rest)
    if need_w:
        xs = left_pairs(x, indices, scale, ctx.rest)
        gw = sampled_mm_grad_weight(xs, grad, indices, w.shape[0], False, ctx.rest)
    return gx, gw, None, grad.sum(0) if need_bias else None, None, None


def _backward_bmm(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, w, indices, scale = ctx.saved_tensors
    need_x, need_w, *_ = ctx.needs_input_grad
    gx = gw = None
    if need_x:
        gx = sampled_bmm_grad_input(grad, w, indices, scale, ctx.rest)
    if need_w:
        xs = left_pairs(x, indices, scale, ctx.rest)
        gw = sampled_bmm_grad_weight(xs, grad, indices, w.shape[1], ctx.rest)
    return gx, gw, None, None, None


differentiate(sampled_mm, _setup, _backward_mm)
differentiate(sampled_bmm, _setup, _backward_bmm)
